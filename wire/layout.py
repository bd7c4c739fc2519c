"""Where the weights of a model lie when its decoder runs in the trusted worker: in its memory budget, or parked."""

from collections.abc import Iterable
from dataclasses import dataclass

from wire.kv_pages import KvType, page_words
from wire.linears import Linear, LinearSpec, all_specs, lookup_spec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, weight_name

WORD = 4  # bytes of float32 and int32
ALIGNMENT = 64  # of the arena's blocks
TILE_ELEMENTS = 1 << 18  # weights of one tile


@dataclass(frozen=True)
class Layout:
    """Places: resident, parked (tile by tile), scales (only they are kept), absent."""

    embed: str  # resident, scan, read (from the checkpoint, seen by whoever watches the disk) or client
    table: str  # the place of the embedding table
    linears: str  # the place of all other linears
    kept: tuple[Linear, ...] = ()  # but for these: they are resident

    def place(self, config: ModelConfig, of: LinearSpec) -> str:
        """The place of one linear. A tied model's head is its embedding table."""
        if of.linear is Linear.LM_HEAD and config.tied:
            return self.table
        return "resident" if of.linear in self.kept else self.linears

    def places(self, config: ModelConfig) -> dict[Name, str]:
        """The place of every matrix that is read at all."""
        found = {Name(Kind.EMBEDDING): self.table}
        found |= {weight_name(config, spec): self.place(config, spec) for spec in all_specs(config)}
        return {name: place for name, place in found.items() if place != "absent"}


@dataclass(frozen=True)
class Demand:
    """What a budget is planned for: tee-only, split or secure-infer."""

    config: ModelConfig
    scheme: str
    precision: str
    kv: KvType = KvType.FLOAT32
    stock: int = 256  # pads that the bank holds
    client_embeds: bool = False
    adapters: int = 0  # bytes that are set aside for LoRA adapters
    kept: tuple[Linear, ...] = ()  # linears whose products are always computed in the trusted worker

    @property
    def int8(self) -> bool:
        """Whether linears and embedding are int8."""
        return self.precision == "int8"

    @property
    def inside(self) -> bool:
        """Whether products may be computed in the trusted worker."""
        return self.scheme != "split"

    @property
    def masks(self) -> bool:
        """Whether there are pads."""
        return self.scheme == "secure-infer"

    @property
    def width(self) -> int:
        """Bytes of one weight."""
        return 1 if self.int8 else WORD

    @property
    def page(self) -> int:
        """Bytes of one page of one layer."""
        return WORD * page_words(self.config, self.kv)

    def looks_up(self, layout: Layout) -> bool:
        """Whether embeddings come by the masked lookup."""
        return self.masks and layout.embed == "scan"

    def padded(self, layout: Layout) -> list[LinearSpec]:
        """Products that have a part in each pad, and are verified: the linears that go out, and the lookup."""
        lookup = [lookup_spec(self.config)] if self.looks_up(layout) else []
        return all_specs(self.config, self.kept) + lookup if self.masks else []


def tile_rows(width: int) -> int:
    """Rows of one tile of a matrix: a multiple of 4, so that a tile of the table begins on a block of AES."""
    return max(4, TILE_ELEMENTS // width // 4 * 4)


def blocks(sizes: Iterable[int]) -> int:
    """Bytes that the arena takes for blocks of these sizes."""
    return sum(max(-(-size // ALIGNMENT), 1) * ALIGNMENT for size in sizes)
