"""tee-only: the whole model in the trusted worker. The baseline that needs no GPU worker and leaks nothing to one.

What the GPU worker sees: nothing; no exchange is made. What breaks it: only what breaks the TEE. Weights that do not
fit the budget are read tile by tile at every step (weights.py), always all of them, always in the same order.
float32: y = x.W^T (+ bias). int8: the integers of secure-infer's steps 1 and 6 around the exact product, so that the
results of the two are the same, bit for bit.
"""

import numpy as np

from trusted_worker.arithmetic import F32, I32
from trusted_worker.schemes.base import InsideDecoder
from wire.linears import LinearSpec


class TeeOnly(InsideDecoder):
    """Every product computed inside, from resident or parked weights."""

    _inside = 0

    def product(self, spec: LinearSpec, x: F32, rows: I32) -> F32:
        """See model.Product."""
        self._inside += len(rows)
        return super().product(spec, x, rows)

    def counters(self) -> dict[str, int]:
        """See base.Scheme."""
        return super().counters() | {"products_inside": self._inside}

    def integers(self, spec: LinearSpec, x_q: I32, y_q: I32, rows: I32) -> None:
        """See base.InsideDecoder."""
        self.exact(spec, x_q, y_q)

    def floats(self, spec: LinearSpec, x: F32, y: F32) -> None:
        """See base.InsideDecoder."""
        with self._weights.tiles(spec, self._scratch) as tiles:
            for first, tile in tiles:
                with self._scratch.frame():
                    part: F32 = self._scratch.empty((len(x), len(tile)), np.float32)
                    y[:, first : first + len(tile)] = np.matmul(x, tile.T, out=part)
