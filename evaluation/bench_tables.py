"""What cleave-bench prints of its rows, for people: Markdown. docs/benchmarks/README.md says what the figures mean."""

from collections.abc import Sequence
from typing import Any

from evaluation.tables import head, table

Rows = list[dict[str, Any]]

_COLUMNS = (
    "scheme",
    "precision",
    "plane",
    "prompt",
    "batch",
    "ms/token",
    "(least to most)",
    "tokens/s",
    "of plain",
    "first token, ms",
    "of plain's",
    "exchanges/token",
    "us/exchange: mean",
    "p50",
    "p99",
    "bare",
    "KiB/token",
    "time in worker / exchange / trusted, %",
    "inside",
)
_EXCHANGES = ("exchange_us", "exchange_p50_us", "exchange_p99_us", "bare_exchange_p50_us")
_PADS = (
    "scheme",
    "plane",
    "prompt",
    "batch",
    "tokens/s online",
    "tokens/s sustained",
    "ms/pad",
    "refill, GMAC/s",
    "CPU ms/token online: client",
    "trusted worker",
    "GPU worker",
    "sustained: trusted worker",
)
_ROOFLINE = (
    "scheme",
    "precision",
    "plane",
    "prompt",
    "batch",
    "MiB read/step",
    "ms to read",
    "ms to multiply",
    "roofline, ms/token",
    "measured",
    "of roofline",
    "prompt, GMAC",
    "roofline, ms",
    "measured first token",
    "of roofline",
)
_RATIOS = ("row", "over", "prompt", "batch", "tokens/s", "(least to most)", "first token's time")
_FHE = ("way", "ms", "of clear", "largest error", "KiB up", "KiB down")
_ROLES = ("client", "trusted_worker", "gpu_worker")


def bench_table(result: dict[str, Any]) -> str:
    """All tables, under lines that say what they are of."""
    what = f"{result['model']}, {result['tokens']} tokens decoded, median of {result['repeat']}"
    what += f" ({result['interleaved']})" + (", pads for all prompt rows" if result["prefill"] == "worker" else "")
    what += f", projections {result['projections']}" if result["projections"] else ""
    rows: Rows = result["rows"]
    lines = [*head(what, result), *result["notes"], "", *table(_COLUMNS, map(_cells, rows))]
    lines += _section(
        "Online and sustained: pads in stock, and with the making of one pad per token", _PADS, _pads(rows)
    )
    lines += _section(_rates(result["rates"]), _ROOFLINE, _rooflines(rows))
    lines += _section("Ratios, paired repetition by repetition", _RATIOS, map(_ratio, result["ratios"]))
    contexts = sorted({row["context"] for row in rows})
    if len(contexts) > 1:
        columns = ("scheme", "precision", "plane", "batch", *(f"ms/token behind {one}" for one in contexts))
        lines += _section("Time per token by context", columns, _by_context(rows, contexts))
    return "\n".join(lines)


def fhe_table(result: dict[str, Any]) -> str:
    """The ways, under the parameters of CKKS."""
    ckks = result["ckks"]
    what = f"One linear of {result['model']}, {result['outputs']} x {result['inputs']}, one row, median of "
    what += f"{result['repeat']}; CKKS: polynomials of degree {ckks['degree']}, moduli of {ckks['modulus_bits']} bits, "
    what += f"scale 2^{ckks['scale_bits']}, {ckks['bits_of_security']} bits of security, tenseal {ckks['tenseal']}, "
    what += f"{ckks['threads']} threads, keys made once in {1000 * ckks['key_seconds']:.0f} ms"
    ratio = f"CKKS takes {result['ckks_of_masked']:.0f} times as long as the one-time pad."
    return "\n".join([what, result["machine"], "", *table(_FHE, map(_way, result["ways"])), "", ratio])


def _section(title: str, columns: Sequence[str], rows: Any) -> list[str]:
    cells = list(rows)
    return ["", title, "", *table(columns, cells)] if cells else []


def _cells(row: dict[str, Any]) -> list[str]:
    least, most = row["ms_per_token_spread"]
    shares = row["shares"]
    parts = [f"{100 * shares[part]:.0f}" for part in ("worker", "exchange", "trusted")] if shares else []
    return [
        *_name(row),
        str(row["context"]),
        str(row["batch"]),
        f"{row['ms_per_token']:.2f}",
        f"{least:.2f} to {most:.2f}",
        f"{row['tokens_per_second']:.1f}",
        _number(row["of_plain"], 2),
        f"{1000 * row['time_to_first_token']:.0f}",
        _number(row["first_token_of_plain"], 2),
        f"{row['exchanges_per_token']:.1f}",
        *(
            _number(row[name], 0)
            for name in ("exchange_us", "exchange_p50_us", "exchange_p99_us", "bare_exchange_p50_us")
        ),
        f"{row['bytes_per_token'] / 1024:.0f}",
        " / ".join(parts) or "-",
        _inside(row),
    ]


def _inside(row: dict[str, Any]) -> str:
    """Products of secure-infer that lacked a pad: of decoding, and of prompts."""
    both = f"{row['products_inside']} + {row['prompt_products_inside']}"
    return both if row["scheme"] == "secure-infer" else "-"


def _pads(rows: Rows) -> list[list[str]]:
    return [_pad(row) for row in rows if row["pad_wall_seconds_per_token"] is not None]


def _pad(row: dict[str, Any]) -> list[str]:
    used, macs = row["cpu_seconds_per_token"], row["refill_macs_per_second"]
    return [
        row["scheme"],
        row["plane"],
        str(row["context"]),
        str(row["batch"]),
        f"{row['tokens_per_second']:.1f}",
        f"{row['tokens_per_second_sustained']:.1f}",
        f"{1000 * row['pad_wall_seconds_per_token']:.1f}",
        _number(macs / 1e9 if macs else None, 1),
        *(f"{1000 * used[role]:.1f}" if role in used else "-" for role in _ROLES),
        f"{1000 * row['cpu_seconds_per_token_sustained']['trusted_worker']:.1f}",
    ]


def _rates(rates: dict[str, Any] | None) -> str:
    if not rates:
        return ""
    macs = {kind: rate / 1e9 for kind, rate in rates["macs_per_second"].items()}
    products = ", ".join(f"of {kind} at {rate:.0f} GMAC/s" for kind, rate in macs.items())
    read = f"{rates['bytes_per_second'] / 1e9:.1f} GB/s read"
    return f"Rooflines: {read}, products {products}, {rates['threads']} threads, measured before and after"


def _rooflines(rows: Rows) -> list[list[str]]:
    return [_roofline(row, row["roofline"]) for row in rows if row["roofline"]]


def _roofline(row: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [
        *_name(row),
        str(row["context"]),
        str(row["batch"]),
        f"{(found['weight_bytes'] + found['cache_bytes']) / (1 << 20):.0f}",
        f"{1000 * found['reading_seconds']:.2f}",
        f"{1000 * found['multiplying_seconds']:.2f}",
        f"{1000 * found['decode_seconds']:.2f}",
        f"{row['ms_per_token']:.2f}",
        f"{found['decode_ratio']:.2f}",
        f"{found['prompt_macs'] / 1e9:.1f}",
        f"{1000 * found['prompt_seconds']:.0f}",
        f"{1000 * row['time_to_first_token']:.0f}",
        f"{found['prompt_ratio']:.2f}",
    ]


def _ratio(one: dict[str, Any]) -> list[str]:
    least, most = one["speed_spread"]
    speeds = [f"{one['speed']:.2f}", f"{least:.2f} to {most:.2f}", f"{one['first_token']:.2f}"]
    return [one["row"], one["baseline"], str(one["context"]), str(one["batch"]), *speeds]


def _by_context(rows: Rows, contexts: list[int]) -> list[list[str]]:
    found = {(*_name(row), row["batch"], row["context"]): row["ms_per_token"] for row in rows}
    kinds = dict.fromkeys(key[:4] for key in found)
    return [[*map(str, kind), *(_number(found.get((*kind, one)), 2) for one in contexts)] for kind in kinds]


def _way(way: dict[str, Any]) -> list[str]:
    sizes = [f"{way[name] / 1024:.0f}" if way[name] else "-" for name in ("bytes_up", "bytes_down")]
    return [way["way"], f"{1000 * way['seconds']:.3f}", f"{way['of_clear']:.1f}", f"{way['error']:.1e}", *sizes]


def _name(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["scheme"], row["precision"], row["plane"]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
