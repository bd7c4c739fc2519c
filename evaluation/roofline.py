"""The speed that a machine allows: what a step must read and multiply, over the rates of reading and multiplying.

A decode step reads every weight of the linears once, whatever the batch, and the KV caches of its sessions; it
multiplies each row with all weights. A prompt multiplies each of its rows with all weights but the head's, which only
the last row needs. Neither can take less time than the slower of the two. Rates are measured in the same run, by a
process of its own with the GPU worker's number of threads (machine_rates.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from client.costs import Case, cost
from evaluation.rows import Row
from wire.linears import PROJECTIONS, all_specs
from wire.model_config import ModelConfig

WIDTHS = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes of a weight
SCALE = 4  # bytes, one for each int8 weight row
CACHE_WIDTHS = {
    ("transformers", "bfloat16"): 2,
    ("transformers", "int8"): 2,
}  # bytes of an element; else those of float32
SCHEMES = ("plain", "tee-only", "transformers")


@dataclass(frozen=True)
class Rates:
    """What this machine does at best, all threads together."""

    threads: int
    bytes_per_second: float  # read-only
    macs_per_second: Mapping[str, float]  # of matrix products of float32 and of bfloat16

    def macs(self, scheme: str, precision: str) -> float:
        """The rate for a row: by the element type of its activations."""
        half = precision == "bfloat16" or (scheme, precision) == ("transformers", "int8")
        return self.macs_per_second["bfloat16" if half else "float32"]

    @classmethod
    def best(cls, measured: Sequence["Rates"]) -> "Rates":
        """The highest of several."""
        macs = {kind: max(one.macs_per_second[kind] for one in measured) for kind in measured[0].macs_per_second}
        return cls(measured[0].threads, max(one.bytes_per_second for one in measured), macs)


@dataclass(frozen=True)
class Roofline:
    """The least seconds of a decode step and of a prompt, why, and by what factor a row was slower."""

    weight_bytes: int
    cache_bytes: int
    reading_seconds: float
    multiplying_seconds: float
    decode_seconds: float
    decode_ratio: float
    prompt_macs: int
    prompt_seconds: float
    prompt_ratio: float


def roofline(config: ModelConfig, row: Row, tokens: int, rates: Rates) -> Roofline | None:
    """Of rows whose weights lie in memory once; None for others. `tokens`: that were decoded."""
    if row.scheme not in SCHEMES or (row.scheme == "tee-only" and not row.weights_resident):
        return None
    rate, macs = rates.macs(row.scheme, row.precision), sum(spec.n * spec.k for spec in all_specs(config))
    weights = weight_bytes(config, row.precision)
    cache = row.batch * cache_bytes(config, row.scheme, row.precision, row.context + tokens // 2)
    reading, multiplying = (weights + cache) / rates.bytes_per_second, row.batch * macs / rate
    decode, prompt = max(reading, multiplying), row.batch * prompt_macs(config, row.context)
    first = max(weights / rates.bytes_per_second, prompt / rate)
    ratio = row.ms_per_token / 1000 / decode
    slower = row.time_to_first_token / first
    return Roofline(weights, cache, reading, multiplying, decode, ratio, prompt, first, slower)


def weight_bytes(config: ModelConfig, precision: str) -> int:
    """Of all linears, the head included."""
    scales = SCALE * sum(spec.n for spec in all_specs(config)) if precision == "int8" else 0
    return WIDTHS[precision] * sum(spec.n * spec.k for spec in all_specs(config)) + scales


def cache_bytes(config: ModelConfig, scheme: str, precision: str, context: int) -> int:
    """Of one session's keys and values."""
    tokens = min(context, config.window or context)
    return CACHE_WIDTHS.get((scheme, precision), 4) * 2 * config.layers * config.kv_width * tokens


def prompt_macs(config: ModelConfig, context: int) -> int:
    """Of the linears and of causal attention, for one prompt."""
    *blocks, head = all_specs(config)
    attention = config.layers * config.q_width * context * (context + 1)
    return context * sum(spec.n * spec.k for spec in blocks) + head.n * head.k + attention


def refill_macs_per_second(config: ModelConfig, row: Row) -> float | None:
    """Multiply-accumulates of a pad over its wall-clock time."""
    if not row.pad_wall_seconds_per_token:
        return None
    kept = PROJECTIONS if row.projections == "trusted" else ()
    found = cost(row.scheme, Case(config, row.precision, 1, kept=kept))
    macs = (found.pads.macs if found.pads else 0) + (found.lookup.macs if found.lookup and row.lookups else 0)
    return macs / row.pad_wall_seconds_per_token


def as_dict(config: ModelConfig, row: Row, tokens: int, rates: Rates | None) -> dict[str, Any]:
    """What a row's JSON has beside its own figures."""
    found = roofline(config, row, tokens, rates) if rates else None
    return {"roofline": asdict(found) if found else None, "refill_macs_per_second": refill_macs_per_second(config, row)}
