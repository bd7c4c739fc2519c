"""What an answer cost, as one JSON object and as one status line, and what `/stats` shows: all of the same counters."""

from typing import Any

from client.answer import Answer
from client.attestation.policy import VerifiedPeer
from client.attestation.rules import SIMULATED
from client.counters import Counters, transport_quantile
from client.session import Request
from client.terminal import one_line, red, size

NO_TEE = "SIMULATED TEE: whoever runs this machine can read the conversation"
_UNCHECKED = "DIGESTS ARE NOT CHECKED (--insecure-unchecked-tiles)"
_DIFFERENCES = (
    "exchanges",
    "wire_bytes_up",
    "wire_bytes_down",
    "pads_issued",
    "products_verified",
    "products_inside",
)

_MEMORY = (
    "kv_pages_used",
    "kv_pages_capacity",
    "pages_sealed",
    "pages_restored",
    "spill_bytes",
    "embedding",
    "table_scans",
    "weights_resident",
    "tiles_read",
    "tiles_unchecked",
    "switch_us",
    "rss",
    "process_limit",
    "process_limit_bytes",
)


def result(answer: Answer, request: Request, peer: VerifiedPeer) -> dict[str, Any]:
    """The JSON object of a one-shot answer. Counters are this answer's; pads_reused counts since the worker started."""
    fields: dict[str, Any] = {
        "text": answer.text,
        "token_ids": [token.token_id for token in answer.tokens],
        "finish_reason": answer.finish_reason,
        "scheme": request.scheme,
        "precision": request.precision,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "seconds": answer.seconds,
        "tokens_per_second": answer.tokens_per_second,
        "time_to_first_token": answer.time_to_first_token,
        **{name: answer.difference(name) for name in _DIFFERENCES},
        "pads_reused": answer.after.pads_reused,
        "secure_memory": _memory(answer.after),
        "attestation": {"provider": peer.provider, "verified": peer.verified},
    }
    if request.logprobs:
        fields["logprobs"] = [
            {
                "token_id": token.token_id,
                "logprob": token.logprob,
                "top": [{"token_id": token_id, "logprob": logprob} for token_id, logprob in token.top],
            }
            for token in answer.tokens
        ]
    return fields


def _memory(counters: Counters) -> dict[str, Any]:
    """Memory after an answer, in bytes and counts since the start. `rss` is the whole process's, arena included."""
    return {
        "profile": counters.tee_profile,
        "budget": counters.memory_budget,
        "used": counters.memory_used,
        "peak": counters.memory_peak,
        "locked": counters.memory_locked,
        "wiped_on_fork": counters.memory_wiped_on_fork,
        "not_dumped": counters.memory_not_dumped,
        **{name: getattr(counters, name) for name in _MEMORY},
    }


def status_line(answer: Answer, request: Request, peer: VerifiedPeer) -> str:
    """One line after an answer."""
    rate = answer.tokens_per_second
    counters = answer.after
    parts = [
        f"{request.scheme} {request.precision}",
        attestation(peer),
        f"{rate:.1f} tokens/s" if rate else f"{len(answer.tokens)} tokens",
        f"{size(answer.bytes_exchanged)} exchanged with the GPU",
        *([f"{counters.pads_in_stock} pads in stock"] if counters.pads_capacity else []),
        f"secure memory {size(counters.memory_used)} of {size(counters.memory_budget)}",
    ]
    if counters.switch_us:
        parts.append(f"{counters.switch_us} us charged for each exchange")
    if counters.tiles_unchecked:
        parts.append(_UNCHECKED)
    if answer.finish_reason not in ("eos", "stop"):
        parts.append(f"ended: {answer.finish_reason}")
    return " | ".join(parts)


def attestation(peer: VerifiedPeer) -> str:
    """The state of the attestation, never flattering: for a note, in red where there is less than there seems."""
    if peer.verified:
        return f"verified: {peer.provider}"
    return red(NO_TEE) if peer.provider == SIMULATED else "attestation: none (emulation)"


def table(counters: Counters) -> str:
    """All counters, for /stats."""
    rows = {
        "exchanges with the GPU worker": f"{counters.exchanges:,}",
        "  each, half / 99 % within": _transport(counters),
        "bytes to it / from it": f"{size(counters.wire_bytes_up)} / {size(counters.wire_bytes_down)}",
        "pads issued / used twice": f"{counters.pads_issued:,} / {counters.pads_reused}",
        "pads in stock": f"{counters.pads_in_stock:,} of {counters.pads_capacity:,}",
        "products verified / rejected": f"{counters.products_verified:,} / {counters.products_failed}",
        "products computed inside": f"{counters.products_inside:,}",
        **_projection_rows(counters),
        "permutations renewed": f"{counters.permutations_renewed:,}",
        **_memory_rows(counters),
        "sessions / tokens": f"{counters.sessions} / {counters.tokens:,}",
    }
    if counters.switch_us:
        rows["charged for each exchange"] = f"{counters.switch_us} us, as a world switch"
    return "\n".join(f"  {name:<30} {value}" for name, value in rows.items())


def _transport(counters: Counters) -> str:
    times = [transport_quantile(counters.transport_counts, share) for share in (0.5, 0.99)]
    within = " / ".join(f"{1e6 * time:,.0f}" for time in times if time is not None)
    return f"{within} us, computing left out" if within else "-"


def _projection_rows(counters: Counters) -> dict[str, str]:
    """Where qkv and o are multiplied, if there is a choice, and what it was decided from, if that was measured."""
    if not counters.projections:
        return {}
    where = "in the trusted worker" if counters.projections == "trusted" else "on the GPU worker"
    outside, inside = 1e6 * counters.projections_outside_seconds, 1e6 * counters.projections_inside_seconds
    costs = f"; a layer's take {outside:,.0f} us there and {inside:,.0f} us inside" if outside else ""
    return {"qkv and o are multiplied": where + costs}


def _memory_rows(counters: Counters) -> dict[str, str]:
    profile = f" (profile {one_line(counters.tee_profile)})" if counters.tee_profile else ""
    read = f"from disk, {counters.tiles_read:,} tiles read" if counters.tiles_read else "-"
    weights = "in the budget" if counters.weights_resident else read
    scans = f", {counters.table_scans:,} scans of the table" if counters.table_scans else ""
    limit = f", {size(counters.process_limit_bytes)}" if counters.process_limit_bytes else ""
    return {
        "secure memory budget": f"{size(counters.memory_budget)}{profile}",
        "  used / peak": f"{size(counters.memory_used)} / {size(counters.memory_peak)}",
        "  locked": _yes(counters.memory_locked),
        "  wiped on fork / not dumped": f"{_yes(counters.memory_wiped_on_fork)} / {_yes(counters.memory_not_dumped)}",
        "cache pages in it": f"{counters.kv_pages_used:,} of {counters.kv_pages_capacity:,}",
        "cache pages sealed / restored": f"{counters.pages_sealed:,} / {counters.pages_restored:,}",
        "parked outside the budget": size(counters.spill_bytes),
        "embeddings": f"{one_line(counters.embedding) or '-'}{scans}",
        "weights": f"{weights}; {_UNCHECKED}" if counters.tiles_unchecked else weights,
        "whole process, resident": f"{size(counters.rss)}; interpreter and libraries: beside the arena, not inside it",
        "  its limit": f"{one_line(counters.process_limit) or 'not enforced'}{limit}",
    }


def _yes(value: bool) -> str:
    return "yes" if value else "NO"
