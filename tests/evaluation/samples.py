"""Samples with figures that are easy to add up."""

from dataclasses import replace
from typing import Any

from client.counters import Counters
from evaluation.measure import Sample
from wire.metrics import TRANSPORTS
from wire.v1 import trusted_worker_pb2 as pb

ZERO = Counters.of(pb.StatsResponse(transport_counts=[0] * (len(TRANSPORTS) + 1)))


def sample(gaps: list[float], tokens: int = 10, first: float = 0.5, **after: Any) -> Sample:
    """One repetition; the counters were all zero before it."""
    cpu = {"client": 0.1, "trusted_worker": 0.2, "gpu_worker": 0.4}
    return Sample(first, gaps, tokens, ZERO, replace(ZERO, **after), cpu, None, (ZERO, ZERO))


def bench_row(scheme: str, precision: str, plane: str, rate: float, **more: Any) -> dict[str, Any]:
    """A row of the bench as JSON has it; of one session."""
    cpu = {"client": 0.001, "trusted_worker": 0.002, "gpu_worker": 0.004}
    padded = scheme == "secure-infer"
    figures = {
        "context": 32,
        "batch": 1,
        "ms_per_token": 1000 / rate,
        "ms_per_token_spread": [900 / rate, 1100 / rate],
        "tokens_per_second": rate,
        "of_plain": 0.5,
        "tokens_per_second_sustained": rate / 2 if padded else rate,
        "time_to_first_token": 0.2,
        "first_token_of_plain": None,
        "exchanges_per_token": 25.0,
        "bytes_per_token": 2048.0,
        "cpu_seconds_per_token": cpu,
        "cpu_seconds_per_token_sustained": cpu | {"trusted_worker": 0.009},
        "shares": {"worker": 0.25, "exchange": 0.5, "trusted": 0.25},
        "exchange_us": 120.0,
        "exchange_p50_us": 110.0,
        "exchange_p99_us": 340.0,
        "bare_exchange_p50_us": 95.0,
        "pad_seconds_per_token": 0.007 if padded else None,
        "pad_wall_seconds_per_token": 0.008 if padded else None,
        "products_inside": 3,
        "prompt_products_inside": 40,
        "refill_macs_per_second": 24e9 if padded else None,
        "roofline": None,
    }
    return {"scheme": scheme, "precision": precision, "plane": plane} | figures | more


def roofline(seconds: float) -> dict[str, Any]:
    """Of a step that takes so long at least."""
    bound = {"weight_bytes": 400 << 20, "cache_bytes": 50 << 20, "reading_seconds": seconds, "decode_seconds": seconds}
    bound |= {"multiplying_seconds": 0.001, "decode_ratio": 1.25, "prompt_macs": 3_000_000_000}
    return bound | {"prompt_seconds": 0.1, "prompt_ratio": 2.0}


def bench_result(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What --json prints."""
    what = {"model": "demo", "machine": "m", "tee_profile": "", "switch_us": 0, "data_plane": "grpc", "tokens": 10}
    what |= {
        "repeat": 3,
        "interleaved": "x",
        "prefill": "auto",
        "projections": None,
        "notes": [],
        "ratios": [],
        "rates": None,
    }
    return what | {"rows": list(rows)} | more
