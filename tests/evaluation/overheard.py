"""Transcripts of the demo model, adapted, made by torch: what crosses under split and under secure-infer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from evaluation.student import Pair
from evaluation.transcript import Exchange
from wire.linears import Linear
from wire.v1 import gpu_worker_pb2 as pb

X_LIMIT = 1 << 23  # integers of split are at most so large


def overhear(model: Any, pairs: Sequence[Pair], masked: bool) -> list[Exchange]:
    """Conversations one after the other: the prompt in one pass, then a pass for each token of the answer but the last.

    masked: every word is uniform, as under secure-infer. What comes back is left out: no attack here looks at it.
    """
    random = np.random.default_rng(5)
    found = []
    for prompt, answer in pairs:
        rows = _inputs(model, prompt + answer[:-1])
        passes = [(0, len(prompt)), *((at, at + 1) for at in range(len(prompt), len(prompt) + len(answer) - 1))]
        for start, stop in passes:
            for (layer, linear), x in rows.items():
                part = x[stop - 1 : stop] if linear is Linear.LM_HEAD else x[start:stop]
                found.append(_exchange(layer, linear, _words(random, part.shape) if masked else _quantise(part)))
    return found


def _inputs(model: Any, ids: list[int]) -> dict[tuple[int, Linear], Any]:
    """float32[len(ids), k] of every linear, in the order of a forward pass."""
    seen: dict[tuple[int, Linear], Any] = {}

    def note(place: tuple[int, Linear]) -> Any:
        return lambda _, args: seen.__setitem__(place, args[0][0].numpy())

    modules = [(model.lm_head, (0, Linear.LM_HEAD))]
    for index, layer in enumerate(model.model.layers):
        of = {Linear.QKV: layer.self_attn.q_proj, Linear.O: layer.self_attn.o_proj}
        of |= {Linear.GATE_UP: layer.mlp.gate_proj, Linear.DOWN: layer.mlp.down_proj}
        modules += [(module, (index, linear)) for linear, module in of.items()]
    hooks = [module.register_forward_pre_hook(note(place)) for module, place in modules]
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


def _quantise(x: Any) -> Any:
    """One scale for each row, as fine as the ring allows: no scale crosses."""
    factor = X_LIMIT / np.maximum(np.abs(x).max(axis=1, keepdims=True), 1e-9)
    return np.rint(x * factor).astype(np.int32)


def _words(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return random.integers(-(1 << 31), 1 << 31, shape, dtype=np.int64).astype(np.int32)


def _exchange(layer: int, linear: Linear, up: Any) -> Exchange:
    operation = pb.Operation(ring_matmul=pb.RingMatmul(layer=layer, linear=linear.number))
    return Exchange(operation, up, np.zeros((len(up), 1), np.int32))
