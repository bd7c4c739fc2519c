"""Genuine evidence, from a folder that is no part of the project: every file gets the verdict that it deserves."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from client.attestation import azure, snp, tdx
from client.attestation.checklist import REFUSED, Refusal, Step, Wrong
from client.attestation.rules import AllowList, TdxRules
from client.attestation.snp_case import SnpEvidence
from client.attestation.snp_certificates import build_chain, fingerprint, read_certificates
from client.attestation.snp_products import AMD_ROOTS, by_name
from client.attestation.tdx import TdxEvidence
from tests.client.attestation.dev_pki import rules

UNCHECKED = AllowList(unchecked=True)
MILAN_TCB = {"bl": 2, "tee": 0, "snp": 5, "ucode": 68}
AT_SNP, AT_TDX = datetime(2025, 6, 1, tzinfo=UTC), datetime(2025, 6, 20, tzinfo=UTC)
AWS = "CN=cc-us-east-2.amazonaws.com"
TDX_FILES = ("v4-debug-td", "v4", "v5", "with-collateral")


def report_of(folder: Path, name: str) -> bytes:
    path = folder / "snp" / f"{name}.report.bin"
    return path.read_bytes() if path.exists() else bytes.fromhex(path.with_suffix(".hex").read_text())


def judge(folder: Path, name: str, leaf: str, chain: str, at: datetime = AT_SNP, **changes: Any) -> tuple[Step, ...]:
    report = report_of(folder, name)
    certificates = tuple((folder / one).read_bytes() for one in (f"snp/{leaf}", f"amd-roots/ask_ark_{chain}.pem"))
    loose: dict[str, Any] = dict.fromkeys(("chip_ids", "host_data", "id_key_digests", "author_key_digests"), UNCHECKED)
    loose |= {
        "require_crl": False,
        "min_abi": (1, 49),
        "min_tcb": {"Milan": MILAN_TCB},
        "measurements": AllowList(frozenset({report[0x90:0xC0].hex()})),
    }
    return snp.verify(SnpEvidence(report, certificates), rules(**{**loose, **changes}), at, report[0x50:0x90])


def step_of(error: pytest.ExceptionInfo[Refusal]) -> str:
    return error.value.step.field


@pytest.mark.parametrize("name", ["milan-v2", "milan-v2-b"])
def test_milan_is_accepted(genuine: Path, name: str) -> None:
    assert all(step.verdict != REFUSED for step in judge(genuine, name, f"{name}.vcek.der", "milan"))


@pytest.mark.refusal
def test_a_debug_guest_is_refused_although_its_signature_is_good(genuine: Path) -> None:
    with pytest.raises(Refusal) as refused:
        judge(genuine, "milan-v2-debug", "milan-v2-debug.vcek.der", "milan")
    assert step_of(refused) == "debug"
    assert "report signature" in {step.field for step in refused.value.steps[:-1]}


def test_a_vlek_of_aws_is_accepted_at_its_time(genuine: Path) -> None:
    vlek: dict[str, Any] = {"signers": frozenset({"vlek"}), "vlek_csp_ids": AllowList(frozenset({AWS})), "vmpl": 1}
    name, leaf, chain = "aws-milan-v3-vlek", "aws-milan-v3-vlek.vlek.der", "milan_vlek"
    judge(genuine, name, leaf, chain, **vlek, allow_provisional_firmware=True)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"signers": frozenset({"vcek"})}, "signing key"),
        ({"vmpl": 0}, "VMPL"),
        ({"vlek_csp_ids": AllowList(frozenset({"CN=other"}))}, "chip id"),
    )
    for changes, step in cases:
        with pytest.raises(Refusal) as refused:
            judge(genuine, name, leaf, chain, **{**vlek, **changes})
        assert step_of(refused) == step
    with pytest.raises(Refusal) as refused:
        judge(genuine, name, leaf, chain, datetime(2025, 12, 11, tzinfo=UTC), **vlek)
    assert step_of(refused) == "validity"
    with pytest.raises(Refusal) as refused:
        judge(genuine, name, leaf, "milan", **vlek)  # AMD's other intermediate
    assert step_of(refused) == "chain"


@pytest.mark.refusal
@pytest.mark.parametrize("leaf", ["invalid-legacy.vcek.der", "invalid-new.vcek.der"])
def test_certificates_that_amd_did_not_issue_are_refused(genuine: Path, leaf: str) -> None:
    with pytest.raises(Refusal) as refused:
        judge(genuine, "milan-v2", leaf, "milan")
    assert step_of(refused) == "chain"


@pytest.mark.refusal
@pytest.mark.parametrize("chain", ["genoa", "turin_vcek", "milan_vlek"])
def test_the_chain_of_another_product_is_refused(genuine: Path, chain: str) -> None:
    with pytest.raises(Refusal) as refused:
        judge(genuine, "milan-v2", "milan-v2.vcek.der", chain)
    assert step_of(refused) == "chain"


@pytest.mark.refusal
def test_the_certificate_of_another_chip_is_refused(genuine: Path) -> None:
    with pytest.raises(Refusal) as refused:
        judge(genuine, "milan-v2", "milan-v2-b.vcek.der", "milan")
    assert step_of(refused) == "report signature"


@pytest.mark.refusal
def test_a_minimum_above_the_machine_refuses(genuine: Path) -> None:
    with pytest.raises(Refusal) as refused:
        judge(genuine, "milan-v2", "milan-v2.vcek.der", "milan", min_tcb={"Milan": {**MILAN_TCB, "ucode": 200}})
    assert step_of(refused) == "minimum TCB"


def test_any_changed_byte_of_a_genuine_report_is_refused(genuine: Path) -> None:
    report = report_of(genuine, "milan-v2")
    files = ("snp/milan-v2.vcek.der", "amd-roots/ask_ark_milan.pem")
    certificates = tuple((genuine / one).read_bytes() for one in files)
    for position in range(len(report)):
        bad = bytearray(report)
        bad[position] ^= 0x10
        with pytest.raises(Refusal):
            snp.verify(SnpEvidence(bytes(bad), certificates), rules(), AT_SNP, None)


def test_azure_has_a_good_report_inside(genuine: Path) -> None:
    hcl = azure.split(azure.unwrap((genuine / "snp/azure-genoa-v3.evidence.json").read_bytes()))
    files = ("snp/azure-genoa-v3.vcek.pem", "amd-roots/ask_ark_genoa.pem")
    certificates = tuple((genuine / one).read_bytes() for one in files)
    loose: dict[str, Any] = dict.fromkeys(("chip_ids", "host_data", "id_key_digests", "author_key_digests"), UNCHECKED)
    found = rules(
        **loose,
        require_crl=False,
        min_tcb={"Genoa": {"bl": 10, "tee": 0, "snp": 23, "ucode": 84}},
        measurements=AllowList(frozenset({hcl.report[0x90:0xC0].hex()})),
    )
    steps = snp.verify(SnpEvidence(hcl.report, certificates), found, AT_SNP, azure.expected_report_data(hcl))
    assert len(steps) == len(snp.STEPS)
    assert "Azure" in str(azure.unsupported(steps))


def test_the_turin_certificate_chains_to_its_pinned_root(genuine: Path) -> None:
    files = [(genuine / "snp" / one).read_bytes() for one in ("turin.vcek.der", "turin.chain.pem")]
    chain = build_chain(read_certificates(files), AMD_ROOTS["Turin"])
    assert by_name(chain.leaf.product_name()) == "Turin"
    assert chain.leaf.tcb(("fmc", "bl", "tee", "snp", "ucode")) == {"fmc": 0, "bl": 0, "tee": 0, "snp": 0, "ucode": 9}
    assert chain.leaf.hardware_id(8) == bytes.fromhex("1e550a8ee5cf9f4d")
    with pytest.raises(Wrong, match="pinned"):
        build_chain(read_certificates(files), AMD_ROOTS["Genoa"])


def test_the_pins_are_those_of_amd(genuine: Path) -> None:
    for path in sorted((genuine / "amd-roots").glob("*.pem")):
        line = path.stem.split("_")[2].capitalize()
        assert fingerprint(read_certificates([path.read_bytes()])[1]) == AMD_ROOTS[line]


def quote(folder: Path, name: str) -> TdxEvidence:
    collateral = folder / "tdx" / f"{name}.collateral.json"
    text = collateral.read_bytes() if collateral.exists() else b""
    return TdxEvidence((folder / "tdx" / f"{name}.quote.bin").read_bytes(), text)


def tdx_rules(**changes: Any) -> TdxRules:
    listed = "91eb2b44d141d4ece09f0c75c2c53d247a3c68edd7fafe8a3520c942a604a407de03ae6dc5f87f27428b2538873118b7"
    good: dict[str, Any] = {
        "tcb_status": frozenset({"UpToDate"}),
        "max_collateral_age_days": 30,
        "td_attributes": "0000001000000000",
        "mr_seam": UNCHECKED,
        "mr_td": AllowList(frozenset({listed})),
        "rtmrs": (UNCHECKED,) * 4,
        "mr_config_id": AllowList(frozenset({"00" * 48})),
    }
    return TdxRules(**{**good, **changes})


def test_a_quote_with_collateral_is_accepted_at_its_time(genuine: Path) -> None:
    pytest.importorskip("dcap_qvl")
    offered = quote(genuine, "with-collateral")
    steps = tdx.verify(offered, tdx_rules(), AT_TDX, offered.quote[568:632])
    assert [step.field for step in steps] == [field for field, _ in tdx.STEPS]


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"tcb_status": frozenset({"OutOfDate"})}, "TCB status"),
        ({"tcb_status": frozenset()}, "TCB status"),
        ({"td_attributes": "0000000000000000"}, "TDATTRIBUTES"),
        ({"mr_seam": AllowList()}, "MRSEAM"),
        ({"mr_td": AllowList()}, "MRTD"),
        ({"rtmrs": (UNCHECKED, UNCHECKED, UNCHECKED, AllowList())}, "RTMR"),
        ({"mr_config_id": AllowList(frozenset({"01" * 48}))}, "MRCONFIGID"),
    ],
)
def test_a_genuine_quote_is_held_to_every_field(genuine: Path, changes: dict[str, Any], step: str) -> None:
    pytest.importorskip("dcap_qvl")
    with pytest.raises(Refusal) as refused:
        tdx.verify(quote(genuine, "with-collateral"), tdx_rules(**changes), AT_TDX, None)
    assert step_of(refused) == step


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("at", "days", "step"),
    [((2025, 7, 15), 7, "collateral age"), ((2025, 9, 1), 366, "collateral"), ((2025, 6, 1), 30, "collateral")],
)
def test_collateral_ages(genuine: Path, at: tuple[int, int, int], days: int, step: str) -> None:
    pytest.importorskip("dcap_qvl")
    found = tdx_rules(max_collateral_age_days=days)
    with pytest.raises(Refusal) as refused:
        tdx.verify(quote(genuine, "with-collateral"), found, datetime(*at, tzinfo=UTC), None)
    assert step_of(refused) == step


@pytest.mark.parametrize(("name", "step"), [("v4", "collateral"), ("v5", "collateral"), ("v4-debug-td", "debug")])
def test_quotes_without_collateral_have_good_signatures_and_are_refused(genuine: Path, name: str, step: str) -> None:
    pytest.importorskip("dcap_qvl")
    with pytest.raises(Refusal) as refused:
        tdx.verify(quote(genuine, name), tdx_rules(), datetime(2026, 1, 1, tzinfo=UTC), None)
    assert step_of(refused) == step
    assert "good, to Intel's root" in refused.value.steps[2].text


@pytest.mark.parametrize("name", TDX_FILES)
def test_any_changed_region_of_a_quote_is_refused(genuine: Path, name: str) -> None:
    pytest.importorskip("dcap_qvl")
    offered = quote(genuine, name)
    used = len(offered.quote.rstrip(b"\0"))
    for position in [*range(0, 1500, 7), *range(1500, used, 101)]:
        if offered.quote[position] == ord("\n"):
            continue  # line ends of the PEM chain carry nothing
        bad = bytearray(offered.quote)
        bad[position] ^= 0x01
        with pytest.raises(Refusal) as refused:
            tdx.verify(TdxEvidence(bytes(bad), offered.collateral), tdx_rules(), AT_TDX, None)
        assert refused.value.step.number <= 5


def test_the_collateral_of_another_machine_is_refused(genuine: Path) -> None:
    pytest.importorskip("dcap_qvl")
    collateral = quote(genuine, "with-collateral").collateral
    assert json.loads(collateral)
    with pytest.raises(Refusal) as refused:
        tdx.verify(TdxEvidence(quote(genuine, "v4").quote, collateral), tdx_rules(), AT_TDX, None)
    assert step_of(refused) == "collateral"
