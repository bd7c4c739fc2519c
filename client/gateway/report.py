"""The attestation as JSON: what was shown, how each step judged it, and under which policy."""

from datetime import UTC, datetime
from typing import Any

from client.attestation import bundle
from client.attestation.policy import VerifiedPeer
from client.gateway.link import Failure, Link


def report(link: Link) -> dict[str, Any]:
    """`verdict` is accepted, refused (or nobody answered: see `advice` and `steps`), or pending.

    `bundle` is what `cleave attest verify --evidence` reads, to judge it again without this gateway; `evidence` is the
    report or quote in it, in base64. Refused evidence is not kept: `cleave attest --connect` shows it.
    """
    head = {"ready": link.ready, "target": link.target, "policy_sha256": link.policy_digest or None}
    if link.failure:
        return head | _refused(link.failure)
    if link.trusted and link.ready:
        return head | _accepted(link.trusted.peer)
    return head | _nothing("pending")


def _accepted(peer: VerifiedPeer) -> dict[str, Any]:
    saved = bundle.values(peer.provider, peer.offer, peer.at)
    return {
        "verdict": "accepted",
        "provider": peer.provider,
        "verified": peer.verified,
        "at": peer.at.isoformat(),
        "evidence_age_seconds": round((datetime.now(UTC) - peer.at).total_seconds(), 3),
        "steps": [vars(step) for step in peer.steps],
        "advice": None,
        "evidence": saved["evidence"],
        "bundle": saved,
    }


def _refused(failure: Failure) -> dict[str, Any]:
    return _nothing("none" if failure.number is None else "refused") | {
        "provider": failure.provider,
        "failed_step": {"number": failure.number, "field": failure.field},
        "message": failure.text,
        "steps": [vars(step) for step in failure.steps],
        "advice": failure.advice,
    }


def _nothing(verdict: str) -> dict[str, Any]:
    """Where there is no accepted evidence."""
    return {
        "verdict": verdict,
        "provider": None,
        "verified": False,
        "steps": [],
        "advice": None,
        "evidence": None,
        "bundle": None,
    }
