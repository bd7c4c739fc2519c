"""TDX: one thing is wrong, the verdict names its step. Signatures are real; what dcap-qvl says is stubbed here."""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from client.attestation import tdx
from client.attestation.checklist import PASSED, Refusal
from client.attestation.rules import AllowList, TdxRules
from client.attestation.tdx import TdxEvidence
from tests.client.attestation.dev_pki import AT, EXPECTED, MEASUREMENT
from tests.client.attestation.dev_quotes import Quotes, stub

pytest.importorskip("dcap_qvl")
LISTED = AllowList(frozenset({MEASUREMENT.hex()}))
OTHER = b"\x12" * 48


@pytest.fixture(scope="module")
def quotes() -> Quotes:
    return Quotes()


def rules(**changes: Any) -> TdxRules:
    good: dict[str, Any] = {
        "tcb_status": frozenset({"UpToDate"}),
        "max_collateral_age_days": 30,
        "td_attributes": "0000001000000000",
        "mr_seam": LISTED,
        "mr_td": LISTED,
        "rtmrs": (LISTED,) * 4,
        "mr_config_id": LISTED,
    }
    return TdxRules(**{**good, **changes})


@dataclass(frozen=True)
class Bad:
    step: str
    why: str
    make: Callable[[Quotes], bytes] = lambda quotes: quotes.quote(quotes.signed())
    rules: dict[str, Any] = field(default_factory=dict)
    library: dict[str, str] = field(default_factory=dict)
    at: datetime = AT
    collateral: bytes = b"{}"


def said(step: str, why: str, **fields: Any) -> Bad:
    return Bad(step, why, lambda quotes: quotes.quote(quotes.signed(**fields)))


def built(why: str, **parts: Any) -> Bad:
    return Bad("signature", why, lambda quotes: quotes.quote(quotes.signed(), **parts))


def cut(text: bytes, count: int) -> bytes:
    return text[:-count]


CASES = [
    Bad("format", "empty", lambda quotes: b""),
    Bad("format", "too short", lambda quotes: quotes.signed()[:635]),
    Bad("format", "a CWT", lambda quotes: b"\xd2\x84" + bytes(1000)),
    Bad("format", "longer than a DCAP quote", lambda quotes: quotes.quote(quotes.signed()) + bytes(8192)),
    said("version and TEE type", "version 3", version=3),
    said("version and TEE type", "version 6", version=6),
    said("version and TEE type", "another key", key_type=3),
    said("version and TEE type", "SGX", tee=0),
    built("body signed by nobody", signature=bytes(64)),
    built("body signed by another", signature=b"\1" * 64),
    built("enclave signed by another", qe_signature=b"\1" * 64),
    built("key not bound", bound=bytes(32)),
    built("no PCK chain", kind=4),
    Bad("signature", "cut off", lambda quotes: cut(quotes.quote(quotes.signed()), 1)),
    Bad("signature", "something behind", lambda quotes: quotes.quote(quotes.signed()) + b"\1"),
    Bad("signature", "a body of another type", lambda quotes: quotes.quote(
        quotes.signed(version=5)[:48] + struct.pack("<HI", 4, 584) + quotes.signed()[48:]
    )),
    Bad("signature", "another root", lambda quotes: quotes.quote(quotes.signed(), Quotes().chain())),
    Bad("signature", "no authority", lambda quotes: quotes.quote(quotes.signed(), [
        quotes.certificate("leaf", quotes.pck_key, "PCK", quotes.pck_key, False), *quotes.chain()
    ])),
    Bad("signature", "chain expired", at=datetime(2031, 1, 1, tzinfo=UTC)),
    said("debug", "debug", attributes=bytes.fromhex("0100001000000000")),
    Bad("collateral", "none", collateral=b""),
    Bad("collateral", "too large", collateral=bytes(tdx.MAX_COLLATERAL_BYTES + 1)),
    Bad("collateral", "not text", collateral=b"\xff"),
    Bad("collateral", "dcap-qvl refuses", library={"status": "refused"}),
    Bad("TCB status", "out of date", library={"status": "OutOfDate"}),
    Bad("TCB status", "revoked", library={"status": "Revoked"}),
    Bad("TCB status", "empty list", rules={"tcb_status": frozenset()}),
    Bad("collateral age", "too old", rules={"max_collateral_age_days": 6}),
    Bad("collateral age", "of tomorrow", library={"issued": "2025-06-02T00:00:00+00:00"}),
    Bad("collateral age", "no date", library={"issued": "yesterday"}),
    said("TDATTRIBUTES", "without SEPT_VE_DISABLE", attributes=bytes(8)),
    said("TDATTRIBUTES", "one bit more", attributes=bytes.fromhex("0000001000000080")),
    said("MRSEAM", "another module", mr_seam=OTHER),
    said("MRTD", "another image", mr_td=OTHER),
    Bad("MRTD", "empty list", rules={"mr_td": AllowList()}),
    Bad("RTMR", "empty list", rules={"rtmrs": (LISTED, LISTED, LISTED, AllowList())}),
    *(said("RTMR", f"another RTMR{number}", **{f"rtmr{number}": OTHER}) for number in range(4)),
    said("MRCONFIGID", "another", mr_config_id=OTHER),
    said("report data", "another nonce", report_data=bytes(64)),
]  # fmt: skip


@pytest.mark.parametrize("version", [4, 5])
def test_good_quotes_pass_every_step(quotes: Quotes, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    monkeypatch.setattr(tdx, "_library", stub)
    evidence = TdxEvidence(quotes.quote(quotes.signed(version=version)) + bytes(70), b"{}")
    steps = tdx.verify(evidence, rules(), AT, EXPECTED, quotes.pin)
    assert [step.verdict for step in steps] == [PASSED] * len(tdx.STEPS)


@pytest.mark.refusal
@pytest.mark.parametrize("bad", CASES, ids=lambda bad: f"{bad.step}: {bad.why}")
def test_the_verdict_names_what_is_wrong(quotes: Quotes, monkeypatch: pytest.MonkeyPatch, bad: Bad) -> None:
    monkeypatch.setattr(tdx, "_library", lambda: stub(**bad.library))
    with pytest.raises(Refusal) as refused:
        tdx.verify(TdxEvidence(bad.make(quotes), bad.collateral), rules(**bad.rules), bad.at, EXPECTED, quotes.pin)
    assert refused.value.step.field == bad.step, refused.value


@pytest.mark.refusal
def test_dev_quotes_do_not_reach_intels_root(quotes: Quotes) -> None:
    with pytest.raises(Refusal, match="Intel's root"):
        tdx.verify(TdxEvidence(quotes.quote(quotes.signed()), b"{}"), rules(), AT, EXPECTED)


@pytest.mark.refusal
def test_without_the_library_nothing_is_accepted(quotes: Quotes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dcap_qvl", None)
    with pytest.raises(Refusal, match=r"cleave\[tdx\]"):
        tdx.verify(TdxEvidence(quotes.quote(quotes.signed()), b"{}"), rules(), AT, EXPECTED, quotes.pin)


def test_every_step_has_a_refusal() -> None:
    assert {bad.step for bad in CASES} == {field for field, _ in tdx.STEPS}


def test_the_list_in_the_docstring_is_what_runs() -> None:
    listed = re.findall(r"^ +(\d+) ([\w ]+?)  ", tdx.__doc__ or "", re.MULTILINE)
    assert listed == [(str(number), field) for number, (field, _) in enumerate(tdx.STEPS, 1)]
