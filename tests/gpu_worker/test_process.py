"""The worker as a process: starts, says where it listens, answers, dies when told; and refuses bad options."""

import json
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
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.gpu_worker.calling import TIED
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc

Process = subprocess.Popen[str]


@contextmanager
def _started(*arguments: object, **variables: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "gpu_worker", "--threads", "1", *map(str, arguments)]
    environment = {**os.environ, **variables}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def two(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    """On a port, told by flags, and on a Unix socket, told by a file and the environment. Started at once because that
    takes a while. One test each, which ends it.
    """
    folder = tmp_path_factory.mktemp("worker")
    told = folder / "gpu.toml"
    told.write_text(f'model = ["{model_folders[TIED]}"]\nlisten = "unix:{folder}/socket"\nlog-format = "json"\n')
    with (
        _started("--model", model_folders[TIED], "--parent", os.getpid()) as port,
        _started("--config", told, CLEAVE_GPU_DRAIN_SECONDS="1000", CLEAVE_GPU_DEVICE="cpu") as unix,
    ):
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
        checked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
        answers = stub.Execute(iter(frames.get, None))
        reserve = pb.Reserve(tokens=8, type=pb.KV_TYPE_FLOAT16)
        cache = pb.Operation(cache=pb.Cache(sequence=1, reserve=reserve))
        frames.put(pb.ExecuteRequest(id=1, operation=cache))
        assert next(answers).id == 1
        process.send_signal(signal.SIGINT)
        said, log = process.communicate(timeout=20)
        frames.put(None)
    assert (process.returncode, said) == (0, "")
    lines = [json.loads(line) for line in log.splitlines()]
    assert [(line["level"], line["role"]) for line in lines] == [("INFO", "gpu-worker")] * 3
    assert {line["message"].split()[0] for line in lines} == {"ready", "loaded", "draining:"}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--parent", "0"], "parent"),
        (["--model", "no/such/folder"], "is not a folder"),
        (["--listen", "0.0.0.0:0"], "--insecure-plaintext"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(model_folders: dict[str, Path], words: list[str], complaint: str) -> None:
    with _started("--model", model_folders[TIED], *words) as process:
        said, complaints = process.communicate(timeout=60)
        assert (process.returncode, said) == (2, "")
        [line] = complaints.splitlines()
        assert line.startswith("cleave-gpu-worker: ")
        assert complaint in line
