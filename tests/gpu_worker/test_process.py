"""The worker as a process: starts, says where it listens, answers, dies when told; and refuses bad options."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest

from gpu_worker.__main__ import _check, _parse
from tests.gpu_worker.calling import TIED
from wire.errors import CleaveError
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc

Process = subprocess.Popen[str]


@contextmanager
def _started(*arguments: object) -> Iterator[Process]:
    command = [sys.executable, "-m", "gpu_worker", "--threads", "1", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def two(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    """On a port and on a Unix socket, started at once because that takes a while. One test each, which ends it."""
    model, socket = ("--model", model_folders[TIED]), tmp_path_factory.mktemp("worker") / "socket"
    with _started(*model, "--parent", os.getpid()) as port, _started(*model, "--listen", f"unix:{socket}") as unix:
        yield {"port": port, "unix": unix}


def _address(process: Process) -> str:
    assert process.stdout is not None
    words, _, address = process.stdout.readline().strip().rpartition(" ")
    assert words == "listening on"
    return address


def test_listens_answers_and_ends_on_sigterm(two: dict[str, Process], model_folders: dict[str, Path]) -> None:
    """And the address is its own meanwhile."""
    process, address = two["port"], _address(two["port"])
    assert address.startswith("127.0.0.1:")
    another = _started("--model", model_folders[TIED], "--listen", address)
    with another as second, grpc.insecure_channel(address) as channel:
        said, complaint = second.communicate(timeout=60)
        assert (second.returncode, said) == (2, "")
        assert "cannot listen" in complaint.splitlines()[-1]
        stub = gpu_worker_pb2_grpc.GpuWorkerServiceStub(channel)
        assert list(stub.Describe(pb.DescribeRequest(), timeout=60).models) == [TIED]
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, "")


def test_a_stream_that_is_open_when_the_worker_stops_makes_no_noise(two: dict[str, Process]) -> None:
    """The stream ends, its caches are dropped, and nothing in the log looks like a failure."""
    process, address = two["unix"], _address(two["unix"])
    assert address.startswith("unix:")
    frames: SimpleQueue[pb.ExecuteRequest | None] = SimpleQueue()
    with grpc.insecure_channel(address) as channel:
        stub = gpu_worker_pb2_grpc.GpuWorkerServiceStub(channel)
        stub.Load(pb.LoadRequest(model=TIED, precision=pb.PRECISION_INT8), timeout=120)
        answers = stub.Execute(iter(frames.get, None))
        reserve = pb.Reserve(tokens=8, type=pb.KV_TYPE_FLOAT16)
        cache = pb.Operation(cache=pb.Cache(sequence=1, reserve=reserve))
        frames.put(pb.ExecuteRequest(id=1, operation=cache))
        assert next(answers).id == 1
        process.send_signal(signal.SIGTERM)
        said, log = process.communicate(timeout=20)
        frames.put(None)
    assert (process.returncode, said) == (0, "")
    assert "ERROR" not in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model", "no/such/folder"], "is not a folder"),
        (["--model", "{model}", "--listen", "0.0.0.0:0"], "--insecure-plaintext"),
        (["--model", "{model}", "--listen", "[::]:0"], "--insecure-plaintext"),
        (["--model", "{model}", "--model", "{model}"], "two model folders"),
        (["--model", "{model}", "--threads", "0"], "--threads"),
        (["--model", "{model}", "--listen", "127.0.0.1:99999"], "port"),
    ],
)
def test_options_that_cannot_work(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, options: list[str], complaint: str
) -> None:
    filled = [option.format(model=model_folders[TIED]) for option in options]
    monkeypatch.setattr("sys.argv", ["cleave-gpu-worker", *filled])
    with pytest.raises(CleaveError, match=complaint) as caught:
        _check(_parse())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("option", "complaint"), [("--parent", "parent"), ("--threads", "--threads")])
def test_options_that_cannot_work_are_said_in_a_line(
    model_folders: dict[str, Path], option: str, complaint: str
) -> None:
    with _started("--model", model_folders[TIED], option, 0) as process:
        said, complaints = process.communicate(timeout=60)
        assert (process.returncode, said) == (2, "")
        [line] = complaints.splitlines()
        assert line.startswith("cleave-gpu-worker: ")
        assert complaint in line
