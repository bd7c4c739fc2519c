import pytest

from client.attestation.policy import Policy, VerifiedPeer, verify
from wire.errors import UnauthenticatedError


@pytest.mark.parametrize("target", ["127.0.0.1:7", "[::1]:7", "localhost:7", "unix:/run/cleave.sock"])
def test_none_is_accepted_on_this_machine_and_stays_unverified(target: str) -> None:
    peer = verify(target, "none", Policy())
    assert (peer.provider, peer.verified) == ("none", False)


@pytest.mark.parametrize("target", ["10.0.0.1:7", "example.org:7", "dns:///localhost:7", "[2001:db8::1]:7"])
def test_none_is_refused_elsewhere_unless_told_so(target: str) -> None:
    with pytest.raises(UnauthenticatedError, match="--insecure-unattested"):
        verify(target, "none", Policy())
    assert not verify(target, "none", Policy(allow_unattested=True)).verified


@pytest.mark.parametrize("provider", ["sev-snp", "tdx", "", "None", "simulated"])
def test_other_providers_are_refused_even_with_the_insecure_switch(provider: str) -> None:
    with pytest.raises(UnauthenticatedError, match="cannot verify"):
        verify("127.0.0.1:7", provider, Policy(allow_unattested=True))


def test_nobody_else_makes_a_verified_peer() -> None:
    with pytest.raises(TypeError):
        VerifiedPeer("127.0.0.1:7", "none", True, seal=object())
