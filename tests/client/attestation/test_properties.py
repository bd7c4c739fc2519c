"""Whatever the bytes are: a Refusal, and nothing else."""

from typing import Any

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from client.attestation import snp, snp_report, tdx
from client.attestation.checklist import Refusal
from client.attestation.policy_file import read
from client.attestation.snp_case import SnpEvidence
from client.attestation.tdx import TdxEvidence
from tests.client.attestation.dev_pki import AT, EXPECTED, OFFSETS, Pki, evidence, fields_of, pack, rules, sign
from tests.client.attestation.policies import ALL

QUIET = settings(deadline=None, max_examples=150)
FIELDS = {
    name: st.binary(min_size=size, max_size=size) for name, (_, size) in OFFSETS.items() if "signature" not in name
}
EXACT = {  # the rules permit one value of each
    "algorithm", "author_key_digest", "chip_id", "host_data", "id_key_digest", "measurement", "report_data",
    "reported_tcb", "vmpl",
}  # fmt: skip


@QUIET
@given(raw=st.binary(max_size=1300), certificates=st.lists(st.binary(max_size=300), max_size=3))
def test_any_bytes_are_refused(pki: Pki, raw: bytes, certificates: list[bytes]) -> None:
    with pytest.raises(Refusal):
        snp.verify(SnpEvidence(raw, tuple(certificates)), rules(), AT, EXPECTED, pki.roots)


@QUIET
@given(st.binary(min_size=1184, max_size=1184))
def test_the_parser_reads_any_1184_bytes(raw: bytes) -> None:
    read_report = snp_report.read(raw)
    assert read_report.report_data == raw[0x50:0x90]
    snp_report.not_zero(read_report)


@QUIET
@given(data=st.data())
def test_any_signed_fields_are_accepted_or_refused(pki: Pki, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4))
    changes: dict[str, Any] = {name: data.draw(FIELDS[name]) for name in names}
    key, _ = pki.good_leaf("Milan", "vcek")
    good = evidence(pki)
    changed = SnpEvidence(
        sign(pack({**fields_of("Milan", 3, "vcek"), **changes}), key), good.certificates, good.revocation_lists
    )
    try:
        snp.verify(changed, rules(), AT, EXPECTED, pki.roots)
    except Refusal:
        return
    changed_fields = {name for name in names if changes[name] != good.report[OFFSETS[name][0] :][: OFFSETS[name][1]]}
    assert not changed_fields & EXACT


@QUIET
@given(data=st.data())
def test_damaged_certificates_are_refused(pki: Pki, data: st.DataObject) -> None:
    good = evidence(pki)
    which = data.draw(st.integers(0, 2))
    blob = bytearray(good.certificates[which])
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    certificates = [*good.certificates]
    certificates[which] = bytes(blob)
    offered = SnpEvidence(good.report, tuple(certificates), good.revocation_lists)
    try:
        snp.verify(offered, rules(), AT, EXPECTED, pki.roots)
    except Refusal:
        return
    # The count of unused bits in front of a signature is DER's, and not signed: what is signed must be the same.
    signed = (
        x509.load_der_x509_certificate(one).tbs_certificate_bytes for one in (bytes(blob), good.certificates[which])
    )
    assert len(set(signed)) == 1


@QUIET
@given(st.binary(max_size=1200), st.binary(max_size=100), st.booleans())
def test_any_quote_is_refused(raw: bytes, collateral: bytes, headed: bool) -> None:
    quote = b"\4\0\2\0\x81\0\0\0" + raw + bytes(700) if headed else raw
    found = read(ALL).tdx
    assert found is not None
    with pytest.raises(Refusal):
        tdx.verify(TdxEvidence(quote, collateral), found, AT, EXPECTED)
