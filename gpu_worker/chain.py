"""A pass: the rows of some sequences on their way through the layers, over as many requests as the peer likes.

The residual stream and v stay here between requests; what crosses is q beside k, attention and logits. The caches
hold the rows of a pass behind the tokens that count; they count once Head is through.
"""

from collections.abc import Callable, Sequence

import torch

from gpu_worker import steps
from gpu_worker.decoder import Decoder, Spans
from wire.errors import InvalidArgumentError
from wire.v1 import gpu_worker_pb2 as pb

Note = Callable[[str, int, torch.Tensor], None]  # told the name, layer and value of what a pass holds


def unnoted(name: str, layer: int, held: torch.Tensor) -> None:
    """Nobody records."""


class Pass:
    """One pass. It begins with Embed; the other steps are its methods."""

    def __init__(self, decoder: Decoder, spans: Spans, ids: torch.Tensor, note: Note = unnoted) -> None:
        """Embed: ids int64[m], as many as the rows of `spans`, which have room for them."""
        positions = decoder.positions(spans)
        self.config = decoder.config
        self.decoder = decoder  # may be exchanged between requests for one with other parameters
        self._spans = spans
        self._note = note
        self._next = 1  # the number of the step that comes next
        self._rotations = decoder.rotations(positions)
        self._x = decoder.embed(ids, positions)
        self._v = torch.empty(0)  # [m, K, d] of the last ProjectQkv

    def run(self, chain: Sequence[pb.Step], given: torch.Tensor) -> torch.Tensor:
        """Steps that `steps.check` has checked, without Embed; `given` goes into the first, unless it takes nothing.

        Raises InvalidArgumentError for steps that are not next and for another number of rows than the pass has.
        """
        if steps.number(chain[0], self.config) != self._next:
            raise InvalidArgumentError("the chain does not go on where the pass is")
        if len(given) != len(self._x):
            raise InvalidArgumentError(f"the pass has {len(self._x)} rows")
        for place, step in enumerate(chain):
            given = self._step(step, given, own=place > 0)
        self._next += len(chain)
        return given

    def project_qkv(self, layer: int) -> torch.Tensor:
        """q beside k float32[m, (H+K).d], before norm and RoPE. v stays here."""
        self._note("residual", layer, self._x)
        qk, self._v = self.decoder.project_qkv(layer, self._x)
        self._note("qk", layer, qk)
        self._note("v", layer, self._v)
        return qk

    def attend(self, layer: int, qk: torch.Tensor, own: bool) -> torch.Tensor:
        """q beside k -> attention float32[m, H.d]. `own`: they are what project_qkv gave, else they are final."""
        q, k = self.decoder.finish_qk(layer, qk, self._rotations) if own else self.decoder.split_qk(qk)
        a = self.decoder.attend(layer, q, k, self._v, self._spans, permute_qk=own)
        self._note("attention", layer, a)
        return a

    def finish_block(self, layer: int, a: torch.Tensor) -> None:
        """Attention float32[m, H.d] into the residual stream, and the feed-forward part."""
        self._x = self.decoder.finish_block(layer, self._x, a)

    def head(self, logit_rows: Sequence[int]) -> torch.Tensor:
        """Logits float32[len(logit_rows), vocabulary]. The pass is over: each sequence grows by its rows."""
        logits = self.decoder.head(self._x[list(logit_rows)])
        for sequence, rows in self._spans:
            sequence.advance(rows)
        return logits

    def _step(self, step: pb.Step, given: torch.Tensor, own: bool) -> torch.Tensor:
        match step.WhichOneof("kind"):
            case "project_qkv":
                return self.project_qkv(step.project_qkv.layer)
            case "attend":
                return self.attend(step.attend.layer, given, own)
            case "finish_block":
                self.finish_block(step.finish_block.layer, given)
                return given
            case _:
                return self.head(step.head.logit_rows)


def forward(
    decoder: Decoder, spans: Spans, ids: torch.Tensor, logit_rows: Sequence[int], note: Note = unnoted
) -> torch.Tensor:
    """A whole pass: ids int64[m] -> logits of the rows asked for. The sequences grow once all went well."""
    whole = Pass(decoder, spans, ids, note)
    for layer in range(decoder.config.layers):
        whole.finish_block(layer, whole.attend(layer, whole.project_qkv(layer), own=True))
    return whole.head(logit_rows)
