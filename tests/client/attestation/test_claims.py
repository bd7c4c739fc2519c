"""Claims are matched field by field; each that is wrong is named."""

import pytest

from client.attestation import claims
from client.attestation.checklist import NOT_CHECKED, PASSED, Refusal
from client.attestation.policy_file import read
from tests.client.attestation.policies import ALL
from tests.client.attestation.policies import GOOD_CLAIMS as GOOD
from wire.binding import canonical

RULES = read(ALL).claims


def test_good_claims_match() -> None:
    taken = claims.match(RULES, canonical(GOOD), "tdx")
    assert {step.field: step.verdict for step in taken if step.verdict != PASSED} == {
        "claims: config_digest": NOT_CHECKED
    }


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("build", "cleave 0.2.0"),
        ("model_digest", "02" * 32),
        ("schemes", ["secure-infer", "plain"]),
        ("schemes", []),
        ("insecure", ["--insecure-clear-adapter"]),
    ],
)
def test_a_claim_that_does_not_match_is_named(name: str, value: object) -> None:
    with pytest.raises(Refusal) as refused:
        claims.match(RULES, canonical({**GOOD, name: value}), "tdx")
    assert refused.value.step.field == f"claims: {name}"


@pytest.mark.refusal
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"\xff",
        b"{}",
        canonical(GOOD) + b" ",
        canonical(GOOD).replace(b",", b", "),
        canonical({**GOOD, "more": "x"}),
        canonical({key: value for key, value in GOOD.items() if key != "insecure"}),
        canonical({**GOOD, "build": 1}),
        canonical({**GOOD, "schemes": "plain"}),
        canonical({**GOOD, "schemes": [["plain"]]}),
        canonical({**GOOD, "build": "x" * claims.MAX_CLAIMS_BYTES}),
        b"[" * 10_000,
    ],
)
def test_other_forms_are_refused(raw: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        claims.match(RULES, raw, "tdx")
    assert refused.value.step.field == "claims"
