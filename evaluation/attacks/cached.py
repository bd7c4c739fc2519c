"""The cache alone: what somebody reads who copies the GPU worker's caches, at one moment, and saw nothing else.

Source: KV-Shield's own adversary (arXiv 2409.04040), and "Shadow in the Cache" (arXiv 2508.09442). Reads: V of layer 0
in the caches, at their last moment (`copied`, `linked`) or while their conversations rest (`at_rest`), when they may
have been wiped. Of a sequence that was wiped no other moment is recorded.

1. With public weights: the sorted values of each head of a row say its token.
2. With nothing at all: V of layer 0 depends on the token alone, so the same text has the same rows. The singular values
   of a text's rows, head by head, stay the same under every permutation and rotation of dims, and of rows within a
   block that covers the text. They say which two texts are one.
"""

import numpy as np
import numpy.typing as npt

from evaluation.attacks.embedding import nearest
from evaluation.attacks.invariants import sorted_heads
from evaluation.attacks.knowledge import Answers, Finding, Knowledge
from evaluation.attacks.view import View

F32 = npt.NDArray[np.float32]


def copied(view: View, known: Knowledge) -> list[Finding]:
    """Step 1 on what is cached while a conversation goes on."""
    return _read(view, known, "cache_v") if view.has("cache_v") and not view.has("wiped_v") else []


def linked(view: View, known: Knowledge) -> list[Finding]:
    """Step 2 on the same."""
    return _link(view, known, "cache_v") if view.has("cache_v") and not view.has("wiped_v") else []


def at_rest(view: View, known: Knowledge) -> list[Finding]:
    """Both on what is cached between two turns: zeros, if the worker did as it was told."""
    name = "wiped_v" if view.has("wiped_v") else "cache_v"
    return [*_read(view, known, name), *_link(view, known, name)] if view.has(name) else []


def _read(view: View, known: Knowledge, name: str) -> list[Finding]:
    wanted = [slice(len(known.prefix), known.lengths[number]) for number in known.victims]
    rows = np.concatenate([view.rows(name, 0, [n])[which] for n, which in zip(known.victims, wanted, strict=True)])
    table = sorted_heads(known.model.first.v[:, 0])
    said = nearest(sorted_heads(rows), table)
    return [Answers("sorted V of the cache, layer 0", "tokens", said, len(table))]


def _link(view: View, known: Knowledge, name: str) -> list[Finding]:
    first = np.stack([spectrum(view.rows(name, 0, [number])) for number in known.known])
    again = np.stack([spectrum(view.rows(name, 0, [number])) for number in known.again])
    distances = np.linalg.norm(again[:, None] - first, axis=-1)
    return [Answers("singular values of V of the cache, layer 0", "again", distances.argmin(axis=1), len(first))]


def spectrum(rows: F32) -> F32:
    """[t, K, d] -> the singular values of each head, one behind the other."""
    values: F32 = np.linalg.svd(np.moveaxis(rows, 1, 0), compute_uv=False).ravel()
    return values
