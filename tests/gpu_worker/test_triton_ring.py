"""The Triton kernel has the bits that int64 gives: on the device at hand, or, without one, in Triton's interpreter.

The interpreter must be asked for before triton is imported. It knows neither saturation nor shared memory; what it
does not show is calculated here (sums that cannot saturate) or left to `python -m gpu_worker.kernels.cuda --check`.
"""

import importlib
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.kernels import cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
triton_ring: Any = pytest.importorskip(
    "gpu_worker.kernels.triton_ring", reason="triton is not installed: it comes with CUDA builds of torch"
)

EXTREMES = np.array([-(1 << 31), (1 << 31) - 1, -1, 0, 1, 127, 128, -128, -129, 0x7FFF8000, -0x7F7F7F80], np.int32)
SMALL, LARGE = triton_ring.Device(8, 99 << 10), triton_ring.Device(132, 227 << 10)
timing: Any = importlib.import_module("gpu_worker.kernels.timing")
ALL_TILES = [*(tile for tiles in triton_ring.TILES.values() for tile in tiles), *timing.OTHER_TILES]
SIZES = [
    (896, 1152),
    (896, 896),
    (896, 9728),
    (4864, 896),
    (896, 151_936),
    (151_936, 896),
    (18_944, 3584),
    (1, 1),
    (7, 9),
]

I32 = npt.NDArray[np.int32]
I8 = npt.NDArray[np.int8]


def _operands(m: int, k: int, n: int, seed: int = 0) -> tuple[I32, I8, I32]:
    """z, w[n, k] and z.w^T as int64 gives it; a tenth of the words are extreme ones."""
    random = np.random.default_rng((seed, m, k, n))
    z = random.integers(-(1 << 31), 1 << 31, (m, k)).astype(np.int32)
    z = np.where(random.random((m, k)) < 0.1, random.choice(EXTREMES, (m, k)), z)
    w = random.integers(-128, 128, (n, k)).astype(np.int8)
    return z, w, (z.astype(np.int64) @ w.astype(np.int64).T).astype(np.int32)


def _poisoned(z: I32, w: I8, how: Any) -> tuple[I32, I32]:
    """Both products into memory full of something else: of w as a linear, and of a table that lies row by row."""
    m, answers = len(z), []
    for b in (torch.from_numpy(w).to(DEVICE).t(), torch.from_numpy(np.ascontiguousarray(w.T)).to(DEVICE)):
        y = torch.full((m + 1, len(w)), -559038737, dtype=torch.int32, device=DEVICE)
        planes = torch.full((4 * m + 1, z.shape[1]), 77, dtype=torch.int8, device=DEVICE)
        triton_ring.multiply(torch.from_numpy(z).to(DEVICE), b, y[:m], planes[: 4 * m], how)
        assert (y[m] == -559038737).all()
        assert (planes[4 * m] == 77).all()
        answers.append(y[:m].cpu().numpy())
    return answers[0], answers[1]


@pytest.mark.parametrize("m", range(1, 41))
def test_any_number_of_rows(m: int) -> None:
    k, n = 100 + 13 * m, 20 + 3 * m
    z, w, expected = _operands(m, k, n)
    for answer in _poisoned(z, w, triton_ring.plan(m, k, n, SMALL)):
        np.testing.assert_array_equal(answer, expected)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 2), (31, 129), (128, 64), (129, 65), (255, 33), (256, 1), (1025, 31)])
@pytest.mark.parametrize("m", [1, 4, 16, 19, 64, 65])
def test_edges_of_tiles(m: int, k: int, n: int) -> None:
    z, w, expected = _operands(m, k, n)
    for answer in _poisoned(z, w, triton_ring.plan(m, k, n, SMALL)):
        np.testing.assert_array_equal(answer, expected)


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("tile", ALL_TILES, ids=lambda tile: "x".join(map(str, tile[:5])))
def test_every_tile_with_k_shared_and_not(tile: Any, parts: int) -> None:
    m, k, n = tile.rows + 3, 5 * tile.depth - 40, tile.columns + 7
    z, w, expected = _operands(m, k, n)
    for answer in _poisoned(z, w, triton_ring.Plan(tile, triton_ring.share_of(k, parts, tile))):
        np.testing.assert_array_equal(answer, expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 70),
    st.sampled_from([-128, -127, 127, 0]),
    st.integers(0, 99),
)
def test_extreme_words_wrap_around(m: int, k: int, n: int, weight: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    z = random.choice(EXTREMES, (m, k))
    w = np.where(random.random((n, k)) < 0.5, weight, random.integers(-128, 128, (n, k))).astype(np.int8)
    expected = (z.astype(np.int64) @ w.astype(np.int64).T).astype(np.int32)
    for answer in _poisoned(z, w, triton_ring.plan(m, k, n, SMALL)):
        np.testing.assert_array_equal(answer, expected)


def test_a_table_that_no_block_may_sum() -> None:
    z, w, expected = _operands(2, 2 * triton_ring.MAX_SHARE + 100, 3)
    for answer in _poisoned(z, w, triton_ring.plan(2, z.shape[1], 3, triton_ring.Device(1, 99 << 10))):
        np.testing.assert_array_equal(answer, expected)


@pytest.mark.parametrize("device", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("m", [1, 3, 4, 5, 16, 17, 32, 33, 64, 256, 1024])
def test_plans(m: int, device: Any) -> None:
    """Tiles fit the device; k is cut into whole steps; no sum reaches 2^31, where it would saturate."""
    for k, n in SIZES:
        tile, share = triton_ring.plan(m, k, n, device)
        assert tile.shared <= device.shared
        assert share % tile.depth == 0
        assert 128 * 128 * share < 1 << 31
        blocks = -(-m // tile.rows) * -(-n // tile.columns)
        if share < k and share < triton_ring.MAX_SHARE:
            assert blocks * (k // share) <= triton_ring.BLOCKS_PER_PROCESSOR * device.processors
            assert share >= triton_ring.STEPS * tile.depth


def test_few_rows_are_split_in_the_kernel_and_many_before() -> None:
    assert not any(triton_ring.plan(m, 896, 1152, LARGE).tile.planes for m in range(1, 33))
    assert all(triton_ring.plan(m, 896, 1152, LARGE).tile.planes for m in (33, 64, 256))


def test_planes_are_the_digits() -> None:
    z, _, _ = _operands(3, 1500, 1)
    planes = torch.full((12, 1500), 77, dtype=torch.int8, device=DEVICE)
    words = torch.from_numpy(z).to(DEVICE)
    triton_ring._split[(3, 2)](words, planes, 1500, BLOCK=triton_ring.SPLIT_BLOCK)
    assert torch.equal(planes.reshape(3, 4, 1500).permute(1, 0, 2), cuda.digits(words))


def test_operands_may_lie_anyhow() -> None:
    z, w, expected = _operands(6, 70, 50)
    wide = torch.zeros((100, 140), dtype=torch.int8, device=DEVICE)
    wide[::2, ::2] = torch.from_numpy(w).to(DEVICE)
    turned = torch.from_numpy(np.ascontiguousarray(z.T)).to(DEVICE).t()
    np.testing.assert_array_equal(triton_ring.ring_product(turned, wide[::2, ::2].t()).cpu().numpy(), expected)


def test_operands_that_do_not_fit_are_refused() -> None:
    z, b = torch.zeros((2, 8), dtype=torch.int32), torch.zeros((8, 3), dtype=torch.int8)
    for bad_z, bad_b in ((z[:, :7], b), (z.long(), b), (z, b.int()), (z[0], b), (z[:0], b), (z, b[:, :0])):
        with pytest.raises(ValueError, match="operands"):
            triton_ring.ring_product(bad_z, bad_b)


@pytest.mark.parametrize("m", [1, 16, 40])
def test_the_choice_falls_on_it_and_its_self_check_passes(m: int) -> None:
    found = cuda.products(DEVICE)
    assert found.name.startswith("triton")
    found.warm_up(torch.zeros((9, 40), dtype=torch.int8, device=DEVICE))
    assert cuda.check_shape(m, 130, 37, DEVICE, found)


def test_the_self_check_notices_a_wrong_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found, right = cuda.products(DEVICE), triton_ring.multiply

    def wrong(z: Any, b: Any, y: torch.Tensor, planes: Any, how: Any) -> None:
        right(z, b, y, planes, how)
        y[-1, -1] ^= 1

    monkeypatch.setattr(triton_ring, "multiply", wrong)
    assert not cuda.check_shape(3, 130, 37, DEVICE, found)
    assert "wrong words" in cuda.products(DEVICE).name


@pytest.fixture
def small_timing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tables over one small linear; what is timed runs once and takes as many microseconds as there are copies."""

    def once(works: list[Any]) -> float:
        for work in works:
            work()
        return float(len(works))

    monkeypatch.setattr(timing, "microseconds", once)
    shapes = (timing.Shape("tiny", "qkv", 256, 24), timing.Shape("tiny", "lookup", 256, 24))
    monkeypatch.setattr(timing, "SHAPES", shapes)
    monkeypatch.setattr(timing, "ROWS", (1, 33, 257))
    monkeypatch.setattr(timing, "CACHE_BYTES", 256 * 24 * 2)
    return timing


def test_the_table_of_times_stands_beside_bfloat16(small_timing: Any) -> None:
    lines = list(small_timing.table(cuda.products(DEVICE)))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:-2]]
    cases = [["tiny", "qkv", "1"], ["tiny", "qkv", "33"], ["tiny", "qkv", "257"], ["tiny", "lookup", "1"]]
    assert [row[:3] for row in cells] == [*cases, ["tiny", "lookup", "33"]]
    assert all(len(row) == lines[0].count("|") - 1 for row in cells)
    assert [row[4:7] for row in cells] == [["2.0", "1.0", "2.00"]] * 5
    assert cells[0][9].isdecimal()
    assert cells[2][9:] == ["", ""]
    assert lines[-1].endswith(": tiny qkv 1: 2.00; tiny lookup 1: 2.00")


def test_the_best_tile_stands_beside_the_planned_one(small_timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_timing, "CACHE_BYTES", 1)
    monkeypatch.setattr(small_timing, "ROWS", (1, 33))
    lines = list(small_timing.tiles())
    assert len(lines) == 2 + 4
    assert "| 4x32x256/4 words, 1 |" in lines[2]
    assert all("planes" in line for line in (lines[3], lines[5]))


def test_one_command_checks_and_measures(
    small_timing: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a machine with a device, whose memory is the CPU's if it is none."""
    found = cuda.products(DEVICE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(small_timing, "_device", lambda: DEVICE)
    monkeypatch.setattr(cuda, "products", lambda device: found)
    monkeypatch.setattr(cuda, "check_shape", lambda m, k, n, device, one: one is not found or m != 17)
    monkeypatch.setattr(small_timing, "tiles", lambda: ["a line of tiles"])
    monkeypatch.setattr("sys.argv", ["check", "--check", "--time", "--tune"])
    assert cuda.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ring products on a device: triton with CUDA graphs"
    assert sum(line.startswith("MISMATCH at (m, k, n) = (17, ") for line in lines) == 5
    assert any(line.startswith("int8 GEMM of torch: ") for line in lines)
    assert any(line.startswith("| tiny | lookup | 33 |") for line in lines)
    assert lines[-1] == "a line of tiles"
