"""What a peer offers, against a policy: only evidence over this nonce, this key and these claims makes a peer."""

from dataclasses import replace
from typing import Any

import pytest

from client.attestation import examine, policy_file
from client.attestation.checklist import Refusal
from client.attestation.policy import Offer, Policy, VerifiedPeer, verify
from client.attestation.rules import Rules
from client.attestation.snp_case import SnpEvidence
from tests.client.attestation import policies
from tests.client.attestation.dev_pki import AT, Pki, evidence
from tests.client.attestation.policies import GOOD_CLAIMS as GOOD
from wire.binding import canonical, report_data
from wire.errors import DeniedError

NONCE, KEY, CLAIMS = b"n" * 32, b"k" * 32, canonical(GOOD)
LOCAL, REMOTE = "127.0.0.1:7", "10.0.0.1:7"


def rules(pki: Pki, *accept: str) -> Rules:
    return policy_file.read(policies.policy(*accept).replace("ab" * 32, pki.roots["Milan"]))


def offer(pki: Pki, provider: str = "simulated", **changes: Any) -> Offer:
    """Evidence of the simulator: real format, its own root, marked."""
    bound = report_data(provider, NONCE, KEY, CLAIMS)
    fields: dict[str, Any] = {"report_data": bound, "family_id": examine.MARKER, **changes}
    made = evidence(pki, **fields)
    return Offer(NONCE, made.report, KEY, CLAIMS, made.certificates)


def judge(pki: Pki, offered: Offer, target: str = LOCAL, provider: str = "simulated") -> VerifiedPeer:
    return verify(target, provider, Policy(rules=rules(pki, "simulated")), offered, AT)


@pytest.mark.parametrize("target", [LOCAL, "unix:/run/cleave.sock"])
def test_simulated_evidence_makes_a_peer_on_this_machine_and_stays_unverified(pki: Pki, target: str) -> None:
    peer = judge(pki, offer(pki), target)
    assert (peer.provider, peer.verified, peer.hpke_key, peer.claims) == ("simulated", False, KEY, CLAIMS)


@pytest.mark.refusal
def test_simulated_evidence_from_another_machine_is_denied(pki: Pki) -> None:
    with pytest.raises(DeniedError, match="not on this machine"):
        judge(pki, offer(pki), REMOTE)


@pytest.mark.refusal
@pytest.mark.parametrize(
    "change",
    [{"nonce": b"o" * 32}, {"hpke_key": b"l" * 32}, {"claims": canonical({**GOOD, "build": "other"})}],
    ids=["replayed nonce", "other key", "other claims"],
)
def test_evidence_over_something_else_is_refused(pki: Pki, change: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as refused:
        judge(pki, replace(offer(pki), **change))
    assert refused.value.step.field == "report data"


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("changes", "step"),
    [({"measurement": b"\7" * 48}, "measurement"), ({"policy": 0xB0000}, "debug"), ({"vmpl": 1}, "VMPL")],
)
def test_the_simulator_is_held_to_the_same_steps(pki: Pki, changes: dict[str, Any], step: str) -> None:
    with pytest.raises(Refusal) as refused:
        judge(pki, offer(pki, **changes))
    assert refused.value.step.field == step


@pytest.mark.refusal
def test_claims_are_matched_after_the_evidence(pki: Pki) -> None:
    claims = canonical({**GOOD, "insecure": ["--insecure-clear-adapter"]})
    bound = report_data("simulated", NONCE, KEY, claims)
    with pytest.raises(Refusal) as refused:
        judge(pki, replace(offer(pki, report_data=bound), claims=claims))
    assert refused.value.step.field == "claims: insecure"


@pytest.mark.refusal
def test_simulated_evidence_needs_its_marker(pki: Pki) -> None:
    with pytest.raises(Refusal, match="marker"):
        judge(pki, offer(pki, family_id=bytes(16)))


@pytest.mark.refusal
def test_dev_evidence_fails_under_a_hardware_policy(pki: Pki) -> None:
    bound = report_data("sev-snp", NONCE, KEY, CLAIMS)
    with pytest.raises(Refusal) as refused:
        verify(LOCAL, "sev-snp", Policy(rules=rules(pki, "sev-snp")), offer(pki, report_data=bound), AT)
    assert refused.value.step.field == "chain"


@pytest.mark.refusal
@pytest.mark.parametrize("provider", ["sev-snp", "tdx", "none", "", "Simulated", "x" * 1000])
def test_providers_that_the_policy_does_not_name_are_refused(pki: Pki, provider: str) -> None:
    with pytest.raises(Refusal) as refused:
        judge(pki, offer(pki), provider=provider)
    assert (refused.value.step.number, refused.value.step.field) == (0, "provider")


@pytest.mark.refusal
def test_evidence_of_another_kind_is_refused(pki: Pki) -> None:
    with pytest.raises(Refusal, match="another kind"):
        examine.examine("tdx", SnpEvidence(b""), rules(pki, "tdx"), AT, None)


@pytest.mark.refusal
@pytest.mark.parametrize("provider", ["none", "sev-snp"])
def test_a_policy_file_wants_evidence_even_on_this_machine(pki: Pki, provider: str) -> None:
    with pytest.raises(Refusal, match="step 0, provider"):
        judge(pki, Offer(NONCE, b"", KEY, CLAIMS), provider=provider)


@pytest.mark.refusal
def test_an_empty_offer_is_refused(pki: Pki) -> None:
    for provider in ("sev-snp", "tdx"):
        with pytest.raises(Refusal):
            verify(LOCAL, provider, Policy(rules=rules(pki, provider)), Offer(NONCE, b"", KEY, CLAIMS), AT)
