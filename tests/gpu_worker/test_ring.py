"""Where ring products of a loaded model are computed: numba on the CPU, what kernels/cuda.py chose anywhere else."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gpu_worker.kernels import cuda
from gpu_worker.model import Model
from gpu_worker.ring import Ring
from tests.gpu_worker.calling import HIDDEN, MODEL, TIED, VOCABULARY
from wire.linears import Linear
from wire.v1 import gpu_worker_pb2 as pb

I32 = npt.NDArray[np.int32]
RANDOM = np.random.default_rng(5)
Z = RANDOM.integers(-(1 << 31), 1 << 31, (3, HIDDEN)).astype(np.int32)
MASKED = RANDOM.integers(-(1 << 31), 1 << 31, (3, VOCABULARY)).astype(np.int32)


class Device(cuda.GemmProducts):
    """A device whose memory is the CPU's; keeps what it was warmed up for and counts its products."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.products = "a device", 0
        self.warm: list[tuple[int, ...]] = []

    def matmul(self, z: I32, w: torch.Tensor) -> I32:
        self.products += 1
        return super().matmul(z, w)

    def lookup(self, z: I32, table: torch.Tensor) -> I32:
        self.products += 1
        return super().lookup(z, table)

    def warm_up(self, w: torch.Tensor) -> None:
        self.warm.append(tuple(w.shape))


@pytest.fixture(params=[MODEL, TIED])
def rings(
    request: pytest.FixtureRequest, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> list[Ring]:
    """Of one model: on the CPU, and on the device."""
    here = Model(model_folders[request.param], pb.PRECISION_INT8, "cpu", ring_only=True).ring
    assert here is not None
    monkeypatch.setattr(cuda, "products", lambda device: Device())
    return [here, Ring(here._config, here._parameters, "cuda")]


def test_a_device_has_the_bits_of_the_cpu(rings: list[Ring]) -> None:
    here, there = rings
    for linear in (Linear.QKV, Linear.GATE_UP, Linear.LM_HEAD):
        layer = 0 if linear is Linear.LM_HEAD else 1
        np.testing.assert_array_equal(there.product(layer, linear, Z), here.product(layer, linear, Z))
    np.testing.assert_array_equal(there.lookup(MASKED), here.lookup(MASKED))
    assert isinstance(there._products, Device)
    assert there._products.products == 4
    assert (here.kernel, there.kernel) == ("numba", "a device")


def test_a_device_is_warmed_up_for_every_kind_of_product(rings: list[Ring]) -> None:
    here, there = rings
    for ring in rings:
        ring.warm_up()
    assert isinstance(there._products, Device)
    assert len(there._products.warm) == 6
    assert there._products.warm[4:] == [(VOCABULARY, HIDDEN), (HIDDEN, VOCABULARY)]
    assert here._products is None
