"""Three real processes: the command line, the trusted worker and the GPU worker, and a hostile one in between."""

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.conftest import MODELS, build, greedy_reference
from tests.sealed import Opened, RawClient, Stream
from tests.simulators.proxies import Proxy, Tamper
from trusted_worker import arithmetic
from wire.errors import VerificationError
from wire.v1 import gpu_worker_pb2 as gpu
from wire.v1 import trusted_worker_pb2 as pb
from wire.v1 import trusted_worker_pb2_grpc

PROMPT = [int(token) for token in np.random.default_rng(7).integers(1, 299, 12)]
ROOT = Path(__file__).resolve().parent.parent


def chat(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """`cleave chat` over token ids, as a user runs it."""
    ids = ",".join(map(str, PROMPT))
    command = [sys.executable, "-m", "client", "chat", "--model", str(folder), "--token-ids", ids, "--json", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)


def answer(folder: Path, *flags: str) -> dict[str, Any]:
    done = chat(folder, "--max-new-tokens", "64", *flags)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def expected_tokens(folder: Path) -> list[int]:
    """What transformers says, up to an end of sequence."""
    tokens = greedy_reference(folder, PROMPT, 64)
    return tokens[: tokens.index(300) + 1] if 300 in tokens else tokens


@pytest.mark.parametrize("name", MODELS[1:3])
def test_float32_schemes_say_what_transformers_says(model_folder: Callable[[str], Path], name: str) -> None:
    folder = model_folder(name)
    expected = expected_tokens(folder)
    for scheme in ("plain", "split", "tee-only", "kv-shield"):
        said = answer(folder, "--scheme", scheme, "--precision", "float32")
        assert said["token_ids"] == expected, scheme
        assert (said["scheme"], said["precision"]) == (scheme, "float32")


SHIELDS = {
    "gpt2-bare": ["--rotate-every", "7", "--seal-idle"],
    "chatglm3": ["--rope", "worker"],
    "qwen3": ["--kv-dtype", "float32", "--rotate-every", "20"],
}


@pytest.mark.parametrize("name", SHIELDS)
def test_kv_shield_says_what_transformers_says_in_other_families(
    model_folder: Callable[[str], Path], name: str
) -> None:
    folder = model_folder(name)
    said = answer(folder, "--scheme", "kv-shield", *SHIELDS[name])
    assert said["token_ids"] == expected_tokens(folder)
    assert (said["scheme"], said["precision"]) == ("kv-shield", "float32")


def test_a_sealed_model_says_what_the_model_says_and_opens_with_its_key_only(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, sealed, key = model_folder("llama-bf16-tied-sharded"), tmp_path / "sealed", tmp_path / "key"
    words = ["seal-model", "--model", str(folder), "--out", str(sealed), "--key-file", str(key)]
    subprocess.run([sys.executable, "-m", "trusted_worker", *words], cwd=ROOT, check=True, timeout=60)
    expected = expected_tokens(folder)
    for flags in (["--scheme", "kv-shield"], ["--scheme", "tee-only", "--precision", "float32"]):
        said = answer(sealed, "--model-key-file", str(key), *flags)
        assert said["token_ids"] == expected
    for flags, word in ((["--scheme", "kv-shield"], "--model-key-file"), (["--model-key-file", str(key)], "tee-only")):
        refused = chat(sealed, *flags)
        assert refused.returncode != 0
        assert word in refused.stderr.splitlines()[-1]


def test_secure_infer_says_what_split_says_bit_for_bit(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("qwen2")
    split = answer(folder, "--scheme", "split", "--logprobs", "5")
    masked = answer(folder, "--logprobs", "5", "--credit", "1")
    assert masked["scheme"] == "secure-infer"
    assert masked["token_ids"] == split["token_ids"]
    assert masked["logprobs"] == split["logprobs"]
    assert masked["pads_reused"] == 0
    assert masked["products_verified"] > 0
    assert masked["products_verified"] == 13 * masked["pads_issued"]
    assert masked["exchanges"] > 0
    assert masked["attestation"] == {"provider": "simulated", "verified": False}
    assert 0 < masked["secure_memory"]["peak"] <= masked["secure_memory"]["budget"]
    again = answer(folder, "--temperature", "0.8", "--top-p", "0.9", "--seed", "5")
    assert again["token_ids"] == answer(folder, "--temperature", "0.8", "--top-p", "0.9", "--seed", "5")["token_ids"]


BAD = {
    "a hub name": (["--model", "meta-llama/Llama-3.2-1B"], "is not a folder"),
    "token out of range": (["--token-ids", "5,301"], "token id"),
    "context too long": (["--max-context", "100000"], "context"),
    "budget too small": (["--memory-budget", "64KiB"], "budget"),
    "float32 secure-infer": (["--precision", "float32"], "int8"),
    "int8 kv-shield": (["--scheme", "kv-shield", "--precision", "int8"], "float32"),
    "rotation without kv-shield": (["--rotate-every", "5"], "kv-shield"),
    "an element type of nobody": (["--scheme", "kv-shield", "--kv-dtype", "int3"], "int3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line(model_folder: Callable[[str], Path], case: str) -> None:
    flags, word = BAD[case]
    done = chat(model_folder("qwen2"), *flags)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert word in lines[-1]
    assert "Traceback" not in done.stderr


@contextmanager
def workers(folder: Path, sockets: Path, *more: str) -> Iterator[tuple[Proxy, str]]:
    """A real GPU worker, a proxy before it, and a trusted worker that sees only the proxy."""
    parent = ["--parent", str(os.getpid())]
    real, between = f"unix:{sockets}/gpu", f"unix:{sockets}/proxy"
    spawn = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    flags = ["--listen", real, "--model", str(folder), "--ops", "ring", *parent]
    worker: Any = subprocess.Popen([sys.executable, "-m", "gpu_worker", *flags], **spawn)  # type: ignore[call-overload]
    worker.stdout.readline()
    proxy = Proxy(real, between)
    flags = ["--gpu-worker", between, "--model", str(folder), "--pad-bank", "2MiB", "--prefill", "worker", *parent]
    flags += more
    trusted: Any = subprocess.Popen([sys.executable, "-m", "trusted_worker", *flags], **spawn)  # type: ignore[call-overload]
    try:
        address = trusted.stdout.readline().split()[-1]
        assert trusted.stdout.readline() == "serving\n"
        yield proxy, address
    finally:
        for process in (trusted, worker):
            process.kill()
            process.wait()
            process.stdout.close()
        proxy.close()


class Talk:
    """A client of a few lines, to see raw status codes."""

    def __init__(self, address: str, model: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = trusted_worker_pb2_grpc.TrustedWorkerServiceStub(self._channel)
        self._model = model

    def stats(self) -> pb.StatsResponse:
        return self._stub.Stats(pb.StatsRequest(), timeout=10)

    def wait_for_pads(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while self.stats().pads_in_stock < count:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def open(self) -> Opened:
        request = pb.OpenRequest(model=self._model, scheme="secure-infer", precision=gpu.PRECISION_INT8)
        return RawClient(self._stub).open(request)

    def decode(self, opened: Opened, ids: list[int], count: int) -> Stream:
        """A stream that stays open after one frame."""
        frames: queue.SimpleQueue[pb.DecodeRequest | None] = queue.SimpleQueue()
        frames.put(pb.DecodeRequest(token_ids=ids, credit=count))
        return RawClient(self._stub).stream(opened, iter(frames.get, None))

    def say(self, ids: list[int], count: int) -> list[int]:
        """A session of one turn: `count` tokens after `ids`."""
        session = self.open()
        responses = self.decode(session, ids, count)
        try:
            tokens = [next(responses).token.token_id for _ in range(count)]
        finally:
            responses.call.cancel()
        RawClient(self._stub).close(session)
        return tokens


def test_every_byte_that_the_gpu_worker_received(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation over real sockets: the recorded bytes hold no token, no activation row, and look uniform."""
    folder = model_folder("llama")
    with workers(folder, tmp_path) as (proxy, address):
        talk = Talk(address, folder.name)
        talk.wait_for_pads(60)
        said = talk.say(PROMPT, 20)
        counters = talk.stats()
        requests = list(proxy.requests)
    assert counters.pads_reused == 0
    assert counters.products_verified > 0
    assert {request.operation.WhichOneof("kind") for request in requests} <= {"ring_matmul", None}
    words = np.frombuffer(b"".join(request.data for request in requests), "<u4")
    for shift in (0, 8, 16, 24):
        counts = np.bincount((words >> shift) & 255, minlength=256)
        assert 140 < ((counts - len(words) / 256) ** 2 / (len(words) / 256)).sum() < 400
    rows: list[Any] = []
    quantize = arithmetic.quantize

    def spy(*args: Any) -> Any:
        result = quantize(*args)
        rows.extend(row.copy() for row in result[0])
        return result

    monkeypatch.setattr(arithmetic, "quantize", spy)
    assert build(folder, "split").greedy(PROMPT, 20) == said
    received = b"".join(request.SerializeToString() for request in requests)
    assert len(rows) > 100
    for row in rows:
        assert row[:4].tobytes() not in received or not row[:4].any()
    assert np.array(PROMPT, "<i4").tobytes() not in received
    whole_rows = [request.data[start : start + 64] for request in requests for start in range(0, len(request.data), 64)]
    assert len(set(whole_rows)) == len(whole_rows)


def test_a_client_that_vanishes_frees_its_session(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """One never decoded, one broke off within its answer; both are gone after a while, and a living one is not."""
    folder = model_folder("llama")
    with workers(folder, tmp_path, "--session-seconds", "0.5") as (_, address):
        talk = Talk(address, folder.name)
        used = talk.stats().memory_used
        talk.open()
        responses = talk.decode(talk.open(), PROMPT, 200)
        next(responses)
        responses.call.cancel()
        assert len(talk.say(PROMPT, 40)) == 40
        deadline = time.monotonic() + 30
        while talk.stats().sessions:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert talk.stats().memory_used == used


def test_sessions_side_by_side_say_what_they_say_alone(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Six clients at once, prompts of different lengths, longer than a step too."""
    folder = model_folder("llama")
    prompts = [(PROMPT * 8)[: 1 + 18 * number] for number in range(6)]
    with workers(folder, tmp_path) as (_, address):
        talk = Talk(address, folder.name)
        alone = [talk.say(prompt, 12) for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as clients:
            together = list(clients.map(lambda prompt: Talk(address, folder.name).say(prompt, 12), prompts))
        assert together == alone
        assert talk.stats().sessions == 0
        assert talk.stats().pads_reused == 0


def copy(response: gpu.ExecuteResponse, **fields: Any) -> gpu.ExecuteResponse:
    changed = gpu.ExecuteResponse()
    changed.CopyFrom(response)
    for name, value in fields.items():
        if name == "header":
            changed.header.CopyFrom(value)
        else:
            setattr(changed, name, value)
    return changed


def header(response: gpu.ExecuteResponse, dtype: int, *shape: int) -> Any:
    result = type(response.header)()
    result.CopyFrom(response.header)
    result.dtype = dtype  # type: ignore[assignment]
    del result.shape[:]
    result.shape.extend(shape)
    return result


def flipped(response: gpu.ExecuteResponse) -> list[gpu.ExecuteResponse]:
    data = bytearray(response.data)
    data[len(data) // 2] ^= 1
    return [copy(response, data=bytes(data))]


LIES: dict[str, Tamper] = {
    "one bit": flipped,
    "short": lambda r: [copy(r, data=r.data[:-4], header=header(r, 2, len(r.data) // 4 - 1))],
    "shorter than it says": lambda r: [copy(r, data=r.data[:-4]), copy(r, data=b"")],
    "oversized": lambda r: [copy(r, data=r.data + b"1234")],
    "float32": lambda r: [copy(r, header=header(r, 1, *r.header.shape))],
    "unknown dtype": lambda r: [copy(r, header=header(r, 77, *r.header.shape))],
    "transposed": lambda r: [copy(r, header=header(r, 2, *reversed(r.header.shape)))],
    "another id": lambda r: [copy(r, id=r.id + 1)],
    "an old answer": lambda r: [copy(r, id=max(r.id - 1, 1) if r.id > 1 else 9)],
    "no header": lambda r: [gpu.ExecuteResponse(id=r.id, data=r.data)],
}


def test_every_lie_is_the_same_error_for_the_client(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """And the next session, with an honest worker, gets the right answer: the service goes on."""
    folder = model_folder("llama")
    with workers(folder, tmp_path) as (proxy, address):
        talk = Talk(address, folder.name)
        talk.wait_for_pads(30)
        honest = talk.say(PROMPT, 4)
        for name, lie in LIES.items():
            talk.wait_for_pads(30)
            proxy.tamper = lie
            with pytest.raises(grpc.RpcError) as caught:
                talk.say(PROMPT, 4)
            assert caught.value.code() is grpc.StatusCode.DATA_LOSS, name
            assert caught.value.details() == str(VerificationError()), name
            proxy.tamper = None
        assert talk.say(PROMPT, 4) == honest
        assert talk.stats().sessions == 0
