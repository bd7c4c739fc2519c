"""`cleave attest --connect`, and what it saves, judged again: with the simulated TEE behind a real socket."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.__main__ import main
from client.attestation.fetch import fetch
from client.attestation.policy import Offer
from tests.client.attestation.policies import GOOD_CLAIMS
from tests.client.attestation.simulator import CLAIMS, KEY, Simulator, serving
from wire.binding import canonical
from wire.errors import UnauthenticatedError, UnavailableError

Output = pytest.CaptureFixture[str]
Change = Callable[[Any], Any]


@pytest.fixture
def policy(simulator: Simulator, tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(simulator.policy())
    return path


@pytest.fixture
def saved(simulator: Simulator, policy: Path, tmp_path: Path, capsys: Output) -> Path:
    """A bundle that `--save` wrote."""
    path = tmp_path / "bundle.json"
    with serving(lambda nonce: ("simulated", simulator.offer(nonce))) as (target, _):
        assert main(["attest", "--connect", target, "--policy", str(policy), "--save", str(path)]) == 0
    capsys.readouterr()
    return path


def verify(bundle: Path, policy: Path, *more: str) -> int:
    return main(["attest", "verify", "--evidence", str(bundle), "--policy", str(policy), *more])


def test_a_worker_is_judged_over_a_fresh_nonce(simulator: Simulator, policy: Path, capsys: Output) -> None:
    with serving(lambda nonce: ("simulated", simulator.offer(nonce))) as (target, attester):
        for _ in range(2):
            assert main(["attest", "--connect", target, "--policy", str(policy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(" 22  passed       report data" in line for line in lines)
    assert any("passed       claims: schemes" in line for line in lines)
    assert any(line.startswith("SIMULATED") for line in lines)
    assert lines[-1].startswith("accepted; not checked: ")
    assert lines[-1].endswith(" of the steps")
    assert [len(nonce) for nonce in attester.nonces] == [32, 32]
    assert len(set(attester.nonces)) == 2
    assert attester.other_calls == 0


def test_json(simulator: Simulator, policy: Path, capsys: Output) -> None:
    with serving(lambda nonce: ("simulated", simulator.offer(nonce))) as (target, _):
        assert main(["attest", "--connect", target, "--policy", str(policy), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["verdict"], result["provider"], result["advice"]) == ("accepted", "simulated", None)
    assert [step["field"] for step in result["steps"]][-1] == "claims: insecure"


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda offer: replace(offer, hpke_key=b"l" * 32), "report data"),
        (lambda offer: replace(offer, claims=canonical({**GOOD_CLAIMS, "build": "other"})), "report data"),
        (lambda offer: replace(offer, evidence=offer.evidence[:-1]), "size"),
        (lambda offer: replace(offer, certificates=offer.certificates[:2]), "chain"),
    ],
    ids=["other key", "other claims", "cut off", "no root"],
)
def test_a_worker_that_changes_something_is_refused(
    simulator: Simulator, policy: Path, capsys: Output, change: Change, field: str
) -> None:
    with serving(lambda nonce: ("simulated", change(simulator.offer(nonce)))) as (target, attester):
        assert main(["attest", "--connect", target, "--policy", str(policy), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["steps"][-1]["field"] == field
    assert attester.other_calls == 0


@pytest.mark.refusal
def test_a_replayed_answer_is_refused_and_saved_for_inspection(
    simulator: Simulator, policy: Path, tmp_path: Path, capsys: Output
) -> None:
    old = simulator.offer(b"o" * 32)
    path = tmp_path / "refused.json"
    with serving(lambda nonce: ("simulated", old)) as (target, _):
        assert main(["attest", "--connect", target, "--policy", str(policy), "--save", str(path)]) == 1
    assert "refused at step 22, report data" in capsys.readouterr().out
    assert verify(path, policy) == 1
    assert "refused at step 22, report data" in capsys.readouterr().out


@pytest.mark.refusal
@pytest.mark.parametrize("provider", ["none", "sev-snp", "tdx", "", "x" * 1000])
def test_a_provider_that_the_policy_does_not_name_is_refused(
    simulator: Simulator, policy: Path, capsys: Output, provider: str
) -> None:
    with serving(lambda nonce: (provider, simulator.offer(nonce))) as (target, _):
        assert main(["attest", "--connect", target, "--policy", str(policy)]) == 1
    assert "refused at step 0, provider" in capsys.readouterr().out


@pytest.mark.refusal
def test_another_machine_is_denied(
    simulator: Simulator, policy: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.attestation.policy.is_local", lambda target: False)
    with serving(lambda nonce: ("simulated", simulator.offer(nonce))) as (target, _):
        assert main(["attest", "--connect", target, "--policy", str(policy)]) == 1
    assert "not on this machine" in capsys.readouterr().err


def test_a_nonce_of_the_worker_is_taken_only_where_none_was_sent(simulator: Simulator) -> None:
    own = b"w" * 32
    with serving(lambda nonce: ("simulated", simulator.offer(own))) as (target, attester):
        assert fetch(target, b"m" * 32, 5)[1].nonce == b"m" * 32
        assert fetch(target, b"", 5)[1].nonce == own
    assert attester.nonces == [b"m" * 32, b""]
    with (
        serving(lambda nonce: ("simulated", Offer(b"", b"", KEY, CLAIMS))) as (target, _),
        pytest.raises(UnauthenticatedError, match="no nonce of 32 bytes"),
    ):
        fetch(target, b"", 5)


def test_nobody_there(policy: Path, capsys: Output) -> None:
    assert main(["attest", "--connect", "127.0.0.1:1", "--policy", str(policy)]) == 1
    assert "no trusted worker answers" in capsys.readouterr().err
    with pytest.raises(UnavailableError):
        fetch("127.0.0.1:1", b"n" * 32, 5)


def test_a_bundle_is_judged_again_with_report_data_and_claims(saved: Path, policy: Path, capsys: Output) -> None:
    assert set(json.loads(saved.read_text())) == {
        "bundle", "time", "provider", "nonce", "hpke_key", "evidence", "claims", "certificates", "collateral",
    }  # fmt: skip
    assert verify(saved, policy, "--json") == 0
    steps = {step["field"]: step["verdict"] for step in json.loads(capsys.readouterr().out)["steps"]}
    assert steps["report data"] == steps["claims: schemes"] == "passed"
    assert verify(saved, policy, "--at", "2000-01-01") == 1
    assert "validity" in capsys.readouterr().out


OTHER_CLAIMS = base64.b64encode(canonical({**GOOD_CLAIMS, "build": "other"})).decode()


def _flip(value: str, at: int) -> str:
    data = bytearray(base64.b64decode(value))
    data[at] ^= 1
    return base64.b64encode(data).decode()


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("provider", lambda value: "sev-snp", "provider"),
        ("provider", lambda value: "none", "provider"),
        ("nonce", lambda value: "00" * 32, "report data"),
        ("hpke_key", lambda value: "00" * 32, "report data"),
        ("claims", lambda value: OTHER_CLAIMS, "report data"),
        ("evidence", lambda value: _flip(value, 0x90), "report signature"),
        ("certificates", lambda value: [_flip(value[0], -1), *value[1:]], "chain"),
        ("certificates", lambda value: value[1:], "chain"),
        ("collateral", lambda value: [base64.b64encode(b"x").decode()], "revocation"),
    ],
)
def test_a_bundle_in_which_one_field_was_changed_is_refused(
    saved: Path, policy: Path, capsys: Output, name: str, change: Change, field: str
) -> None:
    values = json.loads(saved.read_text())
    saved.write_text(json.dumps({**values, name: change(values[name])}))
    assert verify(saved, policy, "--json") == 1
    assert json.loads(capsys.readouterr().out)["steps"][-1]["field"] == field


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bundle": 2}, "another version"),
        ({"surprise": 1}, "other fields"),
        ({"provider": 1}, "other fields"),
        ({"nonce": "00"}, "field nonce is damaged"),
        ({"hpke_key": 7}, "field hpke_key is damaged"),
        ({"evidence": "?"}, "field evidence is damaged"),
        ({"claims": None}, "field claims is damaged"),
        ({"certificates": "AAAA"}, "field certificates is damaged"),
        ({"collateral": [1]}, "field collateral is damaged"),
    ],
)
def test_a_damaged_bundle_is_no_verdict(
    saved: Path, policy: Path, capsys: Output, change: dict[str, object], reason: str
) -> None:
    saved.write_text(json.dumps({**json.loads(saved.read_text()), **change}))
    assert verify(saved, policy) == 2
    assert reason in capsys.readouterr().err


def test_a_bundle_takes_nothing_from_beside_it(saved: Path, policy: Path, capsys: Output) -> None:
    assert verify(saved, policy, "--report-data", "00" * 64) == 2
    assert verify(saved, policy, "--certs", str(policy)) == 2
    assert "a bundle has all with it" in capsys.readouterr().err


def test_what_cannot_be_saved(simulator: Simulator, policy: Path, tmp_path: Path, capsys: Output) -> None:
    nowhere = str(tmp_path / "absent" / "bundle.json")
    with serving(lambda nonce: ("simulated", simulator.offer(nonce))) as (target, _):
        assert main(["attest", "--connect", target, "--policy", str(policy), "--save", nowhere]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--connect HOST:PORT and --policy FILE"),
        (["--connect", "127.0.0.1:1"], "--connect HOST:PORT and --policy FILE"),
        (["--policy", "p"], "--connect HOST:PORT and --policy FILE"),
        (["--connect", "127.0.0.1:1", "verify", "--evidence", "e", "--policy", "p"], "go without an action"),
        (["--save", "s", "verify", "--evidence", "e", "--policy", "p"], "go without an action"),
    ],
)
def test_usage(capsys: Output, words: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["attest", *words])
    assert left.value.code == 2
    assert says in capsys.readouterr().err
