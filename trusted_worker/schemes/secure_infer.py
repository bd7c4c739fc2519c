"""secure-infer: one-time pads in Z/2^32 around every offloaded product, each product verified before it is used.

Paper: SecureInfer (arXiv 2510.19979), in the form of docs/adr/0002: additive pads in a ring instead of a second-hand
"XOR", Freivalds' check from Slalom (arXiv 1806.03287), norms, attention and activation functions inside.

What the GPU worker sees: for each product, uniform 32-bit words z = x_q + r, independent of everything else it ever
sees, because every r is used once (pads.py). What it learns: shapes, the number of rows (prompt length, batch), the
order and time of calls, and which rows came without an exchange only by their absence. Not the scales s_x, not the
tokens, not the KV cache, not the results: u never leaves.
What breaks it: a pad used twice (z - z' = x_q - x_q'), a predictable boot key, a snapshot or clone of an emulated
process, side channels of the TEE. A wrong row passes verification with probability at most 2^-32 (verification.py).

Steps, by the numbers that the documents use too; m rows, k inputs, n outputs:
 1. Quantise: x_q = round(x / s_x), one s_x per row, as fine as the ring allows; no product reaches 2^30.
 2. Mask:     z = x_q + r mod 2^32, r fresh for each row and linear, spent here whatever happens next.
 3. Worker:   y' = z . W_q^T mod 2^32. Meanwhile u is opened here, and c . x_q of step 5 is made.
 4. Recover:  y_q = y' - u as signed int32, u = r . W_q^T from the bank, a sheet at a time.
 5. Verify:   s . y_q = c . x_q mod P and |y_q| < 2^30, row by row, one verdict, before any use.
 6. Dequantise: y = y_q * s_x * s_w (+ bias).
When the bank is dry, or for prefill rows when pads are worth more for decode, the product is computed inside: the
same integers, no exchange.

Where the embedding table does not fit the budget, a row with a pad takes its embedding through the same steps: z is a
one-hot row plus r, as long as the vocabulary, and y_q a row of the int8 table (RING_LOOKUP). So no word on the wire
and no read of the disk depends on the token. The other rows share one scan of the whole table, each tile checked
(weights.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np

from trusted_worker.arithmetic import F32, I32, Y_LIMIT
from trusted_worker.kv_cache import PagePool
from trusted_worker.model import Accept, Batch
from trusted_worker.pad_bank import Pad
from trusted_worker.pads import Pads
from trusted_worker.schemes.base import InsideDecoder, Worker, ring_matmul
from trusted_worker.secure_memory import Scratch
from trusted_worker.verification import TABLE_LIMIT, Verifier
from trusted_worker.weights import Weights
from wire.errors import ParkedError, VerificationError
from wire.linears import Linear, LinearSpec, all_specs, lookup_spec
from wire.scratch import LOOKUP_BYTES
from wire.v1 import gpu_worker_pb2 as pb

Prefill = Literal["auto", "inside", "worker"]


class SecureInfer(InsideDecoder):
    """The scheme. Rows with a pad go to the worker, the others are computed inside, and so are `kept` linears."""

    def __init__(
        self,
        weights: Weights,
        pages: PagePool,
        scratch: Scratch,
        head_rows: int,
        worker: Worker,
        pads: Pads,
        verifier: Verifier,
        prefill: Prefill,
        kept: tuple[Linear, ...] = (),
    ) -> None:
        super().__init__(weights, pages, scratch, head_rows)
        self._worker, self._source, self._bank, self._refill = worker, pads.source, pads.bank, pads.refill
        self._verifier, self._prefill, self._kept = verifier, prefill, kept
        self._table = lookup_spec(weights.config)
        self._lookups = weights.layout.embed == "scan"
        self._prepare()
        self._pads: list[Pad] = []
        self._issued = self._verified = self._failed = self._inside = 0

    def forward(self, batch: Batch, accept: Accept) -> None:
        """See base.Scheme. Pads go to the first rows of the batch; all of them are spent, also when this raises."""
        self._pads = self._take(batch)
        self._issued += len(self._pads)
        try:
            with self._scratch.frame():
                self._lay_out(self._pads)
                super().forward(batch, accept)
        except ParkedError:  # our own disk: the worker has done nothing wrong
            raise
        except VerificationError:
            self._failed += len(self._pads)
            raise
        finally:
            for pad in self._pads:
                pad.burn()
            self._pads = []

    def idle(self) -> bool:
        """One tile of refill."""
        return self._refill.tile()

    def distrust(self) -> None:
        """Quarantine: nothing is sent until there is a fresh secret s, and then on a new stream.

        A rejected row excluded candidates of the old s.
        """
        self._worker.close()
        self._verifier.draw()
        self._prepare()

    def counters(self) -> dict[str, int]:
        """See base.Scheme."""
        return super().counters() | {
            "pads_issued": self._issued,
            "pads_reused": self._source.reused,
            "pads_in_stock": self._bank.stock,
            "pads_capacity": self._bank.capacity,
            "products_verified": self._verified,
            "products_failed": self._failed,
            "products_inside": self._inside,
            "spill_bytes": super().counters()["spill_bytes"] + self._bank.size,
        }

    def _lay_out(self, pads: list[Pad]) -> None:
        """A place for the sheet of each pad that is open."""
        width = max(self._bank.sheets.widths) if pads else 0
        sheets: I32 = self._scratch.empty((len(pads), width), np.int32)
        for pad, sheet in zip(pads, sheets, strict=True):
            pad.lay(sheet)

    def _prepare(self) -> None:
        for spec in all_specs(self._weights.config, self._kept):
            with self._weights.tiles(spec, self._scratch) as tiles:
                self._verifier.prepare(spec, tiles, self._scratch)
        if self._lookups:
            with self._weights.table(self._scratch) as tiles:
                self._verifier.prepare_lookup(tiles, self._scratch)

    def _take(self, batch: Batch) -> list[Pad]:
        """Pads for a prefix of the batch: every decode row, and as many prefill rows as the policy grants."""
        decode = sum(run.stop - run.start for run in batch.runs if run.stop - run.start == 1)
        if self._prefill == "inside":
            wanted = decode
        elif self._prefill == "worker":
            wanted = len(batch.ids)
        else:  # a pad is worth more at decode: prefill takes only from the upper half of the bank
            wanted = decode + max(0, self._bank.stock - decode - self._bank.capacity // 2)
        taken = (self._bank.take() for _ in range(min(wanted, len(batch.ids))))
        return [pad for pad in taken if pad is not None]

    def embed(self, batch: Batch, out: F32) -> None:
        """See model.Embed."""
        if batch.embeddings or not self._lookups:
            super().embed(batch, out)
            return
        padded, together = len(self._pads), max(1, LOOKUP_BYTES // (4 * self._table.k))
        for start in range(0, padded, together):
            rows = slice(start, min(start + together, padded))
            with self._scratch.frame():
                self._lookup(batch.ids[rows], self._pads[rows], out[rows])
        if padded < len(batch.ids):
            self._weights.embed(batch.ids[padded:], out[padded:], self._scratch)

    def integers(self, spec: LinearSpec, x_q: I32, y_q: I32, rows: I32) -> None:
        """See base.InsideDecoder."""
        padded = 0 if spec.linear in self._kept else int(np.searchsorted(rows, len(self._pads)))
        if padded:
            pads = [self._pads[row] for row in rows[:padded]]
            self._outside(spec, x_q[:padded], pads, y_q[:padded])
        if padded < len(x_q):
            self.exact(spec, x_q[padded:], y_q[padded:])
            self._inside += len(x_q) - padded

    def _outside(self, spec: LinearSpec, x_q: I32, pads: list[Pad], y_q: I32) -> None:
        """Steps 2 to 5 for rows that have a pad: y_q int32[m, n], verified."""
        with self._scratch.frame():
            z: I32 = self._scratch.empty(x_q.shape, np.int32)
            self._source.spend(spec, [pad.index for pad in pads], z)  # (2) r is overwritten by z
            np.add(z, x_q, out=z)
            expect = partial(self._verifier.expect, spec, x_q, self._scratch)
            self._exchange(ring_matmul(spec), spec, z, pads, y_q, expect, Y_LIMIT - 1)

    def _lookup(self, ids: I32, pads: list[Pad], out: F32) -> None:
        """Steps 2 to 6 for rows of the embedding table. Step 1 is exact: a one-hot row is an integer row of scale 1."""
        spec = self._table
        z: I32 = self._scratch.empty((len(pads), spec.k), np.int32)
        self._source.spend(spec, [pad.index for pad in pads], z)  # (2)
        z[np.arange(len(ids)), ids] += np.int32(1)
        y_q: I32 = self._scratch.empty((len(pads), spec.n), np.int32)
        expect = partial(self._verifier.expect_lookup, ids)
        self._exchange(pb.Operation(ring_lookup=pb.RingLookup()), spec, z, pads, y_q, expect, TABLE_LIMIT)
        np.multiply(y_q, self._weights.table_scale[ids][:, None], out=out, casting="unsafe", dtype=np.float32)  # (6)

    def _exchange(
        self,
        operation: pb.Operation,
        spec: LinearSpec,
        z: I32,
        pads: list[Pad],
        y_q: I32,
        expect: Callable[[], list[int]],
        limit: int,
    ) -> None:
        """Steps 3 to 5: y_q int32[m, n], verified. `expect`: the part of step 5 that needs no answer."""
        expected: list[int] = []

        def meanwhile() -> None:
            for pad in pads:
                pad.open(spec)
            expected.extend(expect())

        self._worker.call(operation, z, y_q, meanwhile)  # (3) the answer is copied once, into the arena
        for row, pad in enumerate(pads):  # (4)
            pad.remove(spec, y_q[row])
        if not self._verifier.accepts(expected, y_q, self._scratch, limit):  # (5)
            raise VerificationError
        self._verified += len(pads)
