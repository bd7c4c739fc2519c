"""The simulated TEE, the policy that is written for it, and the verifier: nothing between them is stubbed."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from client import report
from client.attestation import policy_file
from client.attestation.checklist import PASSED, Refusal
from client.attestation.examine import MARKER
from client.attestation.policy import Offer, Policy, VerifiedPeer, verify
from client.attestation.snp_products import AMD_ROOTS
from tests.client.attestation import policies
from tests.client.attestation.dev_pki import AT, Pki, evidence
from tests.client.attestation.policies import GOOD_CLAIMS
from tests.client.attestation.simulator import CLAIMS, KEY, NONCE, Simulator
from wire.binding import canonical, report_data
from wire.errors import DeniedError, UnauthenticatedError

LOCAL = "127.0.0.1:7"


def judge(policy: str, offer: Offer, target: str = LOCAL, provider: str = "simulated") -> VerifiedPeer:
    return verify(target, provider, Policy(rules=policy_file.read(policy)), offer)


@pytest.mark.parametrize("target", [LOCAL, "unix:/run/cleave.sock"])
def test_fresh_evidence_is_accepted_under_the_policy_of_its_start(simulator: Simulator, target: str) -> None:
    peer = judge(simulator.policy(), simulator.offer(), target)
    assert (peer.provider, peer.verified, peer.hpke_key, peer.claims) == ("simulated", False, KEY, CLAIMS)
    fields = {step.field for step in peer.steps if step.verdict == PASSED}
    assert {"chain", "report signature", "reported TCB", "chip id", "measurement", "report data"} <= fields
    assert {"claims", "claims: schemes", "claims: insecure"} <= fields


def test_every_report_says_what_it_is(simulator: Simulator) -> None:
    first, second = (simulator.evidence(bytes(64)) for _ in range(2))
    assert first.report[0x10:0x20] == second.report[0x10:0x20] == MARKER
    assert first.report != second.report
    assert first.certificates == second.certificates


@pytest.mark.refusal
@pytest.mark.parametrize("target", ["10.0.0.1:7", "example.org:7", "dns:///localhost:7"])
def test_it_is_denied_from_another_machine(simulator: Simulator, target: str) -> None:
    with pytest.raises(DeniedError, match="not on this machine"):
        judge(simulator.policy(), simulator.offer(), target)


@pytest.mark.refusal
def test_two_starts_have_different_roots_and_refuse_each_other(simulator: Simulator, tmp_path: Path) -> None:
    other = Simulator(tmp_path / "tsm")
    try:
        assert other.root != simulator.root
        assert other.measurement == simulator.measurement
        assert judge(other.policy(), other.offer()).hpke_key == KEY
        with pytest.raises(Refusal) as refused:
            judge(simulator.policy(), other.offer())
    finally:
        other.stop()
    assert refused.value.step.field == "chain"
    assert "this start of the worker" in refused.value.advice  # and nothing about AMD


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"root": "ab" * 32}, "chain"),
        ({"measurement": "ab" * 48}, "measurement"),
    ],
)
def test_a_policy_for_something_else_refuses(simulator: Simulator, change: dict[str, str], field: str) -> None:
    with pytest.raises(Refusal) as refused:
        judge(simulator.policy(**change), simulator.offer())
    assert refused.value.step.field == field


@pytest.mark.refusal
@pytest.mark.parametrize(
    "change",
    [
        lambda offer: replace(offer, nonce=b"o" * 32),
        lambda offer: replace(offer, hpke_key=b"l" * 32),
        lambda offer: replace(offer, claims=canonical({**GOOD_CLAIMS, "build": "other"})),
    ],
    ids=["replayed nonce", "other HPKE key", "other claims"],
)
def test_evidence_over_something_else_is_refused(simulator: Simulator, change: Callable[[Offer], Offer]) -> None:
    with pytest.raises(Refusal) as refused:
        judge(simulator.policy(), change(simulator.offer()))
    assert refused.value.step.field == "report data"


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("claims", "field"),
    [
        ({"schemes": ["plain"]}, "claims: schemes"),
        ({"schemes": ["secure-infer", "plain"]}, "claims: schemes"),
        ({"schemes": []}, "claims: schemes"),
        ({"insecure": ["--insecure-clear-adapter"]}, "claims: insecure"),
        ({"extra": "1"}, "claims"),
    ],
)
def test_bound_claims_that_the_policy_does_not_allow_are_refused(
    simulator: Simulator, claims: dict[str, object], field: str
) -> None:
    with pytest.raises(Refusal) as refused:
        judge(simulator.policy(), simulator.offer(claims=canonical({**GOOD_CLAIMS, **claims})))
    assert refused.value.step.field == field
    assert {"report data", field} <= {step.field for step in refused.value.steps}


@pytest.mark.refusal
def test_the_marker_cannot_be_taken_off(simulator: Simulator) -> None:
    offer = simulator.offer()
    bare = offer.evidence[:0x10] + bytes(16) + offer.evidence[0x20:]
    with pytest.raises(Refusal, match="marker"):
        judge(simulator.policy(), replace(offer, evidence=bare))


@pytest.mark.refusal
def test_it_is_no_hardware(simulator: Simulator) -> None:
    offer = simulator.offer(provider="sev-snp")
    with pytest.raises(Refusal) as refused:
        judge(policies.policy("sev-snp"), offer, provider="sev-snp")
    assert refused.value.step.field == "chain"
    with pytest.raises(Refusal) as refused:
        judge(policies.policy("sev-snp"), simulator.offer())
    assert refused.value.step.field == "provider"


@pytest.mark.refusal
def test_hardware_is_refused_under_a_simulated_policy(
    simulator: Simulator, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AMD_ROOTS, "Milan", pki.roots["Milan"])
    made = evidence(pki, report_data=report_data("sev-snp", NONCE, KEY, CLAIMS))
    offer = Offer(NONCE, made.report, KEY, CLAIMS, made.certificates)
    hardware = Policy(rules=policy_file.read(policies.policy("sev-snp")))
    assert report.attestation(verify("10.0.0.1:7", "sev-snp", hardware, offer, AT)) == "verified: sev-snp"
    for provider, field in (("sev-snp", "provider"), ("simulated", "provider")):
        with pytest.raises(Refusal) as refused:
            judge(simulator.policy(), offer, provider=provider)
        assert refused.value.step.field == field


@pytest.mark.refusal
def test_without_a_policy_file_it_is_refused(simulator: Simulator) -> None:
    with pytest.raises(UnauthenticatedError, match="--policy"):
        verify(LOCAL, "simulated", Policy(allow_unattested=True), simulator.offer())


@pytest.mark.refusal
@pytest.mark.parametrize("key", [b"", b"k" * 31, b"k" * 33])
def test_a_key_of_another_size_is_refused_although_evidence_binds_it(simulator: Simulator, key: bytes) -> None:
    with pytest.raises(UnauthenticatedError, match="no key of 32 bytes"):
        judge(simulator.policy(), simulator.offer(key=key))


@pytest.mark.parametrize(
    ("terminal", "no_color", "red"), [(False, "", False), (True, "", True), (True, "1", False), (False, "1", False)]
)
def test_it_is_shown_in_red_on_a_terminal_and_only_there(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, terminal: bool, no_color: str, red: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    shown = report.attestation(judge(simulator.policy(), simulator.offer()))
    assert "SIMULATED TEE: whoever runs this machine can read the conversation" in shown
    assert ("\x1b[0;1;31m" in shown) == red
    assert ("\x1b" in shown) == red
