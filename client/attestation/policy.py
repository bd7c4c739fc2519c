"""The attestation policy: what a peer must prove before this client sends it anything.

`verify` is the only code that makes a `VerifiedPeer`, and every call that carries a prompt needs one. It fails
closed: an unknown provider, and provider "none" anywhere but on this machine, are refused.

Provider "none" is an ordinary process (emulation). It proves nothing: accepting it is a statement about where the
process runs, so `verified` stays False and the client says so after every answer.
"""

from dataclasses import InitVar, dataclass
from typing import Final

from wire.channel import is_local
from wire.errors import UnauthenticatedError

UNATTESTED = "none"
_SEAL: Final = object()  # only `verify` holds it


@dataclass(frozen=True)
class Policy:
    """What the user accepts beyond verified evidence."""

    allow_unattested: bool = False  # --insecure-unattested: provider "none" on another machine


@dataclass(frozen=True)
class VerifiedPeer:
    """A peer that the policy accepted. Made by `verify` alone; the constructor refuses everybody else."""

    target: str
    provider: str
    verified: bool  # whether evidence was checked; False for provider "none"
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("only client.attestation.policy.verify makes a VerifiedPeer")


def verify(target: str, provider: str, policy: Policy) -> VerifiedPeer:
    """Judge what a peer answered to Attest. Raises UnauthenticatedError with what to do about it."""
    if provider != UNATTESTED:
        raise UnauthenticatedError(
            f"this client cannot verify evidence of provider {provider[:32]!r}; nothing was sent: "
            "use a client that knows this provider"
        )
    if not (is_local(target) or policy.allow_unattested):
        raise UnauthenticatedError(
            f"{target} gives no evidence of what it runs and is not on this machine; nothing was sent: connect to a "
            "loopback address, or pass --insecure-unattested to send your prompts to it in the clear"
        )
    return VerifiedPeer(target, provider, verified=False, seal=_SEAL)
