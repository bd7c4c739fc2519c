"""What a view shows of the model's own quantities, whichever way it shows it: inputs, queries, keys, values.

Integers of split come at a secret scale per row, which hides nothing: a normed row divided by the public gain has a
root mean square of 1. On masked words the same code runs as well, and gives noise. What a permutation or another
transform changed stays changed.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evaluation.attacks.knowledge import Knowledge
from evaluation.attacks.view import View
from wire.linears import Linear
from wire.parameters import Kind, Name

F32 = npt.NDArray[np.float32]
HEADS = ("q", "k", "v")  # before RoPE


def part(view: View, known: Knowledge, what: str, layer: int, prompts: Sequence[int]) -> F32 | None:
    """input [rows, hidden], or q [rows, H, d], k or v [rows, K, d], of some prompts; None where it cannot be seen.

    `input` is what enters qkv.
    """
    if what == "input":
        return _input(view, known, layer, prompts)
    if view.has("qkv", layer):
        by = known.model.scales(layer, Linear.QKV) * scale(view.rows("input", layer, prompts), known, layer)
        y = view.rows("qkv", layer, prompts) * by + known.model.bias(layer, Linear.QKV)
        return known.model.split(y.astype(np.float32))[HEADS.index(what)]
    if what == "v":
        return view.rows("v", layer, prompts) if view.has("v", layer) else None
    if not view.has("qk", layer):
        return None
    qk, c = view.rows("qk", layer, prompts), known.model.config
    half = qk[:, : c.q_width] if what == "q" else qk[:, c.q_width :]
    return half.reshape(len(half), -1, c.head_dim)


def rotated_keys(view: View, known: Knowledge, layer: int, prompts: Sequence[int]) -> F32 | None:
    """k after RoPE [rows, K, d], as it was cached, or, of caches that were wiped, as it came back; None: not seen."""
    if view.has("cache_k", layer) and not view.has("wiped_k", layer):
        return view.rows("cache_k", layer, prompts)
    if not view.has("qk_returned", layer):
        return None
    c, qk = known.model.config, view.rows("qk_returned", layer, prompts)
    return qk[:, c.q_width :].reshape(len(qk), -1, c.head_dim)


def victims(view: View, known: Knowledge, what: str, layer: int) -> F32 | None:
    """The victims' rows behind their prefix."""
    found = [part(view, known, what, layer, [number]) for number in known.victims]
    if any(one is None for one in found):
        return None
    return np.concatenate([one[len(known.prefix) :] for one in found if one is not None])


def _input(view: View, known: Knowledge, layer: int, prompts: Sequence[int]) -> F32 | None:
    if view.has("input", layer):
        x = view.rows("input", layer, prompts)
        by = 1 if np.issubdtype(x.dtype, np.floating) else scale(x, known, layer)
        return (x * by).astype(np.float32)
    if not view.has("residual", layer):
        return None
    return known.model.normed(view.rows("residual", layer, prompts), Name(Kind.ATTENTION_NORM, layer))


def scale(x: npt.NDArray[np.generic], known: Knowledge, layer: int) -> npt.NDArray[np.float64]:
    """float64[rows, 1], by which integers of an input are to be multiplied."""
    gain = known.model.parameter(Name(Kind.ATTENTION_NORM, layer))[:, 0].astype(np.float64)
    bare = np.divide(x, gain, out=np.zeros(x.shape), where=gain != 0)
    result: npt.NDArray[np.float64] = 1 / np.sqrt((bare**2).mean(axis=1, keepdims=True) + 1e-30)
    return result
