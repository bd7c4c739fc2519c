"""How alike two prompts of equal length are, whatever lies over them: no weights, no text, only what crossed.

For each group of transforms a form that it leaves, taken at every place that is seen, head by head where there are any:

(1) words: how many are equal, for anything deterministic;
(2) rows: the cosine, for anything deterministic up to noise and scale;
(3) sorted rows, for a fresh permutation of dims;
(4) the space that the rows span, for a fresh mixing of rows, orthogonal or not, and a fixed transform of dims;
(5) the singular values, for a fresh orthogonal mixing of rows and a fresh rotation of dims.

Of (2) to (5) the logarithm of the distance is taken, so that one place where two prompts agree outweighs many where
they do not.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evaluation.attacks.embedding import unit
from evaluation.attacks.view import View
from evaluation.transcript import Array

F32 = npt.NDArray[np.float32]
FORMS = ("equal words", "rows", "sorted rows", "row spaces", "singular values")


def likeness(view: View, ones: Sequence[int], others: Sequence[int]) -> dict[str, F32]:
    """For each form [ones, others], the mean over all places: larger is more alike. Empty where nothing is seen."""
    found = [_at(view, place, ones, others) for place in view.prompts[0]] if view.prompts else []
    return {form: np.mean([one[form] for one in found], axis=0) for form in FORMS} if found else {}


def _at(view: View, place: tuple[str, int], ones: Sequence[int], others: Sequence[int]) -> dict[str, F32]:
    a, b = (np.stack([_heads(view.prompts[number][place]) for number in numbers]) for numbers in (ones, others))
    x, y = a.astype(np.float32), b.astype(np.float32)
    (spanned, values), (spanned_too, values_too) = _spectra(x), _spectra(y)
    return {
        "equal words": _equal(a, b),
        "rows": _near(1 - _cosines(unit(x), unit(y))),
        "sorted rows": _near(1 - _cosines(unit(np.sort(x, axis=-1)), unit(np.sort(y, axis=-1)))),
        "row spaces": _near(1 - _overlaps(spanned, spanned_too)),
        "singular values": _near(np.linalg.norm(values[:, None] - values_too[None], axis=-1)),
    }


def _heads(rows: Array) -> Array:
    """[rows, width] or [rows, heads, d] -> [heads, rows, width]."""
    return rows[None] if rows.ndim == 2 else np.moveaxis(rows, 1, 0)


def _equal(a: Array, b: Array) -> F32:
    """(1) The share, [ones, others]."""
    flat = b.reshape(len(b), -1)
    return np.array([(flat == one.reshape(1, -1)).mean(axis=1) for one in a], np.float32)


def _cosines(x: F32, y: F32) -> F32:
    """(2), (3): of rows of length 1, one beside the other, the mean."""
    result: F32 = x.reshape(len(x), -1) @ y.reshape(len(y), -1).T / np.float32(np.prod(x.shape[1:3]))
    return result


def _spectra(x: F32) -> tuple[F32, F32]:
    """[n, heads, rows, width] -> an orthonormal basis of the rows' space, and singular values, together of length 1."""
    wide = x.astype(np.float64)
    energies, turns = np.linalg.eigh(wide @ np.swapaxes(wide, -1, -2))
    energies = np.maximum(energies, 0)
    spanned = energies > 1e-9 * energies.max(axis=-1, keepdims=True)
    scale = np.where(spanned, 1 / np.sqrt(np.where(spanned, energies, 1)), 0)
    basis = scale[..., None] * (np.swapaxes(turns, -1, -2) @ wide)
    return basis.astype(np.float32), unit(np.sqrt(energies)).reshape(len(x), -1).astype(np.float32)


def _overlaps(a: F32, b: F32) -> F32:
    """(4) The share of one space that lies in the other."""
    found = np.zeros((len(a), len(b)), np.float32)
    for head in range(a.shape[1]):
        products = a[:, head].reshape(-1, a.shape[-1]) @ b[:, head].reshape(-1, a.shape[-1]).T
        found += (products.reshape(len(a), a.shape[2], len(b), -1) ** 2).sum(axis=(1, 3))
    result: F32 = found / (a.shape[1] * a.shape[2])
    return result


def _near(distances: F32) -> F32:
    """Larger is nearer; below float32's precision all are alike."""
    result: F32 = -np.log(np.maximum(distances, np.float32(1e-6)))
    return result
