"""Steps 1 to 12 of SEV-SNP verification: AMD's firmware, on one AMD chip, made this report. See snp.py for the list."""

import hmac
from collections.abc import Callable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from client.attestation import snp_certificates, snp_products, snp_report
from client.attestation.checklist import NotChecked, Wrong
from client.attestation.snp_case import CHANGE, DAMAGED, Case, listed, show_parts
from client.attestation.snp_revocation import check_revocation

ECDSA_P384_SHA384 = 1


def _size(case: Case) -> str:  # step 1
    size = len(case.evidence.report)
    if size != snp_report.REPORT_BYTES:
        raise Wrong(f"{size} bytes instead of {snp_report.REPORT_BYTES}", "pass the report alone, whole, or as hex")
    return f"{size} bytes"


def _version(case: Case) -> str:  # step 2
    version = case.report.version
    if version not in snp_report.VERSIONS:
        raise Wrong(f"version {version} is not known", "use a newer client, if AMD's firmware is newer than this one")
    return str(version)


def _reserved(case: Case) -> str:  # step 3
    found = snp_report.not_zero(case.report)
    if found:
        raise Wrong(f"reserved bits are not as they must be: {', '.join(found)}", DAMAGED)
    return "as they must be"


def _algorithm(case: Case) -> str:  # step 4
    algorithm = case.report.signature_algorithm
    if algorithm != ECDSA_P384_SHA384:
        raise Wrong(f"signature algorithm {algorithm} is not ECDSA on P-384 with SHA-384", DAMAGED)
    return "ECDSA P-384 SHA-384"


def _signing_key(case: Case) -> str:  # step 5
    signer = snp_report.SIGNERS.get(case.report.signing_key)
    if signer is None:
        raise Wrong(f"signing key {case.report.signing_key} is neither VCEK nor VLEK", DAMAGED)
    if signer not in case.rules.signers:
        raise Wrong(f"the policy does not allow reports signed by a {signer.upper()}", CHANGE)
    return signer.upper()


def _product_line(case: Case) -> str:  # step 6
    if case.product not in case.rules.products:
        raise Wrong(f"the policy does not allow {case.product}", CHANGE)
    return case.product


def _chain(case: Case) -> str:  # step 7
    leaf = case.chain.leaf
    expected = f"SEV-{snp_report.SIGNERS[case.report.signing_key].upper()}"
    if leaf.name != expected:
        raise Wrong(f"the report is signed by a {expected[4:]}, the certificate is not one", DAMAGED)
    name = leaf.product_name()
    if snp_products.by_name(name) != case.product:
        raise Wrong(f"the certificate is of {name}, the report of {case.product}", DAMAGED)
    return f"{expected} < ASK < ARK {snp_certificates.fingerprint(case.chain.ark)[:16]}"


def _validity(case: Case) -> str:  # step 8
    for name, one in case.chain.all():
        if not one.not_valid_before_utc <= case.at <= one.not_valid_after_utc:
            span = f"{one.not_valid_before_utc:%Y-%m-%d} to {one.not_valid_after_utc:%Y-%m-%d}"
            raise Wrong(
                f"the {name} is valid from {span}, not at {case.at:%Y-%m-%d}",
                "ask the operator for a current certificate; for old evidence give the time with --at",
            )
    return f"at {case.at:%Y-%m-%d %H:%M} UTC"


def _revocation(case: Case) -> str:  # step 9
    if not case.rules.require_crl and not case.evidence.revocation_lists:
        return NotChecked("the policy requires no revocation list")
    return check_revocation(case.evidence.revocation_lists, case.chain, case.at)


def _signature(case: Case) -> str:  # step 10
    r, s = snp_report.scalars(case.report)
    signed = case.evidence.report[: snp_report.SIGNED_BYTES]
    try:
        signature = utils.encode_dss_signature(r, s)
        case.chain.leaf.key.verify(signature, signed, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError) as error:
        raise Wrong("the certificate's key did not sign this report", DAMAGED) from error
    return "good"


def _reported_tcb(case: Case) -> str:  # step 11
    reported = case.tcb(case.report.reported_tcb)
    certified = case.chain.leaf.tcb(list(reported))
    wrong = [part for part, number in reported.items() if certified[part] != number]
    if wrong:
        raise Wrong(
            f"the certificate is for another TCB: {', '.join(wrong)} differ; reported {show_parts(reported)}",
            "ask the operator for the certificate of the reported TCB",
        )
    return show_parts(reported)


def _chip_id(case: Case) -> str:  # step 12
    leaf, size = case.chain.leaf, snp_products.CHIP_ID_BYTES[case.product]
    hardware, provider = leaf.hardware_id(size), leaf.csp_id()
    if case.report.signing_key == snp_report.VLEK:
        return _provider(case, hardware, provider)
    chip = case.report.chip_id
    if provider is not None or hardware is None:
        raise Wrong("the certificate names no chip, as a VCEK must", DAMAGED)
    if not hmac.compare_digest(hardware, chip[:size]) or any(chip[size:]):
        hidden = "the host hides it" if not any(chip) else "the certificate is of another chip"
        raise Wrong(f"the report's chip id is not the certificate's: {hidden}", "ask for this chip's certificate")
    if case.rules.chip_ids.unchecked:
        return f"the certificate's, {chip[:8].hex()}...; the policy takes any chip"
    return listed(case.rules.chip_ids, chip[:size].hex(), "the chip", f"{chip[:8].hex()}...")


def _provider(case: Case, hardware: bytes | None, provider: str | None) -> str:
    if provider is None or hardware is not None:
        raise Wrong("the certificate names no cloud provider, as a VLEK must", DAMAGED)
    if not case.rules.chip_ids.unchecked:
        raise Wrong("the policy pins chip ids, and a VLEK says nothing about the chip", CHANGE)
    return listed(case.rules.vlek_csp_ids, provider, "the cloud provider", provider)


GENUINE: tuple[tuple[str, Callable[[Case], str]], ...] = (
    ("size", _size),
    ("version", _version),
    ("reserved bits", _reserved),
    ("signature algorithm", _algorithm),
    ("signing key", _signing_key),
    ("product line", _product_line),
    ("chain", _chain),
    ("validity", _validity),
    ("revocation", _revocation),
    ("report signature", _signature),
    ("reported TCB", _reported_tcb),
    ("chip id", _chip_id),
)
