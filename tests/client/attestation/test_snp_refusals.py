"""One thing is wrong, everything else is good and signed: the verdict names the step of that thing."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from client.attestation import snp
from client.attestation.checklist import REFUSED, Refusal
from client.attestation.rules import AllowList
from client.attestation.snp_certificates import MAX_CERTIFICATE_BYTES, MAX_CERTIFICATES
from tests.client.attestation.bad_reports import (
    FUTURE,
    PAST,
    Bad,
    chained,
    flipped,
    good,
    impostor_ark,
    lacking,
    leafed,
    listed,
    low,
    other,
    raw,
    resigned,
    resized,
    said,
)
from tests.client.attestation.dev_pki import (
    EXPECTED,
    VLEK,
    Authority,
    Pki,
    der,
    evidence,
    ia5,
    leaf_form,
    report,
    rules,
    tcb_bytes,
    tcb_of,
)

pytestmark = pytest.mark.refusal

FORM = [
    *(raw("size", f"{size} bytes", resized(size)) for size in (0, 1, 1183, 1185, 2368)),
    *(said("version", f"version {version}", version=version) for version in (0, 1, 6, 0xFFFFFFFF)),
    said("reserved bits", "policy bit 17 clear", policy=0x10000),
    said("reserved bits", "policy bit 26", policy=0x30000 | 1 << 26),
    said("reserved bits", "policy bit 63", policy=0x30000 | 1 << 63),
    said("reserved bits", "platform bit 6", platform_info=1 << 6),
    said("reserved bits", "platform bit 8", platform_info=1 << 8),
    said("reserved bits", "key information bit 5", keys=1 | 1 << 5),
    said("reserved bits", "offset 0x4C", reserved_4c=1),
    said("reserved bits", "CPUID in version 2", version=2, cpuid=b"\x19\x01\x01"),
    said("reserved bits", "behind the CPUID", reserved_18b=b"\0" * 20 + b"\1"),
    said("reserved bits", "offset 0x1EB", reserved_1eb=1),
    said("reserved bits", "offset 0x1EF", reserved_1ef=1),
    said("reserved bits", "mitigations in version 4", version=4, launch_mitigations=1),
    said("reserved bits", "behind the mitigations", version=5, reserved_208=b"\1" + bytes(151)),
    Bad("reserved bits", "behind the signature", resigned(flipped(0x330))),
    Bad("reserved bits", "the last byte", resigned(flipped(1183))),
    *(said("signature algorithm", f"algorithm {number}", algorithm=number) for number in (0, 2, 257)),
    said("signing key", "none", keys=7 << 2),
    said("signing key", "unknown", keys=2 << 2),
    Bad("signing key", "VLEK not allowed", lambda pki: evidence(pki, signer="vlek")),
    Bad("signing key", "VCEK not allowed", rules=VLEK),
    said("product line", "unknown family", cpuid=b"\x17\x31\x00"),
    said("product line", "unknown model", cpuid=b"\x19\x51\x00"),
    Bad("product line", "not allowed", rules={"products": frozenset({"Genoa", "Turin"})}),
    leafed("product line", "version 2, unknown product", other("2", ia5("Naples")), version=2),
    Bad("product line", "version 2, no certificate", lambda pki: replace(evidence(pki, version=2), certificates=())),
]
CHAIN = [
    chained("chain", "no certificates", lambda pki: []),
    chained("chain", "no leaf", lambda pki: good(pki)[1:]),
    chained("chain", "no ASK", lambda pki: [good(pki)[0], good(pki)[2]]),
    chained("chain", "no ARK", lambda pki: good(pki)[:2]),
    chained("chain", "two leaves", lambda pki: [*good(pki), der(pki.good_leaf("Genoa", "vcek")[1])]),
    chained("chain", "two ASKs", lambda pki: [
        *good(pki), der(pki.authority("SEV-Dev", "ARK-Dev", pki.impostor, pki.impostor))
    ]),
    chained("chain", "another root of the same name", lambda pki: [*good(pki)[:2], impostor_ark(pki)]),
    chained("chain", "ASK from another root", lambda pki: [
        good(pki)[0], der(pki.authority("SEV-Dev", "ARK-Dev", pki.ask_key, pki.impostor)), good(pki)[2]
    ]),
    chained("chain", "leaf from another ASK", lambda pki: [
        good(pki)[0], der(pki.authority("SEV-Dev", "ARK-Dev", pki.impostor, pki.ark_key)), good(pki)[2]
    ]),
    chained("chain", "ASK is no authority", lambda pki: [
        good(pki)[0], der(pki.authority("SEV-Dev", "ARK-Dev", pki.ask_key, pki.ark_key, ca=False)), good(pki)[2]
    ]),
    chained("chain", "ASK of 2048 bits", lambda pki: [
        good(pki)[0], der(pki.authority("SEV-Dev", "ARK-Dev", Authority(2048), pki.ark_key)), good(pki)[2]
    ]),
    chained("chain", "ASK without PSS", lambda pki: [
        good(pki)[0], der(pki.authority("SEV-Dev", "ARK-Dev", pki.ask_key, pki.ark_key, pss=False)), good(pki)[2]
    ]),
    chained("chain", "garbage", lambda pki: [*good(pki), b"garbage"]),
    chained("chain", "garbage in PEM", lambda pki: [*good(pki), b"-----BEGIN CERTIFICATE-----\nMA==\n-----END"]),
    chained("chain", "a file too large", lambda pki: [*good(pki), bytes(MAX_CERTIFICATE_BYTES + 1)]),
    chained("chain", "too many", lambda pki: [
        *good(pki), *(der(pki.good_leaf("Milan", "vcek")[1]) for _ in range(2)),
        *(der(pki.leaf(leaf_form("Milan", "vcek"), "SEV-Dev")[1]) for _ in range(MAX_CERTIFICATES)),
    ]),
    leafed("chain", "leaf signed over SHA-256", lambda form: replace(form, hash=hashes.SHA256())),
    leafed("chain", "leaf without PSS", lambda form: replace(form, pss=False)),
    leafed("chain", "leaf of another product", other("2", ia5("Genoa"))),
    leafed("chain", "leaf without a product", lacking("2")),
    leafed("chain", "leaf with a product in another type", other("2", b"\x0c\x05Milan")),
    leafed("chain", "leaf with a product cut off", other("2", b"\x16\x06Milan")),
    leafed("chain", "a VLEK's name on a VCEK's report", lambda form: replace(form, name="SEV-VLEK")),
    leafed("chain", "a VCEK's name on a VLEK's report", lambda form: replace(form, name="SEV-VCEK"), signer="vlek"),
    Bad("validity", "too early", at=datetime(2023, 12, 31, tzinfo=UTC)),
    Bad("validity", "too late", at=datetime(2030, 1, 2, tzinfo=UTC)),
    leafed("validity", "leaf expired", lambda form: replace(form, end=PAST)),
    leafed("validity", "leaf not yet valid", lambda form: replace(form, begin=FUTURE)),
    chained("validity", "ASK expired", lambda pki: [
        good(pki)[0], der(pki.authority("SEV-Dev", "ARK-Dev", pki.ask_key, pki.ark_key, end=PAST)), good(pki)[2]
    ]),
    listed("none", lambda pki: []),
    listed("garbage", lambda pki: [b"garbage"]),
    listed("signed by another", lambda pki: [pki.revocation_list(signer=pki.impostor)]),
    listed("expired", lambda pki: [pki.revocation_list(end=PAST)]),
    listed("not yet in force", lambda pki: [pki.revocation_list(begin=FUTURE)]),
    listed("ASK revoked", lambda pki: [pki.revocation_list((pki.ask.serial_number,))]),
    listed("ARK revoked", lambda pki: [pki.revocation_list((pki.ark.serial_number,))]),
    Bad("revocation", "ASK revoked, lists not required",
        lambda pki: replace(evidence(pki), revocation_lists=(pki.revocation_list((pki.ask.serial_number,)),)),
        {"require_crl": False}),
    listed("too many", lambda pki: [pki.revocation_list()] * 5),
]  # fmt: skip
KEY = [
    Bad("report signature", "another key", lambda pki: replace(
        evidence(pki), report=report(ec.generate_private_key(ec.SECP384R1()), "Milan")
    )),
    *(raw("report signature", f"byte {offset:#x}", flipped(offset))
      for offset in (0x10, 0x90, 0x140, 0x1A0, 0x2A0, 0x2E8)),
    raw("report signature", "R and S exchanged", lambda t: t[:0x2A0] + t[0x2E8:0x330] + t[0x2A0:0x2E8] + t[0x330:]),
    raw("report signature", "R big-endian", lambda t: t[:0x2A0] + t[0x2A0:0x2D0][::-1] + t[0x2D0:]),
    raw("report signature", "R and S zero", lambda t: t[:0x2A0] + bytes(512)),
    raw("report signature", "R beyond the order", lambda t: t[:0x2A0] + b"\xff" * 72 + t[0x2E8:]),
    leafed("report signature", "leaf on P-256", lambda form: replace(form, curve=ec.SECP256R1())),
    *(leafed("reported TCB", f"certificate with other {part}", other(number, b"\x02\x01\x63"))
      for part, number in (("bl", "3.1"), ("tee", "3.2"), ("snp", "3.3"), ("ucode", "3.8"))),
    leafed("reported TCB", "certificate with other fmc", other("3.9", b"\x02\x01\x63"), "Turin"),
    leafed("reported TCB", "certificate without bl", lacking("3.1")),
    leafed("reported TCB", "Turin certificate without fmc", lacking("3.9"), "Turin"),
    leafed("reported TCB", "negative microcode", other("3.8", b"\x02\x01\xd9")),
    leafed("reported TCB", "padded bl", other("3.1", b"\x02\x02\x00\x03")),
    leafed("reported TCB", "microcode beyond a byte", other("3.8", b"\x02\x02\x01\x00")),
    leafed("reported TCB", "bl of another type", other("3.1", b"\x04\x01\x03")),
    leafed("reported TCB", "bl without contents", other("3.1", b"\x02\x00")),
    said("reported TCB", "reserved byte", reported_tcb=b"\x03\x01\x01\x00\x00\x00\x08\xd9"),
    said("reported TCB", "report with other snp", reported_tcb=tcb_bytes("Milan", {**tcb_of("Milan"), "snp": 9})),
    said("chip id", "another chip", chip_id=b"\x05" * 64),
    said("chip id", "hidden", chip_id=bytes(64)),
    said("chip id", "Turin, another chip", "Turin", chip_id=b"\x05" * 8 + bytes(56)),
    said("chip id", "Turin, something behind", "Turin", chip_id=bytes(range(1, 9)) + b"\1" + bytes(55)),
    leafed("chip id", "VCEK without hardware id", lacking("4")),
    leafed("chip id", "hardware id too short", other("4", bytes(63))),
    leafed("chip id", "VCEK with a provider", other("5", ia5("CN=x"))),
    leafed("chip id", "VLEK without provider", lacking("5"), signer="vlek"),
    leafed("chip id", "VLEK with hardware id", other("4", bytes(64)), signer="vlek"),
    leafed("chip id", "VLEK of another provider", other("5", ia5("CN=other")), signer="vlek"),
    Bad("chip id", "chip not pinned", rules={"chip_ids": AllowList(frozenset({"00" * 64}))}),
    Bad("chip id", "empty list", rules={"chip_ids": AllowList()}),
    Bad("chip id", "empty list of providers", lambda pki: evidence(pki, signer="vlek"),
        {**VLEK, "vlek_csp_ids": AllowList()}),
    Bad("chip id", "VLEK where chips are pinned", lambda pki: evidence(pki, signer="vlek"),
        {"signers": frozenset({"vlek"})}),
]  # fmt: skip
STATE = [
    said("debug", "debug", policy=0xB0000),
    said("migration", "migration allowed", policy=0x70000),
    said("migration", "an agent's id", report_id_ma=b"\1" * 32),
    *(said("VMPL", f"VMPL {number}", vmpl=number) for number in (1, 3, 4, 0xFFFFFFFF)),
    said("ABI", "current minor", current_minor=54),
    said("ABI", "current major", current_major=0),
    said("ABI", "committed minor", committed_minor=54),
    said("ABI", "both", current_minor=54, committed_minor=54),
    *(low(name, part) for name in ("current", "committed", "reported", "launch") for part in tcb_of("Milan")),
    *(low(name, "fmc", "Turin") for name in ("current", "committed", "reported", "launch")),
    low("reported", "ucode", "Genoa"),
    said("minimum TCB", "reserved byte", launch_tcb=b"\x03\x01\x00\x00\x00\x01\x08\xd9"),
    Bad("minimum TCB", "no minimum for the product", rules={"min_tcb": {}}),
    Bad("minimum TCB", "no minimum for a part", rules={"min_tcb": {"Milan": {"bl": 0, "tee": 0, "snp": 0}}}),
    said("provisional firmware", "build ahead", current_build=5),
    said("provisional firmware", "minor ahead", current_minor=56),
    said("provisional firmware", "boot loader ahead", current_tcb=tcb_bytes("Milan", {**tcb_of("Milan"), "bl": 4})),
    said("provisional firmware", "microcode behind",
         committed_tcb=tcb_bytes("Milan", {**tcb_of("Milan"), "ucode": 218})),
    said("measurement", "another image", measurement=b"\x12" * 48),
    Bad("measurement", "empty list", rules={"measurements": AllowList()}),
    Bad("measurement", "never unchecked", rules={"measurements": AllowList(unchecked=True)}),
    said("host data", "other host data", host_data=bytes(32)),
    Bad("host data", "empty list", rules={"host_data": AllowList()}),
    said("id keys", "another id key", id_key_digest=bytes(48)),
    Bad("id keys", "empty list", rules={"id_key_digests": AllowList()}),
    said("id keys", "another author key", author_key_digest=bytes(48)),
    said("id keys", "author key not enabled", keys=0),
    said("report data", "another nonce", report_data=bytes(64)),
    said("report data", "the first half alone", report_data=EXPECTED[:32] + bytes(32)),
    Bad("report data", "something else expected", expected=EXPECTED[::-1]),
    Bad("report data", "expected too short", expected=EXPECTED[:32]),
]  # fmt: skip
CASES = [*FORM, *CHAIN, *KEY, *STATE]


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: f"{bad.step}: {bad.why}")
def test_the_verdict_names_what_is_wrong(pki: Pki, bad: Bad) -> None:
    with pytest.raises(Refusal) as refused:
        snp.verify(bad.make(pki), rules(**bad.rules), bad.at, bad.expected, pki.roots)
    verdict = refused.value
    assert verdict.step.field == bad.step, verdict
    assert verdict.step.verdict == REFUSED
    assert verdict.steps[-1] == verdict.step
    assert len(verdict.steps) == verdict.step.number
    assert verdict.advice
    assert f"step {verdict.step.number}, {bad.step}" in str(verdict)


def test_every_step_has_a_refusal_and_there_are_enough() -> None:
    assert {bad.step for bad in CASES} == {field for field, _ in snp.STEPS}
    assert len(CASES) >= 60
    assert len({(bad.step, bad.why) for bad in CASES}) == len(CASES)
