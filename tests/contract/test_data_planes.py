"""Schemes over both data planes of a real GPU worker: the same bits, and the same refusal of lies."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import build, forward, one_run
from tests.simulators.served import served
from trusted_worker.offload import GpuWorker
from wire.errors import UnavailableError, VerificationError
from wire.model_config import ModelConfig
from wire.settings import stream_beside
from wire.v1 import gpu_worker_pb2 as pb

PROMPT = [int(token) for token in np.random.default_rng(3).integers(0, 300, 12)]
PLANES = ("grpc", "stream")


@pytest.mark.parametrize("scheme", ["split", "secure-infer"])
def test_both_planes_carry_the_same_bits(model_folder: Callable[[str], Path], tmp_path: Path, scheme: str) -> None:
    folder = model_folder("qwen2")
    reference = build(folder, "tee-only").logits(PROMPT, [5, 7])
    with served(folder, tmp_path) as gpu:
        for plane in PLANES:
            client = gpu.client(plane)
            rig = build(folder, scheme, worker=lambda *_, client=client: client)
            assert np.array_equal(rig.logits(PROMPT, [5, 7]), reference)
            assert client.traffic.exchanges > 0
            client.close()
        assert gpu.traffic.sockets.calls == gpu.traffic.grpc.calls - 2  # with a Load for each plane
        assert gpu.traffic.sockets.received == gpu.traffic.grpc.received


@pytest.mark.parametrize("plane", PLANES)
def test_a_lie_is_the_same_error_on_both_planes(
    model_folder: Callable[[str], Path], tmp_path: Path, plane: str
) -> None:
    def flip(answer: Any) -> Any:
        answer = answer.copy()
        answer[-1, -1] ^= 1
        return answer

    folder = model_folder("llama")
    with served(folder, tmp_path) as gpu:
        client = gpu.client(plane)
        rig = build(folder, "secure-infer", worker=lambda *_: client)
        honest = rig.logits(PROMPT, [12])
        gpu.cheat = flip
        with pytest.raises(VerificationError) as caught:
            forward(rig.scheme, one_run(rig.scheme.open(16), PROMPT, 0))
        assert str(caught.value) == str(VerificationError())
        gpu.cheat = None
        rig.scheme.distrust()
        assert np.array_equal(rig.logits(PROMPT, [12]), honest)
        client.close()


def test_a_worker_that_is_killed_within_a_call_is_unavailable(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """And the one in its place is used, on a socket whose name the dead one left behind."""
    folder, listen = model_folder("llama"), f"unix:{tmp_path}/gpu"
    config = ModelConfig.from_hf(folder)
    client = GpuWorker(listen, config.name, pb.PRECISION_INT8, connect_seconds=60, stream=stream_beside(listen))
    z, operation = (
        np.zeros((2, config.hidden), np.int32),
        pb.Operation(ring_matmul=pb.RingMatmul(linear=pb.LINEAR_LM_HEAD)),
    )
    into = np.empty((2, config.vocabulary), np.int32)
    for last in (False, True):
        gpu = _start(folder, listen)
        try:
            client.connect(patient=True)
            client.call(operation, z, into)
            if not last:
                os.kill(gpu.pid, signal.SIGSTOP)
                killer = threading.Timer(0.2, gpu.kill)
                killer.start()
                with pytest.raises(UnavailableError):
                    client.call(operation, z, into)
                killer.join()
        finally:
            gpu.kill()
            gpu.wait()
    client.close()


def _start(folder: Path, listen: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gpu_worker", "--listen", listen, "--model", str(folder), "--threads", "1"]
    return subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
