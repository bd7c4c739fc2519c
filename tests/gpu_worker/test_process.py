"""The worker as a process: starts, says where it listens, answers, dies when told; and refuses bad options."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest

from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import gpu_worker_pb2_grpc


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gpu_worker", *arguments]


@pytest.mark.parametrize("unix", [False, True])
def test_listens_answers_and_ends_on_sigterm(model_folders: dict[str, Path], tmp_path: Path, unix: bool) -> None:
    listen = f"unix:{tmp_path}/socket" if unix else "127.0.0.1:0"
    model = str(model_folders["qwen-tied"])
    command = _command("--listen", listen, "--model", model, "--parent", str(os.getpid()), "--threads", "1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("listening on unix:" if unix else "listening on 127.0.0.1:")
            with grpc.insecure_channel(line.split()[-1]) as channel:
                stub = gpu_worker_pb2_grpc.GpuWorkerServiceStub(channel)
                described = stub.Describe(pb.DescribeRequest(), timeout=60)
            assert list(described.models) == ["qwen-tied"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            assert process.stdout.read() == ""
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model", "no/such/folder"], "is not a folder"),
        (["--model", "{model}", "--listen", "0.0.0.0:0"], "--insecure-plaintext"),
        (["--model", "{model}", "--listen", "[::]:0"], "--insecure-plaintext"),
        (["--model", "{model}", "--model", "{model}"], "two model folders"),
        (["--model", "{model}", "--threads", "0"], "--threads"),
        (["--model", "{model}", "--parent", "1"], "parent"),
        (["--model", "{model}", "--listen", "127.0.0.1:99999"], "port"),
    ],
)
def test_options_that_cannot_work(model_folders: dict[str, Path], options: list[str], complaint: str) -> None:
    filled = [option.format(model=model_folders["qwen-tied"]) for option in options]
    done = subprocess.run(_command(*filled), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_address_in_use_is_said(model_folders: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        command = _command("--model", str(model_folders["qwen-tied"]), "--listen", listen)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot listen" in done.stderr.splitlines()[-1]


def test_a_stream_that_is_open_when_the_worker_stops_makes_no_noise(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The stream ends, its caches are dropped, and nothing in the log looks like a failure."""
    command = _command("--listen", f"unix:{tmp_path}/socket", "--model", str(model_folders["qwen-tied"]))
    frames: SimpleQueue[pb.ExecuteRequest | None] = SimpleQueue()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            with grpc.insecure_channel(process.stdout.readline().split()[-1]) as channel:
                stub = gpu_worker_pb2_grpc.GpuWorkerServiceStub(channel)
                stub.Load(pb.LoadRequest(model="qwen-tied", precision=pb.PRECISION_INT8), timeout=120)
                answers = stub.Execute(iter(frames.get, None))
                reserve = pb.Reserve(tokens=8, type=pb.KV_TYPE_FLOAT16)
                cache = pb.Operation(cache=pb.Cache(sequence=1, reserve=reserve))
                frames.put(pb.ExecuteRequest(id=1, operation=cache))
                assert next(answers).id == 1
                process.send_signal(signal.SIGTERM)
                _, log = process.communicate(timeout=20)
                frames.put(None)
            assert process.returncode == 0
            assert "ERROR" not in log
            assert "Traceback" not in log
        finally:
            process.kill()
