"""Weight matching: the rows that the worker multiplies with are those of the checkpoint in another order.

Source: ArrowMatch of "Game of Arrows" (USENIX Security 2025), and hashes, which suffice where nothing was added. Needs:
public weights. Reads: the parameters that were provisioned, or, where none were, those that the worker loaded; then q,
k and v of layer 0, to invert them as "Shadow in the Cache" (arXiv 2508.09442) does.

1. Match the rows of each head of W_q, W_k and W_v, three ways: by hash, by direction (Hungarian), by hash of the sorted
   row, which a permutation of the inputs would survive as well. A row is recovered when it equals its public row.
2. Undo the order in q, k and v of layer 0: the nearest row of V says the token.
3. Solve x = norm(embedding) from q, k and v: the nearest embedding says the token.

Whoever holds no rows of q, k and v in clear has no order to recover; steps 2 and 3 are tried on what he has.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from evaluation.attacks.embedding import unit
from evaluation.attacks.knowledge import Answers, Fact, Finding, Ints, Knowledge
from evaluation.attacks.parts import HEADS, victims
from evaluation.attacks.view import View
from wire.linears import Linear
from wire.parameters import Kind
from wire.v1 import gpu_worker_pb2 as pb

F32 = npt.NDArray[np.float32]
Match = Callable[[F32, F32], Ints]  # rows [d, k] of one head, and the public ones: which of them each row is


def attack(view: View, known: Knowledge) -> list[Finding]:
    """The order of the dims of every head, and the victims' tokens."""
    parts = [part for what in HEADS if (part := victims(view, known, what, 0)) is not None]
    if len(parts) < len(HEADS):
        return []
    heads = np.concatenate(parts, axis=1)
    return [*(_recovered(view, known) if view.has("v") else []), *_inverted(view, known, heads)]


def by_hash(rows: F32, public: F32) -> Ints:
    """-1: there is none."""
    numbers = {row.tobytes(): number for number, row in enumerate(public)}
    return np.array([numbers.get(row.tobytes(), -1) for row in rows])


def by_direction(rows: F32, public: F32) -> Ints:
    """Survives scales and noise."""
    from scipy.optimize import linear_sum_assignment

    said: Ints = linear_sum_assignment(unit(rows) @ unit(public).T, maximize=True)[1]
    return said


def by_sorted_hash(rows: F32, public: F32) -> Ints:
    """-1: there is none."""
    return by_hash(np.sort(rows, axis=1), np.sort(public, axis=1))


def held(view: View, known: Knowledge) -> list[F32]:
    """The rows of qkv that the worker multiplies with, [H+2K, d, k] for each layer."""
    rows = [known.model.weight(layer, Linear.QKV).copy() for layer in range(known.model.config.layers)]
    for exchange in view.transcript.exchanges:
        if exchange.operation.WhichOneof("kind") == "provision" and _of_qkv(exchange.operation.provision):
            at = exchange.operation.provision
            rows[at.layer][at.first_row : at.first_row + len(exchange.up)] = exchange.up
    return [_by_head(one, known) for one in rows]


def orders(rows: F32, public: F32, match: Match = by_direction) -> Ints:
    """Step 1 for one layer, [H+2K, d, k] each: [H+2K, d], the public number of each dim of each head."""
    return np.stack([match(*pair) for pair in zip(rows, public, strict=True)])


def _recovered(view: View, known: Knowledge) -> list[Finding]:
    c, matches = known.model.config, {"hash": by_hash, "direction": by_direction, "sorted hash": by_sorted_hash}
    hits = dict.fromkeys(matches, 0)
    for layer, rows in enumerate(held(view, known)):
        public = _by_head(known.model.weight(layer, Linear.QKV), known)
        for name, match in matches.items():
            said = orders(rows, public, match)
            same = (np.take_along_axis(public, said[..., None], axis=1) == rows).all(axis=-1)
            hits[name] += int((same & (said >= 0)).sum())
    trials = c.layers * (c.q_width + 2 * c.kv_width)
    return [Fact(f"rows of W by {name}", "rows found", hits[name], trials, 1 / c.head_dim) for name in matches]


def _inverted(view: View, known: Knowledge, heads: F32) -> list[Finding]:
    """Steps 2 and 3, of the victims' q, k and v [rows, H+2K, d]."""
    model, c = known.model, known.model.config
    if view.has("v"):
        public = _by_head(model.weight(0, Linear.QKV), known)
        order = np.broadcast_to(orders(held(view, known)[0], public), heads.shape)
        np.put_along_axis(heads, order, heads.copy(), axis=-1)
    y = heads.reshape(len(heads), -1) - model.bias(0, Linear.QKV)
    weight, inputs = model.weight(0, Linear.QKV), unit(model.first.input[:, 0])
    v = slice(c.q_width + c.kv_width, None)
    near = unit(y[:, v]) @ unit(inputs @ weight[v].T).T
    solved = unit(y @ np.linalg.pinv(weight).T) @ inputs.T
    return [
        Answers("V in the public order, layer 0", "tokens", near.argmax(axis=1), len(inputs)),
        Answers("input solved from q, k and v, layer 0", "tokens", solved.argmax(axis=1), len(inputs)),
    ]


def _of_qkv(provision: pb.Provision) -> bool:
    return (provision.kind, provision.linear, provision.bias) == (Kind.LINEAR.number, Linear.QKV.number, False)


def _by_head(rows: F32, known: Knowledge) -> F32:
    heads: F32 = rows.reshape(-1, known.model.config.head_dim, rows.shape[1])
    return heads
