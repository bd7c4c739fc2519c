"""Good reports of every kind are accepted; a report with any byte changed is not; the steps are those of the list."""

import inspect
import re
from dataclasses import replace
from itertools import product as every
from pathlib import Path

import pytest

from client.attestation import snp, tdx
from client.attestation.checklist import NOT_CHECKED, PASSED, Refusal
from client.attestation.rules import AllowList
from client.attestation.snp_case import SnpEvidence
from client.attestation.snp_products import AMD_ROOTS
from client.attestation.snp_report import REPORT_BYTES
from tests.client.attestation.dev_pki import (
    AT,
    CPUID,
    EXPECTED,
    VLEK,
    Pki,
    der,
    evidence,
    hardware_id,
    leaf_form,
    report,
    rules,
    tcb_bytes,
    tcb_of,
)

UNCHECKED = AllowList(unchecked=True)


def verify(pki: Pki, offered: SnpEvidence, **changes: object) -> list[str]:
    return [step.verdict for step in snp.verify(offered, rules(**changes), AT, EXPECTED, pki.roots)]


@pytest.mark.parametrize(("line", "version"), [*every(CPUID, (3, 4, 5)), ("Milan", 2), ("Genoa", 2)])
def test_good_reports_pass_every_step(pki: Pki, line: str, version: int) -> None:
    assert verify(pki, evidence(pki, line, version)) == [PASSED] * len(snp.STEPS)


@pytest.mark.parametrize("line", CPUID)
def test_good_reports_of_a_vlek_pass_every_step(pki: Pki, line: str) -> None:
    assert verify(pki, evidence(pki, line, signer="vlek"), **VLEK) == [PASSED] * len(snp.STEPS)


def test_what_is_not_checked_is_said(pki: Pki) -> None:
    lists = dict.fromkeys(("host_data", "id_key_digests", "author_key_digests"), UNCHECKED)
    taken = snp.verify(
        replace(evidence(pki), revocation_lists=()),
        rules(require_crl=False, allow_provisional_firmware=True, **lists),
        AT,
        None,
        pki.roots,
    )
    left_out = {step.field for step in taken if step.verdict == NOT_CHECKED}
    assert left_out == {"revocation", "provisional firmware", "host data", "id keys", "report data"}


def test_microcode_may_be_ahead_of_what_is_committed(pki: Pki) -> None:
    ahead = tcb_bytes("Milan", {**tcb_of("Milan"), "ucode": 255})
    assert set(verify(pki, evidence(pki, current_tcb=ahead))) == {PASSED}


def test_the_wrapped_form_of_a_hardware_id_is_read(pki: Pki) -> None:
    wrapped = leaf_form("Milan", "vcek").having("4", b"\x04\x40" + hardware_id("Milan"))
    key, leaf = pki.leaf(wrapped, "SEV-Dev")
    offered = SnpEvidence(report(key, "Milan"), (der(leaf), der(pki.ask), der(pki.ark)), (pki.revocation_list(),))
    assert set(verify(pki, offered)) == {PASSED}


def test_any_changed_byte_is_refused(pki: Pki) -> None:
    good = evidence(pki, version=5)
    for position, flip in every(range(REPORT_BYTES), (0x01, 0x80)):
        bad = bytearray(good.report)
        bad[position] ^= flip
        with pytest.raises(Refusal):
            verify(pki, SnpEvidence(bytes(bad), good.certificates, good.revocation_lists))


def test_the_list_in_the_docstring_is_what_runs() -> None:
    listed = re.findall(r"^ +(\d+) ([\w ]+?)  ", snp.__doc__ or "", re.MULTILINE)
    assert listed == [(str(number), field) for number, (field, _) in enumerate(snp.STEPS, 1)]


def test_steps_are_tagged_in_the_code() -> None:
    for number, (_, check) in enumerate(snp.STEPS, 1):
        assert inspect.getsource(check).splitlines()[0].endswith(f"# step {number}")


def test_dev_roots_are_no_vendor_roots(pki: Pki) -> None:
    assert not set(pki.roots.values()) & set(AMD_ROOTS.values())
    with pytest.raises(Refusal) as refused:
        snp.verify(evidence(pki), rules(), AT, EXPECTED)
    assert refused.value.step.field == "chain"


def test_the_documented_steps_are_those_of_the_code() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "attestation.md").read_text("utf-8")
    for title, steps in (("## SEV-SNP", snp.STEPS), ("## TDX", tdx.STEPS)):
        section = text.split(title, 1)[1].split("\n## ", 1)[0]
        listed = re.findall(r"^\| (\d+) \| ([\w ]+?) \|", section, re.MULTILINE)
        assert listed == [(str(number), field) for number, (field, _) in enumerate(steps, 1)]
