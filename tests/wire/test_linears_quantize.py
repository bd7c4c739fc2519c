"""The int8 rule, row by row, and the shapes of the linears that it is for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.model_folders import MODELS
from tests.simulators.workers import read_weight
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError
from wire.linears import BLOCK, Linear, all_specs, spec
from wire.model_config import ModelConfig
from wire.parameters import parameters, tiles, weight_name
from wire.quantize import quantize_rows

CASES = settings(deadline=None, max_examples=100, derandomize=True)
F32 = npt.NDArray[np.float32]
TINY = float(np.finfo(np.float32).tiny)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=finite)


def _check_rule(weight: F32) -> None:
    """Integers in range, the largest of each row at 127, and at most half a step of error."""
    with np.errstate(all="raise", under="ignore"):
        quantized, scale = quantize_rows(weight)
    assert quantized.dtype == np.int8
    assert scale.dtype == np.float32
    assert scale.shape == (len(weight),)
    wide, step = weight.astype(np.float64), scale.astype(np.float64)[:, None]
    assert np.abs(quantized.astype(np.int64)).max() <= 127
    assert np.isfinite(scale).all()
    assert (scale >= 0).all()
    error = np.abs(quantized * step - wide)
    rounding = 127 * (2.0**-23 * step + 2.0**-150)  # of s_w itself, in float32
    lost = np.where(step == 0, 1.001e-36, 0.0)  # rows so small that they count as zero
    assert np.all(error <= step / 2 + 2 * rounding + lost)
    for row, of in zip(quantized, step[:, 0], strict=True):
        assert (np.abs(row.astype(np.int64)).max() == 127) == (of > 0)


@given(matrices)
@CASES
def test_the_rule_holds_for_any_finite_weights(weight: F32) -> None:
    _check_rule(weight)


@pytest.mark.parametrize("exponent", [*range(-45, -29), -20, 0, 20, 38])
def test_the_rule_holds_at_every_magnitude(exponent: int) -> None:
    """From subnormal rows to the largest float32; 127 / peak must not overflow on the way."""
    row = np.array([[1.0, -0.5, 0.0, 0.3], [-1.0, 0.9, 0.0, 0.0]]) * 10.0**exponent
    _check_rule(row.astype(np.float32))


@given(matrices, st.integers(1, 13))
@CASES
def test_tiles_of_any_number_of_rows_give_the_same_integers(weight: F32, rows: int) -> None:
    with np.errstate(all="ignore"):
        quantized, scale = quantize_rows(weight)
        for first in range(0, len(weight), rows):
            tile, part = quantize_rows(weight[first : first + rows])
            assert (tile == quantized[first : first + rows]).all()
            assert (part == scale[first : first + rows]).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-45, TINY / 2])
def test_zero_and_subnormal_rows_are_zero_with_scale_zero(value: float) -> None:
    weight = np.ones((3, 4), np.float32)
    weight[1] = value
    quantized, scale = quantize_rows(weight)
    assert not quantized[1].any()
    assert scale[1] == 0
    assert (quantized[[0, 2]] == 127).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = np.ones((3, 4), np.float32)
    weight[2, 1] = value
    with pytest.raises(CheckpointError, match="not finite"):
        quantize_rows(weight)


def test_the_largest_negative_weight_is_minus_127() -> None:
    quantized, scale = quantize_rows(np.array([[-2.54, 1.27, 0.01]], np.float32))
    assert quantized.tolist() == [[-127, 64, 0]]
    assert scale[0] == pytest.approx(0.02)


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_is_named_once_in_the_order_of_a_forward_pass(
    model_folder: Callable[[str], Path], name: str
) -> None:
    config = ModelConfig.from_hf(model_folder(name))
    specs = all_specs(config)
    expected = [(layer, linear) for layer in range(config.layers) for linear in BLOCK]
    assert [(s.layer, s.linear) for s in specs] == [*expected, (0, Linear.LM_HEAD)]
    assert len(set(specs)) == len(specs)
    assert specs == [spec(config, s.layer, s.linear) for s in specs]
    for one in specs:
        stored = parameters(config)[weight_name(config, one)]
        assert (stored.rows, stored.width) == (one.n, one.k)


def test_the_shapes_of_a_gated_and_of_an_ungated_model(model_folder: Callable[[str], Path]) -> None:
    shapes = {
        name: [(one.n, one.k) for one in all_specs(ModelConfig.from_hf(model_folder(name)))[-5:]]
        for name in ("qwen3", "gpt2")
    }
    assert shapes["qwen3"] == [(96 + 2 * 48, 64), (64, 96), (2 * 176, 64), (64, 176), (301, 64)]
    assert shapes["gpt2"] == [(3 * 64, 64), (64, 64), (176, 64), (64, 176), (301, 64)]


@pytest.mark.parametrize("name", MODELS)
def test_quantising_tile_by_tile_gives_the_integers_of_the_whole_linear(
    model_folder: Callable[[str], Path], name: str
) -> None:
    folder = model_folder(name)
    config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
    one = all_specs(config)[0]
    whole, scale = quantize_rows(read_weight(checkpoint, config, one))
    for rows in (1, 5, 50):
        for first, tile in tiles(checkpoint, parameters(config)[weight_name(config, one)], rows):
            quantized, part = quantize_rows(tile)
            assert (quantized == whole[first : first + len(tile)]).all()
            assert (part == scale[first : first + len(tile)]).all()
