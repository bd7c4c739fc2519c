"""What one stream holds, and its decoder operations: caches, a pass under way, provisioned parameters.

Only the compute thread comes here. A pass that is not through is given up by a new Embed, by a Forward, and by
whatever else is done to the cache of one of its sequences: then none of them grows.
"""

from collections.abc import Iterable

import torch

from gpu_worker.allowance import Allowance
from gpu_worker.cache import CacheStore
from gpu_worker.calls import Call
from gpu_worker.chain import Pass, forward, unnoted
from gpu_worker.decoder import Decoder, Spans
from gpu_worker.expected import parameter_of
from gpu_worker.overlay import Overlay
from gpu_worker.recording import StreamRecording
from wire.errors import InvalidArgumentError, PreconditionError
from wire.kv_pages import KvType
from wire.linears import Linear
from wire.v1 import gpu_worker_pb2 as pb


class Stream:
    """The state of one stream of calls. Tensors that it returns lie on the device."""

    def __init__(
        self,
        device: str,
        cache_allowance: Allowance,
        overlay_allowance: Allowance,
        recording: StreamRecording | None = None,
    ) -> None:
        self.recording = recording
        self._note = unnoted if recording is None else recording.held
        self._device = device
        self._caches = CacheStore(cache_allowance, None if recording is None else recording.cache)
        self._allowance = overlay_allowance
        self._overlay: Overlay | None = None
        self._pass: Pass | None = None
        self._passing: frozenset[int] = frozenset()  # the sequences of the pass

    def close(self) -> None:
        """The stream has ended: nothing of it stays."""
        self._pass = None
        self._caches.clear()
        self._drop_overlay()

    def matmul(self, call: Call, op: pb.Matmul) -> torch.Tensor:
        """x float32[m, k] -> float32[m, n]."""
        return self._decoder(call).matmul(op.layer, Linear(op.linear), self._given(call))

    def forward(self, call: Call, op: pb.Forward) -> torch.Tensor:
        """ids int32[m] -> logits float32[len(logit_rows), vocabulary]. Raises ContextError for a full sequence."""
        self._pass = None
        decoder, spans, ids = self._decoder(call), self._find(call, op.sequences), _ids(call, self._device)
        return forward(decoder, spans, ids, op.logit_rows, self._note)

    def chain(self, call: Call, op: pb.Chain) -> torch.Tensor:
        """See the proto. A chain that fails gives up its pass. Raises InvalidArgumentError for steps that are not next,
        ContextError for a full sequence.
        """
        running, self._pass, decoder = self._pass, None, self._decoder(call)
        chain = list(op.steps)
        if chain[0].HasField("embed"):
            sequences = chain.pop(0).embed.sequences
            running = Pass(decoder, self._find(call, sequences), _ids(call, self._device), self._note)
            self._passing = frozenset(s.sequence for s in sequences)
        if running is None or running.config is not call.model.config:
            raise InvalidArgumentError("no pass is under way: one begins with Embed")
        running.decoder = decoder
        answer = running.run(chain, self._given(call))
        if not chain[-1].HasField("head"):
            self._pass = running
        return answer

    def provision(self, call: Call, op: pb.Provision) -> None:
        """Raises PreconditionError for a model that is not float32, ExhaustedError for more parameters than one model
        has, InvalidArgumentError for rows out of order.
        """
        if self._overlay is None or self._overlay.model is not call.model:
            self._drop_overlay()
            self._overlay = Overlay(call.model, self._allowance)
        self._overlay.put(parameter_of(op, call.model.config), op.first_row, call.float32())

    def cache(self, call: Call, op: pb.Cache) -> torch.Tensor | None:
        """One action on one sequence's cache; a page for ReadPage. Raises InvalidArgumentError for an unknown sequence,
        ContextError and ExhaustedError for too many tokens.
        """
        number, config = op.sequence, call.model.config
        if number in self._passing:
            self._pass = None
        match op.WhichOneof("action"):
            case "reserve":
                self._caches.reserve(number, config, op.reserve.tokens, KvType(op.reserve.type), self._device)
            case "drop":
                self._caches.drop(number)
            case "permute":
                self._caches.get(number, config).permute(self._given(call).to(torch.int64))
            case "read":
                return self._caches.get(number, config).read_page(op.read.layer, op.read.page)
            case "write":
                self._caches.get(number, config).write_page(op.write.layer, op.write.page, self._given(call))
            case _:
                self._caches.wipe(number, config)
        return None

    def _decoder(self, call: Call) -> Decoder:
        if self._overlay is not None and self._overlay.model is call.model:
            return self._overlay.decoder
        if call.model.decoder is None:
            raise PreconditionError("the model is loaded for ring products only")
        return call.model.decoder

    def _find(self, call: Call, sequences: Iterable[pb.SequenceRows]) -> Spans:
        return self._caches.find([(s.sequence, s.rows) for s in sequences], call.model.config)

    def _given(self, call: Call) -> torch.Tensor:
        return torch.from_numpy(call.tensor).to(self._device)

    def _drop_overlay(self) -> None:
        if self._overlay is not None:
            self._overlay.close()
            self._overlay = None


def _ids(call: Call, device: str) -> torch.Tensor:
    ids = call.int32()
    if ids.min() < 0 or ids.max() >= call.model.config.vocabulary:
        raise InvalidArgumentError("token id out of range")
    return torch.from_numpy(ids).to(device, torch.int64)
