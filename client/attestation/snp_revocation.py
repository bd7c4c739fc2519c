"""Revocation lists of an ARK. They name ASKs and ASVKs; a VCEK has no serial number to name, a new TCB replaces it."""

from collections.abc import Sequence
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from client.attestation.checklist import Wrong
from client.attestation.snp_certificates import UNREADABLE, Chain

MAX_LISTS = 4
MAX_LIST_BYTES = 1 << 20
_FETCH = "fetch it from kdsintf.amd.com/vcek/v1/{Milan,Genoa,Turin}/crl and pass it with --collateral"


def check_revocation(lists: Sequence[bytes], chain: Chain, at: datetime) -> str:
    """Find the ARK's list that is in force at the time; nothing of the chain may be on it. Raises Wrong."""
    if len(lists) > MAX_LISTS:
        raise Wrong(f"there are more than {MAX_LISTS} revocation lists", "pass the one of this product line")
    issued = [one for one in map(_read, lists) if one.issuer == chain.ark.subject and _signed(one, chain)]
    if not issued:
        raise Wrong("no revocation list of the ARK came with the evidence, and the policy requires one", _FETCH)
    current = [one for one in issued if _in_force(one, at)]
    if not current:
        raise Wrong(f"the ARK's revocation list is not in force at {at:%Y-%m-%d}", _FETCH)
    for name, certificate in chain.all():
        if any(one.get_revoked_certificate_by_serial_number(certificate.serial_number) for one in current):
            raise Wrong(f"the {name} was revoked", "do not use this machine; ask its operator for current certificates")
    return f"not revoked by the list of {max(one.last_update_utc for one in current):%Y-%m-%d}"


def _read(blob: bytes) -> x509.CertificateRevocationList:
    if len(blob) > MAX_LIST_BYTES:
        raise Wrong(f"a revocation list has more than {MAX_LIST_BYTES} bytes", _FETCH)
    try:
        found = x509.load_pem_x509_crl(blob) if b"-----BEGIN" in blob else x509.load_der_x509_crl(blob)
        _ = found.issuer, found.extensions
        _ = found.signature_hash_algorithm, [one.serial_number for one in found]
    except UNREADABLE as error:
        raise Wrong("a revocation list cannot be read", _FETCH) from error
    return found


def _signed(found: x509.CertificateRevocationList, chain: Chain) -> bool:
    try:
        return found.is_signature_valid(chain.ark.public_key())  # type: ignore[arg-type]  # RSA, as the chain checked
    except (InvalidSignature, *UNREADABLE):
        return False


def _in_force(found: x509.CertificateRevocationList, at: datetime) -> bool:
    return found.next_update_utc is not None and found.last_update_utc <= at < found.next_update_utc
