"""The adapters that this worker holds, in the part of the memory budget that is set aside for them.

An upload takes all its memory before its first byte comes: for the file, until it is read, and for the matrices. What
does not fit is refused with what is needed and what is free. Its name is random, and whoever knows it can open sessions
with it: it comes to its owner sealed. It is kept while a session uses it, and after that until its place is needed;
those that were not used for longest go first. What an operator loads from a folder in the clear has the operator's
name, is for every client, and stays.
"""

import re
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trusted_worker.lora import CONFIG, WEIGHTS, LoraConfig, LowRank, fill, place, read_config
from trusted_worker.secure_memory import Block, BudgetExceeded, SecureMemory
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError, ExhaustedError, InvalidArgumentError, PreconditionError
from wire.layout import WORD, blocks
from wire.linears import LinearSpec
from wire.model_config import ModelConfig

MAX_ADAPTERS = 64
NAME_BYTES = 16
MAX_HEADER_BYTES = 1 << 20  # it becomes Python objects, outside the budget
_MAX_TEXT = 300  # of a refusal: shapes are the client's
_PIECE = 1 << 20
_ABSENT = "this worker takes no adapters: start it with --adapter-memory SIZE"


class Adapter:
    """One adapter in the arena: what it adds to each linear that it adapts."""

    def __init__(self, config: LoraConfig, block: Block) -> None:
        """`block` has float32[config.floats]."""
        self.linears: dict[LinearSpec, LowRank] = place(config, block.array)
        self.config, self.block, self.size = config, block, block.size
        self.name = b""
        self.holders = 0

    def hold(self) -> None:
        """It must stay."""
        self.holders += 1

    def release(self) -> None:
        """One holder less."""
        self.holders -= 1


class Incoming:
    """An upload under way. It ends with `finish` or `abandon`, and with every error."""

    def __init__(self, adapters: "Adapters", adapter: Adapter, file: Block) -> None:
        self._adapters, self._adapter, self._file = adapters, adapter, file
        self._filled = 0
        self._ended = False

    @property
    def complete(self) -> bool:
        """Whether all announced bytes are here."""
        return self._filled == len(self._file.array)

    def write(self, piece: bytes) -> None:
        """The next bytes of adapter_model.safetensors. Raises InvalidArgumentError for more than was announced."""
        self._go_on()
        end = self._filled + len(piece)
        if end > len(self._file.array):
            self.abandon()
            raise InvalidArgumentError(f"{WEIGHTS}: more bytes came than were announced")
        self._file.array[self._filled : end] = np.frombuffer(piece, np.uint8)
        self._filled = end

    def finish(self, name: bytes = b"") -> Adapter:
        """All bytes have come: the adapter, under a random name unless one is given. Raises InvalidArgumentError."""
        self._go_on()
        try:
            self._read()
        except CheckpointError as error:
            self.abandon()
            raise InvalidArgumentError(str(error)[:_MAX_TEXT]) from error
        except BaseException:
            self.abandon()
            raise
        self._ended = True
        self._adapter.name = name or secrets.token_bytes(NAME_BYTES)
        self._adapters.keep(self._adapter, self._file)
        return self._adapter

    def abandon(self) -> None:
        """Give everything back. A second call does nothing, nor does one after `finish`."""
        if not self._ended:
            self._ended = True
            self._adapters.free(self._adapter.block, self._file)

    def _go_on(self) -> None:
        if self._ended:
            raise PreconditionError("this upload has ended: begin another one")

    def _read(self) -> None:
        raw: npt.NDArray[np.uint8] = self._file.array
        if self._filled != len(raw):
            raise InvalidArgumentError(f"{WEIGHTS}: {self._filled} bytes came, {len(raw)} were announced")
        if int.from_bytes(raw[:8].tobytes(), "little") > MAX_HEADER_BYTES:
            raise InvalidArgumentError(f"{WEIGHTS}: its header is larger than {MAX_HEADER_BYTES} bytes")
        fill(self._adapter.linears, self._adapter.config, Checkpoint.of(_InMemory(raw), WEIGHTS))


class Adapters:
    """All of them, in at most `capacity` bytes of `memory`. Used from the compute thread only, but for `counters`."""

    def __init__(self, config: ModelConfig, memory: SecureMemory, capacity: int, refusal: str = _ABSENT) -> None:
        """`refusal` is said to everybody who asks for an adapter where the capacity is 0."""
        self._config, self._memory, self._capacity, self._refusal = config, memory, capacity, refusal
        self._kept: dict[bytes, Adapter] = {}  # what was not used for longest comes first
        self._used = self._incoming = 0

    def begin(self, config: bytes, size: int) -> Incoming:
        """Room for an upload of so many bytes. Raises InvalidArgumentError, ExhaustedError, PreconditionError."""
        self._require()
        lora = read_config(config, self._config)
        if size < 8:
            raise InvalidArgumentError(f"{WEIGHTS}: {size} bytes are not a safetensors file")
        adapter, file = self._admit(lora, size)
        self._incoming += 1
        return Incoming(self, adapter, file)

    def find(self, name: bytes) -> Adapter:
        """By its name. Raises PreconditionError."""
        self._require()
        adapter = self._kept.pop(name, None)
        if adapter is None:
            raise PreconditionError("no such adapter: upload it again, or ask the operator which names there are")
        self._kept[name] = adapter
        return adapter

    def load(self, text: str) -> None:
        """NAME=DIR: an operator's adapter. Raises PreconditionError, InvalidArgumentError, ExhaustedError."""
        name, _, folder = text.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or not folder or name.encode() in self._kept:
            raise PreconditionError(f"--insecure-clear-adapter {text}: write NAME=DIR, every name once")
        try:
            weights = Path(folder, WEIGHTS)
            incoming = self.begin(Path(folder, CONFIG).read_bytes(), weights.stat().st_size)
            with weights.open("rb") as file:
                while piece := file.read(_PIECE):
                    incoming.write(piece)
        except OSError as error:
            raise PreconditionError(f"{folder} is no adapter: it must have {CONFIG} and {WEIGHTS}") from error
        incoming.finish(name.encode()).hold()

    def keep(self, adapter: Adapter, file: Block) -> None:
        """An upload is complete."""
        self.free(file)
        self._kept[adapter.name] = adapter

    def free(self, *given: Block) -> None:
        """An upload gives back its file, and everything if it failed."""
        self._incoming -= 1
        self._give_back(*given)

    def counters(self) -> dict[str, int]:
        """Fields of StatsResponse."""
        return {"adapters": len(self._kept), "adapter_bytes": self._used, "adapter_capacity": self._capacity}

    def _require(self) -> None:
        if not self._capacity:
            raise PreconditionError(self._refusal)

    def _admit(self, lora: LoraConfig, size: int) -> tuple[Adapter, Block]:
        """Memory for an adapter and its file, if need be that of adapters that nobody uses. Raises ExhaustedError."""
        unused = [one for one in self._kept.values() if not one.holders]
        free = self._capacity - self._used + sum(one.size for one in unused)
        needed = blocks([WORD * lora.floats, size])
        for one in [*unused, None] if needed <= free else []:
            if self._used + needed <= self._capacity and len(self._kept) + self._incoming < MAX_ADAPTERS:
                try:
                    return self._allocate(lora, size)
                except BudgetExceeded:  # what is free lies in pieces
                    pass
            if one:
                self._give_back(self._kept.pop(one.name).block)
        raise ExhaustedError(
            f"the adapter needs {needed} bytes until its file is read: of {self._capacity} that are set aside, {free} "
            f"are free, and at most {MAX_ADAPTERS} adapters are kept"
        )

    def _allocate(self, lora: LoraConfig, size: int) -> tuple[Adapter, Block]:
        matrices = self._memory.allocate("adapters", (lora.floats,), np.float32)
        try:
            file = self._memory.allocate("adapters", (size,), np.uint8)
        except BudgetExceeded:
            matrices.free()
            raise
        self._used += matrices.size + file.size
        return Adapter(lora, matrices), file

    def _give_back(self, *given: Block) -> None:
        for block in given:
            self._used -= block.size
            block.free()


class _InMemory:
    """A safetensors file that lies in the arena. See checkpoint.Source."""

    def __init__(self, raw: npt.NDArray[np.uint8]) -> None:
        self._raw, self.size = raw, len(raw)

    def read(self, offset: int, into: npt.NDArray[np.uint8]) -> None:
        """See checkpoint.Source. Ranges were checked against the size."""
        into[...] = self._raw[offset : offset + len(into)]

    def close(self) -> None:
        """Whoever made the file frees it."""
