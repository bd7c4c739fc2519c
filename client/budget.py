"""`cleave budget`: what a model would cost under every scheme. Nothing is run, and no weights are needed.

The numbers are those of client/costs.py. With --json they are one object: `model`, `context`, `stock`,
`kv_bytes_per_token` and `kv_bytes` (of the whole context) by element type, and `schemes`: by name, `precision`,
`exchanges`, `bytes_up`, `bytes_down`, `prompt_bytes_up`, `prompt_bytes_down` (of one prompt row), `start_bytes_up`
(on every new stream, before its first session), `lookup` (`bytes_up`, `bytes_down`, `sealed_bytes` of each pad, on top
where the memory budget does not hold the embedding table; null without pads), `macs_trusted` and `macs_worker` (by
purpose), `memory_budget` and `memory_parts` (bytes), `fits_in` (names of the TEE profiles of a known size that hold it,
from the smallest), `pad` (`words`, `macs`, `sealed_bytes`, `bank_bytes`; null without pads), `link_tokens_per_second`
(null without a link, or without exchanges).
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from client.costs import SCHEMES, Case, Cost, cost
from client.shapes import SHAPES, shape
from client.terminal import size
from wire.errors import CheckpointError
from wire.kv_pages import KvType, token_bytes
from wire.linears import PROJECTIONS
from wire.model_config import ModelConfig, read_json
from wire.profiles import PROFILES, holding

Show = Callable[[float], str]
_NOTES = """
Per decoded token: one row, logits wanted, the token itself counted in the context. A prompt row: its logits are not
wanted; a pass over up to 64 rows makes as many exchanges as one row. Masked lookup: one more exchange for each row with
a pad, where the memory budget does not hold the embedding table. Bytes are those of tensors: the envelope of a
call, some dozens of bytes, comes on top. MACs are those of matrix products. secure-infer: with a pad in stock; with
--projections trusted the linears of its trusted worker are qkv and o, whose weights stay inside.
Smallest memory: the least --memory-budget of the trusted worker, divided as it divides it; interpreter, libraries and
numpy's temporaries lie outside. Where the decoder runs inside (secure-infer, split, tee-only) it has room for one row,
one pad in the making and, in every layer, one page of 64 tokens, whatever the context: pages that do not fit are
sealed, parked outside, and opened again for every token. More memory is more speed: linears stay inside when they fill
at most half of the budget, the embedding table when it fills at most a quarter; else they are parked, and come back
tile by tile at each use. What remains lets more rows of a prompt, more new pads and more pages in at once.
LoRA adapters come on top, as --adapter-memory: 4 bytes a parameter, and while one is uploaded its file.
"""
_LINK_NOTE = "The link's bound is 1 / (exchanges x round trip + bytes both ways / bandwidth): no computing is in it.\n"


def run(options: argparse.Namespace) -> int:
    """Print the table, or the JSON object. Raises CheckpointError, ContextError, InvalidArgumentError."""
    result = report(options, read_model(options.model))
    print(json.dumps(result) if options.json else table(result))
    return 0


def read_model(text: str) -> ModelConfig:
    """From a folder, a config.json alone, or shape:NAME. Raises CheckpointError."""
    kind, colon, name = text.partition(":")
    if kind == "shape" and colon:
        return shape(name)
    path = Path(text)
    if path.is_dir():
        return ModelConfig.from_hf(path)
    if not path.is_file():
        known = ", ".join(SHAPES)
        raise CheckpointError(f"{text} is no folder and no config.json; shape:NAME has {known}")
    return ModelConfig.from_dict(path.resolve().parent.name, read_json(path), {})


def report(options: argparse.Namespace, config: ModelConfig) -> dict[str, Any]:
    """The JSON object. See this file's first lines."""
    per_token = {kind.name.lower(): token_bytes(config, kind) for kind in KvType}
    schemes = {}
    for scheme in [options.scheme] if options.scheme else SCHEMES:
        precisions = SCHEMES[scheme][0]
        chosen = options.precision if options.scheme or options.precision in precisions else None
        kept = PROJECTIONS if options.projections == "trusted" else ()
        shielded = options.rope == "worker"
        case = Case(config, chosen or precisions[0], options.context, options.stock, shielded, kept=kept)
        schemes[scheme] = _scheme(cost(scheme, case), case, options)
    return {
        "model": config.name,
        "context": options.context,
        "stock": options.stock,
        "kv_bytes_per_token": per_token,
        "kv_bytes": {kind: count * options.context for kind, count in per_token.items()},
        "schemes": schemes,
    }


def _scheme(found: Cost, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    pads = found.pads
    seconds = found.exchanges * (options.rtt_us or 0) / 1e6
    seconds += (found.bytes_up + found.bytes_down) / options.bandwidth if options.bandwidth else 0
    return {
        "precision": case.precision,
        "exchanges": found.exchanges,
        "bytes_up": found.bytes_up,
        "bytes_down": found.bytes_down,
        "prompt_bytes_up": found.prompt_up,
        "prompt_bytes_down": found.prompt_down,
        "start_bytes_up": found.start_up,
        "macs_trusted": found.macs_trusted,
        "macs_worker": found.macs_worker,
        "memory_budget": sum(found.memory.values()),
        "memory_parts": found.memory,
        "fits_in": holding(sum(found.memory.values())),
        "lookup": found.lookup and vars(found.lookup),
        "pad": pads and {**vars(pads), "bank_bytes": case.stock * pads.sealed_bytes},
        "link_tokens_per_second": 1 / seconds if seconds else None,
    }


def table(result: Mapping[str, Any]) -> str:
    """The report for people: one column for each scheme."""
    kinds = result["kv_bytes_per_token"]
    context, columns = result["context"], result["schemes"].values()
    lines = [
        f"{result['model']}, a context of {context} tokens",
        "",
        _line("KV cache", kinds),
        _line("  one token", map(size, kinds.values())),
        _line(f"  {context} tokens", map(size, result["kv_bytes"].values())),
        "",
        _line("", result["schemes"]),
        _line("precision", (one["precision"] for one in columns)),
        _line("exchanges per decoded token", (one["exchanges"] for one in columns)),
        *_sizes("bytes up per decoded token", "bytes_up", columns),
        *_sizes("bytes down per decoded token", "bytes_down", columns),
        *_sizes("bytes up per prompt row", "prompt_bytes_up", columns),
        *_sizes("bytes down per prompt row", "prompt_bytes_down", columns),
        *_sizes("bytes up once, at the start", "start_bytes_up", columns),
        *_lookups(columns),
        *_parts("MACs of the trusted worker", "macs_trusted", columns, macs),
        *_parts("MACs of the GPU worker", "macs_worker", columns, macs),
        *_parts("smallest memory, trusted worker", "memory_parts", columns, size),
        _line("smallest TEE profile that fits", ((one["fits_in"] or ["-"])[0] for one in columns)),
        *_pads(result["stock"], columns),
        *_link(columns),
    ]
    linked = any(one["link_tokens_per_second"] for one in columns)
    return "\n".join(lines) + "\n" + _NOTES + _profiles() + (_LINK_NOTE if linked else "")


def _profiles() -> str:
    sizes = ", ".join(f"{name} {size(one.bytes).replace('.0', '')}" for name, one in PROFILES.items() if one.bytes)
    return f"TEE profiles: {sizes}.\n"


def macs(count: float) -> str:
    """Multiply-accumulates for people: 6607077376 -> 6.61 G."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} G" if count < 1000 else f"{count:.0f} G"


def _line(name: str, cells: Iterable[object]) -> str:
    return f"{name:<33}" + "".join(f"{cell!s:>14}" for cell in cells)


def _sizes(name: str, key: str, columns: Iterable[Mapping[str, Any]]) -> list[str]:
    return [_line(name, (size(one[key]) if one[key] else "-" for one in columns))]


def _parts(name: str, key: str, columns: Iterable[Mapping[str, Any]], show: Show) -> list[str]:
    """A sum, and below it what it is made of; a part that no column has is left out."""
    names = dict.fromkeys(part for one in columns for part, count in one[key].items() if count)
    cells = {part: [show(one[key][part]) if one[key].get(part) else "-" for one in columns] for part in names}
    sums = [sum(one[key].values()) for one in columns]
    total = _line(name, (show(count) if count else "-" for count in sums))
    return [total, *(_line(f"  {part}", line) for part, line in cells.items())]


def _lookups(columns: Iterable[Mapping[str, Any]]) -> list[str]:
    found = [one["lookup"] for one in columns]
    if not any(found):
        return []
    keys = {"masked lookup, bytes up": "bytes_up", "masked lookup, bytes down": "bytes_down"}
    return [_line(name, (size(one[key]) if one else "-" for one in found)) for name, key in keys.items()]


def _pads(stock: int, columns: Iterable[Mapping[str, Any]]) -> list[str]:
    pads = [one["pad"] for one in columns]
    if not any(pads):
        return []
    rows: dict[str, tuple[str, Show]] = {
        "one pad, 32-bit words": ("words", lambda count: f"{count:,}"),
        "one pad, MACs to make it": ("macs", macs),
        "one pad, sealed in the bank": ("sealed_bytes", size),
        f"bank for {stock} pads": ("bank_bytes", size),
    }
    return [_line(name, (show(pad[key]) if pad else "-" for pad in pads)) for name, (key, show) in rows.items()]


def _link(columns: Iterable[Mapping[str, Any]]) -> list[str]:
    rates = [one["link_tokens_per_second"] for one in columns]
    if not any(rates):
        return []
    return [_line("tokens/s, at most, by the link", (f"{rate:,.1f}" if rate else "-" for rate in rates))]
