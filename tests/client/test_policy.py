from datetime import UTC, datetime

import pytest

from client.attestation.policy import Offer, Policy, VerifiedPeer, verify
from wire.errors import UnauthenticatedError

OFFER = Offer(b"n" * 32, b"", b"k" * 32, b"{}")
NOW = datetime.now(UTC)


@pytest.mark.parametrize("target", ["127.0.0.1:7", "[::1]:7", "localhost:7", "unix:/run/cleave.sock"])
def test_none_is_accepted_on_this_machine_and_stays_unverified(target: str) -> None:
    peer = verify(target, "none", Policy(), OFFER)
    assert (peer.provider, peer.verified, peer.steps) == ("none", False, ())
    assert (peer.hpke_key, peer.claims) == (OFFER.hpke_key, OFFER.claims)


@pytest.mark.parametrize("target", ["10.0.0.1:7", "example.org:7", "dns:///localhost:7", "[2001:db8::1]:7"])
def test_none_is_refused_elsewhere_unless_told_so(target: str) -> None:
    with pytest.raises(UnauthenticatedError, match="--insecure-unattested"):
        verify(target, "none", Policy(), OFFER)
    assert not verify(target, "none", Policy(allow_unattested=True), OFFER).verified


@pytest.mark.parametrize("provider", ["sev-snp", "tdx", "", "None", "simulated"])
def test_other_providers_are_refused_even_with_the_insecure_switch(provider: str) -> None:
    with pytest.raises(UnauthenticatedError, match="cannot verify"):
        verify("127.0.0.1:7", provider, Policy(allow_unattested=True), OFFER)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_another_size_is_refused(size: int) -> None:
    offer = Offer(OFFER.nonce, b"", bytes(size), b"{}")
    with pytest.raises(UnauthenticatedError, match="no key of 32 bytes"):
        verify("127.0.0.1:7", "none", Policy(), offer)


def test_nobody_else_makes_a_verified_peer() -> None:
    with pytest.raises(TypeError):
        VerifiedPeer("127.0.0.1:7", "none", True, OFFER.hpke_key, OFFER.claims, OFFER, NOW, seal=object())
