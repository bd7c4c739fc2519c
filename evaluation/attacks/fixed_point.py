"""Step 1 of secure-infer as an attacker writes it down: how a row becomes integers is public, only the row is not.

The scale of a row is chosen as fine as the ring allows, by its norms and by the weights that it meets. So whoever knows
a token knows the integers that enter layer 0 for it, scale and all.
"""

import numpy as np
import numpy.typing as npt

from evaluation.attacks.public_model import PublicModel
from wire.linears import Linear
from wire.parameters import Kind, Name
from wire.quantize import quantize_rows

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

X_LIMIT, Y_LIMIT = 1 << 24, 1 << 30
AT_ONCE = 1 << 12  # rows


def integers(model: PublicModel, x: F32, layer: int = 0) -> I32:
    """What enters qkv of a layer for rows [m, hidden] of its input, int32 [m, hidden]."""
    result: I32 = np.empty(x.shape, np.int32)
    length = max_length(model, layer)
    for start in range(0, len(x), AT_ONCE):
        wide = x[start : start + AT_ONCE].astype(np.float64)
        result[start : start + AT_ONCE] = np.rint(wide * factors(wide, length)[:, None])
    return result


def factors(x: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    """1 / s_x of each row. `length`: of the longest row of the weights, squared."""
    by_one = Y_LIMIT / 127 - 0.5 * x.shape[1] - 1
    by_two = ((Y_LIMIT**2 - 1) // max(length, 1)) ** 0.5 - 0.5 * x.shape[1] ** 0.5 - 1
    peak, ones, squares = np.abs(x).max(axis=1), np.abs(x).sum(axis=1), np.sqrt((x**2).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        finest = np.minimum((X_LIMIT - 1) / peak, np.maximum(by_one / ones, by_two / squares)) * (1 - 1e-6)
    return np.where(peak > 0, finest, 0.0)


def max_length(model: PublicModel, layer: int) -> int:
    """The largest ||W_q row||^2 of qkv."""
    w_q = quantize_rows(model.weight(layer, Linear.QKV))[0].astype(np.int64)
    return int((w_q**2).sum(axis=1).max())


def vocabulary(model: PublicModel) -> I32:
    """The integers that enter layer 0 for every token at int8, int32 [vocabulary, hidden]: all in float32."""
    rows, scale = quantize_rows(model.embedding)
    x = rows * scale[:, None]
    gain = model.parameter(Name(Kind.ATTENTION_NORM, 0))[:, 0]
    inverse = 1.0 / np.sqrt((x * x).mean(axis=1, keepdims=True) + np.float32(model.config.norm_eps))
    return integers(model, x * inverse * gain)
