"""An attack on a transcript: tokens and distributions, read from the rows that enter products.

The attacker is the GPU worker. It has the public base model and every exchange. It does not have the adapter, which
works inside the trusted worker and shows in activations alone. Two products of each pass give the text away, if their
rows are in the clear. Rows may be integers at an unknown scale: only their directions are used.

(1) The row that enters layer 0's qkv is a token's embedding, normalised, times a public gain: the token is the one
    whose embedding, times that gain, has its direction.
(2) The row that enters the head is normalised, times a public gain: without that gain its root mean square is 1. So
    its scale follows, and the product with the public head is the adapted model's logits, all of them.
(3) Rows per call are always visible. A call of many rows begins a conversation; single rows go on with it.

On masked rows the same code runs as well, and reads noise.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evaluation.attacks.embedding import unit
from evaluation.transcript import Exchange
from wire import parameters
from wire.checkpoint import Checkpoint
from wire.linears import Linear, spec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name

F32 = npt.NDArray[np.float32]
_LEAST = 1e-12  # of a norm: a row of zeros has no direction


@dataclass(frozen=True)
class Conversation:
    """What was read of one: the prompt's tokens, and for each token of the answer the logits it was taken from."""

    prompt: list[int]
    logits: F32  # [answer, vocabulary]

    @property
    def answer(self) -> list[int]:
        """The greedy tokens."""
        return [int(token) for token in self.logits.argmax(axis=1)]


@dataclass(frozen=True)
class PublicModel:
    """What the attack uses of the public base."""

    directions: F32  # [vocabulary, hidden], of length 1: of each token's row before layer 0's qkv
    final_gain: F32  # [hidden]
    head: F32  # [vocabulary, hidden]

    @classmethod
    def read(cls, folder: Path) -> "PublicModel":
        """From a model folder. Raises CheckpointError."""
        config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
        found = parameters.parameters(config)

        def load(name: Name) -> F32:
            return parameters.read(checkpoint, found[name])

        embedding, gain = load(Name(Kind.EMBEDDING)), load(Name(Kind.ATTENTION_NORM))[:, 0]
        head = load(parameters.weight_name(config, spec(config, 0, Linear.LM_HEAD)))
        return cls(unit(embedding * gain), load(Name(Kind.FINAL_NORM))[:, 0], head)

    def tokens(self, rows: npt.NDArray[np.generic]) -> list[int]:
        """Step (1): of rows [m, hidden], at any scale."""
        return [int(token) for token in (unit(rows.astype(np.float32)) @ self.directions.T).argmax(axis=1)]

    def logits(self, rows: npt.NDArray[np.generic]) -> F32:
        """Step (2): float32[m, vocabulary] of rows [m, hidden], at any scale."""
        wide = rows.astype(np.float64)
        bare = np.divide(wide, self.final_gain, out=np.zeros_like(wide), where=self.final_gain != 0)
        scale = np.sqrt((bare**2).mean(axis=1, keepdims=True))
        result: F32 = (wide / np.maximum(scale, _LEAST)).astype(np.float32) @ self.head.T
        return result


def read(exchanges: Iterable[Exchange], model: PublicModel) -> list[Conversation]:
    """Every conversation of a transcript in which they take place one after the other. Step (3)."""
    found: list[tuple[list[int], list[F32]]] = []
    for exchange in exchanges:
        layer, linear = _place(exchange)
        if linear == Linear.QKV and layer == 0:
            if len(exchange.up) > 1 and (not found or found[-1][1]):
                found.append(([], []))
            if found and not found[-1][1]:  # still the prompt
                found[-1][0].extend(model.tokens(exchange.up))
        elif linear == Linear.LM_HEAD and found:
            found[-1][1].append(model.logits(exchange.up))
    return [Conversation(prompt, np.concatenate(logits)) for prompt, logits in found if prompt and logits]


def rows(exchanges: Iterable[Exchange]) -> int:
    """Rows that crossed, over all products."""
    return sum(len(exchange.up) for exchange in exchanges)


def _place(exchange: Exchange) -> tuple[int, int]:
    """Layer and linear of a product; of anything else, none."""
    kind = exchange.operation.WhichOneof("kind")
    if kind == "ring_matmul":
        return exchange.operation.ring_matmul.layer, exchange.operation.ring_matmul.linear
    if kind == "matmul":
        return exchange.operation.matmul.layer, exchange.operation.matmul.linear
    return -1, -1
