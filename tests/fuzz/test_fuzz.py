"""The corpus, and a short run of every target. The long run: python -m tests.fuzz (RESULTS.md)."""

import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
import torch
from Crypto.Cipher import AES

from client import session
from gpu_worker import conversation
from gpu_worker.cache import CacheStore, Sequence
from gpu_worker.calls import CallReader
from gpu_worker.expected import LOOKUP_ROWS
from tests.fuzz import targets, tiny
from tests.fuzz.calls import frames
from tests.fuzz.conversation import GOOD, HONEST, SHUT, STEPWISE
from tests.fuzz.harness import Bug, Target, alarms, attempt, load, pack, replay, shortest
from tests.fuzz.run import run
from tests.fuzz.stream_frames import frame_of
from trusted_worker import offload
from trusted_worker.offload import GpuWorker
from trusted_worker.service import Service
from wire import sealing
from wire.codec import MAX_TENSOR_BYTES
from wire.errors import InvalidArgumentError
from wire.model_config import ModelConfig
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import tensor_pb2

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.bin"))
FRAMES = {"gpu": 8000, "trusted": 600, "offload": 4000, "client": 300, "sockets": 300}
FRAMES |= {"conversation": 600, "stream_plane": 1000}
INSIDE = ("gpu", "trusted", "offload", "client", "conversation", "stream_plane")
Make = Callable[[str], Target]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """`make(name)`: a target, made once. The processes behind sockets start at once: they need a while."""
    threads = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    folders = tiny.save_all(tmp_path_factory.mktemp("tiny"))
    made = {"sockets": targets.make("sockets", folders)}

    def get(name: str) -> Target:
        if name not in made:
            made[name] = targets.make(name, folders)
        return made[name]

    yield get
    for target in made.values():
        target.close()
    torch.set_num_threads(threads[0])
    numba.set_num_threads(threads[1])


@pytest.mark.parametrize("name", [*INSIDE, "sockets"])
def test_the_corpus_holds_no_bug_any_more(make: Make, name: str) -> None:
    target = make(name)
    paths = [path for path in CORPUS if path.name.startswith(name + ".")]
    assert paths
    with alarms():
        target.check()
        for path in paths:
            replay(target, load(path), check=".bug-" in path.name)
        target.check()


@pytest.mark.parametrize("name", [*INSIDE, "sockets"])
def test_a_short_run_finds_nothing(make: Make, name: str) -> None:
    result = run(make(name), FRAMES[name], "ci")
    assert not result.bugs
    assert result.frames >= FRAMES[name]
    assert len(result.outcomes) > 2


def test_the_same_seed_gives_the_same_frames(make: Make) -> None:
    first, second = (run(make("gpu"), 300, "again").outcomes for _ in range(2))
    assert first == second != run(make("gpu"), 300, "another").outcomes


def test_a_stream_may_be_cut_at_every_byte(make: Make) -> None:
    """A valid call in two frames, and the answer that it has in one part."""
    target = make("conversation")
    target.begin()
    operation = pb.Operation(ring_matmul=pb.RingMatmul(linear=pb.LINEAR_QKV))
    call = frames(1, operation, np.arange(16, dtype=np.int32)[None], 1)
    whole = b"".join(frame_of(message).to_bytes() for message in call)
    outcomes = {
        target.play(b"C" + bytes([GOOD, SHUT, STEPWISE | HONEST]) + pack([whole[:place], whole[place:]]))
        for place in range(len(whole) + 1)
    }
    target.end()
    assert outcomes == {"answered"}


def broken(*_: Any) -> None:
    raise IndexError


def forgetting(self: CacheStore, number: int) -> None:
    self._sequences.pop(number, None)


def counting_early(self: Sequence, index: Any) -> None:
    self.advance(1)
    raise InvalidArgumentError("no")


def taking_anything(self: Any, *_: Any) -> Any:
    return np.zeros((1, 2), np.float32)


def expecting(self: Service, name: bytes) -> Any:
    return self._sessions[name]


def trusting(request: Any, opened: Any) -> None:
    if opened.scheme != request.scheme:
        raise KeyError(opened.scheme)


def unbounded(prefix: memoryview) -> tuple[int, int]:
    return struct.unpack("<ii", prefix)


def believing(self: Any, plane: Any) -> Any:
    frame, size, _ = plane.receive()
    return pb.ExecuteResponse(id=frame.id, header=frame.header), size


def unsealing(key: bytes, sequence: int, body: bytes, bound: bytes) -> bytes:
    return AES.new(key, AES.MODE_GCM, nonce=sequence.to_bytes(12, "big")).decrypt(body[:-16])


PLANTED: dict[str, tuple[str, Any, str, Any]] = {
    "an error that is not of the tree": ("gpu", Sequence, "permute", broken),
    "memory that stays taken": ("gpu", CacheStore, "drop", forgetting),
    "a refused call that changes something": ("gpu", Sequence, "permute", counting_early),
    "a refusal that is taken for an answer": ("offload", offload, "_refusal", taking_anything),
    "a session that must exist": ("trusted", Service, "session", expecting),
    "another scheme that is not foreseen": ("client", session, "_check_echo", trusting),
    "lengths that nobody checks": ("conversation", conversation, "lengths", unbounded),
    "answers of another call": ("stream_plane", GpuWorker, "_receive", believing),
    "a seal that is not looked at": ("client", sealing, "_open", unsealing),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_bug_is_found(make: Make, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, where, attribute, behaviour = PLANTED[case]
    target = make(name)
    with monkeypatch.context() as patch:
        patch.setattr(where, attribute, behaviour)
        result = run(target, 4000, "planted")
        assert len(result.bugs) == 1
        ((signature, entries),) = result.bugs.items()
        with pytest.raises(Bug) as caught:
            replay(target, shortest(target, entries, signature))
        assert caught.value.signature == signature


def test_an_entry_that_hangs_is_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(*_: Any) -> None:
        while True:
            pass

    target = make("offload")
    monkeypatch.setattr("tests.fuzz.harness.HANG_SECONDS", 0.1)
    monkeypatch.setattr(GpuWorker, "_receive", forever)
    with alarms(), pytest.raises(Bug, match="hang"):
        attempt(target, b"X\x00")


HEADER = tensor_pb2.TensorHeader(dtype=tensor_pb2.DTYPE_FLOAT32, shape=(1 << 15, 1 << 11))
WIDE = tensor_pb2.TensorHeader(dtype=tensor_pb2.DTYPE_INT32, shape=(LOOKUP_ROWS, 1 << 17))
ROWS = pb.Operation(forward=pb.Forward(sequences=[pb.SequenceRows()] * 1000))
ANNOUNCED = {
    "a parameter of the largest size": (pb.Operation(provision=pb.Provision(kind=pb.PARAMETER_KIND_EMBEDDING)), HEADER),
    "a lookup of the most rows": (pb.Operation(ring_lookup=pb.RingLookup()), WIDE),
    "more rows than a call has": (pb.Operation(matmul=pb.Matmul(linear=pb.LINEAR_QKV)), HEADER),
    "sequences without rows": (ROWS, HEADER),
}
BOUNDS = {
    "a parameter of the largest size": MAX_TENSOR_BYTES + (1 << 20),
    "a lookup of the most rows": 4 * LOOKUP_ROWS * (1 << 17) + (1 << 20),
}


@pytest.mark.parametrize("case", ANNOUNCED)
def test_a_header_allocates_no_more_than_its_operation_may_take(case: str) -> None:
    """What one frame of a few bytes can make the worker set aside, on a model of a real size."""
    operation, header = ANNOUNCED[case]
    real = tiny.CONFIGS["llama"] | {"hidden_size": 1 << 11, "vocab_size": 1 << 17, "num_attention_heads": 32}
    model: Any = SimpleNamespace(config=ModelConfig.from_dict("real", real | {"num_key_value_heads": 8}, {}))
    frame = pb.ExecuteRequest(id=1, operation=operation, header=header, data=b"1234")
    resident = _resident()
    tracemalloc.start()
    try:
        reader = CallReader(ring_only=False)
        try:
            reader.add(frame, model)
        except InvalidArgumentError:
            assert case not in BOUNDS
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= BOUNDS.get(case, 1 << 20)
    assert _resident() - resident < 16 << 20  # set aside, not touched


def _resident() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))
