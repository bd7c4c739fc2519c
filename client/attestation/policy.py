"""The attestation policy: what a peer must prove before this client sends it anything.

`verify` is the only code that makes a `VerifiedPeer`, and every call that carries a prompt needs one. It fails
closed: evidence that no policy file accepts, and provider "none" anywhere but on this machine, are refused.

Provider "none" is an ordinary process (emulation). It proves nothing: accepting it is a statement about where the
process runs, so `verified` stays False and the client says so after every answer. Frames are sealed for its key too,
but nobody vouches for that key. Provider "simulated" proves no more, and `verified` is False for it as well: its
evidence has the real form, under a root that somebody on this machine made.
"""

from dataclasses import InitVar, dataclass, field
from datetime import UTC, datetime
from typing import Final

from client.attestation.checklist import Step
from client.attestation.rules import SIMULATED, Rules
from wire.channel import is_local
from wire.errors import DeniedError, UnauthenticatedError

UNATTESTED = "none"
HPKE_KEY_BYTES = 32  # X25519
_SEAL: Final = object()  # only `verify` holds it


@dataclass(frozen=True)
class Policy:
    """What the user accepts."""

    allow_unattested: bool = False  # --insecure-unattested: provider "none" on another machine
    rules: Rules | None = None  # of a policy file: evidence is then required


@dataclass(frozen=True)
class Offer:
    """What a peer answered to Attest, and the nonce that it was asked with. Nothing in it is trusted."""

    nonce: bytes
    evidence: bytes  # report or quote
    hpke_key: bytes
    claims: bytes  # canonical JSON, as it came
    certificates: tuple[bytes, ...] = ()
    collateral: tuple[bytes, ...] = ()  # SEV-SNP: revocation lists; TDX: one JSON object


@dataclass(frozen=True)
class VerifiedPeer:
    """A peer that the policy accepted. Made by `verify` alone; the constructor refuses everybody else."""

    target: str
    provider: str
    verified: bool  # whether hardware evidence was checked; False for providers "none" and "simulated"
    hpke_key: bytes  # 32 bytes; the evidence is bound to it; whose it is nobody knows with provider "none"
    claims: bytes  # matched with the policy; nobody vouches for them with provider "none"
    offer: Offer  # all that the peer answered, as it was judged
    at: datetime  # when that was
    steps: tuple[Step, ...] = ()  # what was checked; nothing with provider "none"
    seal: InitVar[object] = field(kw_only=True)

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("only client.attestation.policy.verify makes a VerifiedPeer")


def verify(target: str, provider: str, policy: Policy, offer: Offer, at: datetime | None = None) -> VerifiedPeer:
    """Judge what a peer answered to Attest. `at` is now, if nothing is said.

    Raises UnauthenticatedError, and its kind Refusal, with what to do about it; DeniedError for a simulated TEE on
    another machine. Nothing may be sent to the peer then.
    """
    at = at or datetime.now(UTC)
    if len(offer.hpke_key) != HPKE_KEY_BYTES:
        raise UnauthenticatedError(f"{target} offers no key of {HPKE_KEY_BYTES} bytes to seal for; nothing was sent")
    if policy.rules is None:
        _check_unattested(target, provider, policy)
        return VerifiedPeer(target, provider, False, offer.hpke_key, offer.claims, offer, at, seal=_SEAL)
    if provider == SIMULATED and not is_local(target):
        raise DeniedError(f"{target} offers simulated evidence and is not on this machine; nothing was sent")
    from client.attestation.judge import judge  # and cryptography, which a chat without evidence does not need

    steps, verified = judge(provider, offer, policy.rules, at), provider != SIMULATED
    return VerifiedPeer(target, provider, verified, offer.hpke_key, offer.claims, offer, at, steps, seal=_SEAL)


def _check_unattested(target: str, provider: str, policy: Policy) -> None:
    if provider != UNATTESTED:
        raise UnauthenticatedError(
            f"this client cannot verify evidence of provider {provider[:32]!r} without a policy file; "
            "nothing was sent: say with --policy what you accept"
        )
    if not (is_local(target) or policy.allow_unattested):
        raise UnauthenticatedError(
            f"{target} gives no evidence of what it runs and is not on this machine; nothing was sent: connect to a "
            "loopback address, or pass --insecure-unattested to let whoever answers there read your prompts"
        )
