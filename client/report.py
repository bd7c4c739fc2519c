"""What an answer cost, as one JSON object and as one status line. Both read the same numbers."""

from typing import Any

from client.answer import Answer
from client.attestation.policy import UNATTESTED, VerifiedPeer
from client.session import Counters, Request
from client.terminal import size

_DIFFERENCES = (
    "exchanges",
    "wire_bytes_up",
    "wire_bytes_down",
    "pads_issued",
    "products_verified",
    "products_inside",
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
        "secure_memory": {"budget": answer.after.memory_budget, "peak": answer.after.memory_peak},
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
    if answer.finish_reason not in ("eos", "stop"):
        parts.append(f"ended: {answer.finish_reason}")
    return " | ".join(parts)


def attestation(peer: VerifiedPeer) -> str:
    """The state of the attestation, never flattering."""
    if peer.provider == UNATTESTED:
        return "attestation: none (emulation)"
    return f"attestation: {peer.provider} ({'verified' if peer.verified else 'NOT verified'})"


def table(counters: Counters) -> str:
    """All counters, for /stats."""
    rows = {
        "exchanges with the GPU worker": f"{counters.exchanges:,}",
        "bytes to it / from it": f"{size(counters.wire_bytes_up)} / {size(counters.wire_bytes_down)}",
        "pads issued / used twice": f"{counters.pads_issued:,} / {counters.pads_reused}",
        "pads in stock": f"{counters.pads_in_stock:,} of {counters.pads_capacity:,}",
        "products verified / rejected": f"{counters.products_verified:,} / {counters.products_failed}",
        "products computed inside": f"{counters.products_inside:,}",
        "cache pages sealed / restored": f"{counters.pages_sealed:,} / {counters.pages_restored:,}",
        "permutations renewed": f"{counters.permutations_renewed:,}",
        "secure memory used / peak": f"{size(counters.memory_used)} / {size(counters.memory_peak)}",
        "secure memory budget": f"{size(counters.memory_budget)}, locked: {'yes' if counters.memory_locked else 'no'}",
        "resident set of the process": size(counters.rss),
        "sessions / tokens": f"{counters.sessions} / {counters.tokens:,}",
    }
    return "\n".join(f"  {name:<30} {value}" for name, value in rows.items())
