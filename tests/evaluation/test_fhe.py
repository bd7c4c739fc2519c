"""One linear in three ways, with a simulator of the little of TenSEAL that is used; and with TenSEAL where it is."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from evaluation import fhe
from evaluation.bench_tables import fhe_table
from wire.errors import ExhaustedError, PreconditionError

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


class Vector:
    """A "ciphertext" that can be multiplied and opened, with a little noise."""

    def __init__(self, values: list[float]) -> None:
        self._values = np.array(values)

    def matmul(self, columns: list[list[float]]) -> "Vector":
        return Vector(list(self._values @ np.array(columns) + 1e-5))

    def decrypt(self) -> list[float]:
        return list(self._values)

    def serialize(self) -> bytes:
        return bytes(5 * len(self._values))


class Context:
    """What keys are made for."""

    def __init__(self, kind: str, poly_modulus_degree: int, coeff_mod_bit_sizes: list[int]) -> None:
        assert (kind, poly_modulus_degree, coeff_mod_bit_sizes) == ("ckks", 4096, [38, 30, 38])
        self.global_scale, self.keys = 0.0, False

    def generate_galois_keys(self) -> None:
        self.keys = True


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def encrypt(context: Context, values: list[float]) -> Vector:
        assert context.keys
        assert context.global_scale == 2**30
        return Vector(values)

    module: Any = ModuleType("tenseal")
    module.SCHEME_TYPE, module.context, module.ckks_vector = type("Kinds", (), {"CKKS": "ckks"}), Context, encrypt
    module.__version__ = "0"
    monkeypatch.setitem(sys.modules, "tenseal", module)


@pytest.mark.usefixtures("simulated")
def test_all_ways_give_the_product_and_stand_beside_each_other() -> None:
    pytest.importorskip("numba")
    found = json.loads(json.dumps(fhe.measure(DEMO, 2, lambda *_: None)))
    assert [one["way"] for one in found["ways"]] == [fhe.CLEAR, fhe.PADDED, fhe.MAKING, fhe.CKKS]
    clear, padded, making, ckks = found["ways"]
    assert (found["inputs"], found["outputs"]) == (256, 256)
    assert clear["of_clear"] == 1
    assert clear["error"] < 1e-5 < padded["error"] == making["error"] < 0.05
    assert 0 < ckks["error"] < 1e-3
    assert (padded["bytes_up"], padded["bytes_down"], ckks["bytes_up"]) == (1024, 1024, 1280)
    assert found["ckks_of_masked"] == ckks["seconds"] / padded["seconds"]
    text = fhe_table(found | {"model": "demo", "machine": "m", "repeat": 2})
    assert "256 x 256" in text
    assert sum(line.startswith("| ") for line in text.splitlines()) == 1 + 4


def test_without_tenseal_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(PreconditionError, match=r"pip install 'cleave\[fhe\]'"):
        fhe.measure(DEMO, 1, lambda *_: None)


def test_a_row_lies_twice_in_the_slots() -> None:
    assert [fhe.degree_for(inputs) for inputs in (1, 896, 1024, 1025, 4096)] == [4096, 4096, 4096, 8192, 16384]
    with pytest.raises(ExhaustedError, match="rows of 4096 values at most"):
        fhe.degree_for(4097)


def test_the_first_projection_is_the_model_s() -> None:
    assert fhe.first_projection(DEMO).shape == (256, 256)


def test_the_real_library_multiplies() -> None:
    pytest.importorskip("tenseal")
    weight = np.random.default_rng(0).standard_normal((24, 32)).astype(np.float32)
    x = np.linspace(-1, 1, 32, dtype=np.float32)
    assert np.abs(fhe.Encrypted(weight).product(x) - weight @ x).max() < 1e-2
