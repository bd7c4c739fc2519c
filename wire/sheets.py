"""How u = r.W_q^T of one pad is cut into what is sealed together: the trusted worker's bank, and whoever plans one.

A sheet holds the outputs of consecutive linears, up to SHEET words; a new one begins wherever a layer does.
"""

from itertools import accumulate
from typing import NamedTuple

from wire.linears import Linear, LinearSpec
from wire.scratch import SHEET

TAG_BYTES = 16


class Piece(NamedTuple):
    """`width` outputs of a linear, from `start` on, and where they lie: in which sheet, from which word on."""

    sheet: int
    at: int
    start: int
    width: int


class Sheets:
    """How the outputs of `specs`, in the order of a forward pass, are cut.

    `widths`: words of each sheet. `offsets`: where each lies, sealed, in the `row_bytes` of a pad.
    """

    def __init__(self, specs: list[LinearSpec]) -> None:
        self.widths: list[int] = []
        self.pieces: dict[LinearSpec, list[Piece]] = {}
        group = None
        for spec in specs:
            mine = spec.layer, spec.linear is Linear.LM_HEAD
            if mine != group:
                self.widths.append(0)
                group = mine
            self.pieces[spec] = self._cut(spec.n)
        *self.offsets, self.row_bytes = accumulate((4 * width + TAG_BYTES for width in self.widths), initial=0)

    def _cut(self, n: int) -> list[Piece]:
        found, start = [], 0
        while start < n:
            if self.widths[-1] == SHEET:
                self.widths.append(0)
            width = min(n - start, SHEET - self.widths[-1])
            found.append(Piece(len(self.widths) - 1, self.widths[-1], start, width))
            self.widths[-1] += width
            start += width
        return found


def row_bytes(specs: list[LinearSpec]) -> int:
    """Bytes that one pad takes in a bank."""
    return Sheets(specs).row_bytes
