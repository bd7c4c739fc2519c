"""The one rule for int8 weights: symmetric per output row, W_q = round(W * (127 / max|row|)), s_w = max|row| / 127.

Rows are independent, so a tile of rows gives the same integers as the whole matrix. Both workers run this file.
"""

import numpy as np
import numpy.typing as npt

from wire.errors import CheckpointError

SMALLEST_PEAK = np.float32(1e-36)  # below, 127 / peak would leave float32


def quantize_rows(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """float32[n, k] -> (int8[n, k] in [-127, 127], float32[n] scales); a row below SMALLEST_PEAK is zero.

    Raises CheckpointError for weights that are not finite.
    """
    peak = np.maximum(weight.max(axis=1), -weight.min(axis=1))
    if not np.isfinite(peak).all():
        raise CheckpointError("the checkpoint holds weights that are not finite")
    scale = peak / np.float32(127)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > SMALLEST_PEAK)
    scale[inverse == 0] = 0
    rounded = weight * inverse[:, None]
    np.rint(rounded, out=rounded)
    return np.clip(rounded, -127, 127, out=rounded).astype(np.int8), scale
