"""The signature of a TDX quote, back to Intel's root, from the quote alone.

`dcap-qvl` checks the same and the TCB besides, but only with collateral. This check needs none: it lets a verdict say
"signed by genuine hardware, and a debug guest" instead of "no collateral".

    header 48, body, u32 n, then n bytes: signature 64, attestation key 64, u16 6, u32 size,
    QE report 384, its signature 64, u16 n, n bytes of data, u16 5, u32 size, PCK chain in PEM
"""

import struct
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from client.attestation.checklist import Wrong
from client.attestation.snp_certificates import UNREADABLE

# Intel SGX Root CA, SHA-256 of the certificate (DER); certificates.trustedservices.intel.com
INTEL_ROOT = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
HEADER_BYTES = 48
BODY_BYTES = {2: 584, 3: 648}  # by the type of the body that version 5 names; version 4 has type 2
MAX_PCK_CERTIFICATES = 4
DAMAGED = "the quote is damaged or was not made by Intel's hardware: ask the operator for fresh evidence"
_QE_REPORT_BYTES, _QE_DATA = 384, slice(320, 352)
_CERTIFIED_BY_QE, _PCK_CHAIN = 6, 5


class _Signed(NamedTuple):
    """The parts of a quote that carry signatures."""

    body: bytes  # header and body
    signature: bytes
    key: bytes  # the attestation key, X and Y
    qe_report: bytes
    qe_signature: bytes
    qe_data: bytes
    pck_chain: bytes


def check_signature(quote: bytes, at: datetime, root: str) -> str:
    """Every signature from the body to the root of that fingerprint, valid at the time. Raises Wrong."""
    try:
        parts = _split(quote)
        chain = x509.load_pem_x509_certificates(parts.pck_chain.rstrip(b"\0"))
        pck = _check_chain(chain, at, root)
        _verify(pck, parts.qe_signature, parts.qe_report)
        bound = hashes.Hash(hashes.SHA256())
        bound.update(parts.key + parts.qe_data)
        if bound.finalize() != parts.qe_report[_QE_DATA]:
            raise Wrong("the quoting enclave did not certify the attestation key", DAMAGED)
        _verify(ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\4" + parts.key), *parts[1::-1])
    except (struct.error, *UNREADABLE) as error:
        raise Wrong("the signature part of the quote cannot be read", DAMAGED) from error
    except InvalidSignature as error:
        raise Wrong("a signature of the quote is wrong", DAMAGED) from error
    return f"good, to Intel's root {root[:16]}"


def _split(quote: bytes) -> _Signed:
    """Raises struct.error and Wrong. What follows the signature part must be padding."""
    end = _body_end(quote)
    (size,) = struct.unpack_from("<I", quote, end)
    rest = quote[end + 4 : end + 4 + size]
    if len(rest) != size or any(quote[end + 4 + size :]):
        raise Wrong("the quote is cut off, or something follows it", DAMAGED)
    take = _reader(rest)
    signature, key = take(64), take(64)
    if struct.unpack("<HI", take(6)) != (_CERTIFIED_BY_QE, len(rest) - 134):
        raise Wrong("the attestation key is not certified by a quoting enclave", DAMAGED)
    report, report_signature = take(_QE_REPORT_BYTES), take(64)
    data = take(struct.unpack("<H", take(2))[0])
    kind, length = struct.unpack("<HI", take(6))
    if kind != _PCK_CHAIN:
        raise Wrong(f"the quote carries no PCK chain but data of type {kind}", "ask for a quote with its PCK chain")
    return _Signed(quote[:end], signature, key, report, report_signature, data, take(length))


def _body_end(quote: bytes) -> int:
    (version,) = struct.unpack_from("<H", quote)
    if version == 4:
        return HEADER_BYTES + BODY_BYTES[2]
    kind, size = struct.unpack_from("<HI", quote, HEADER_BYTES)
    if BODY_BYTES.get(kind) != size:
        raise Wrong(f"a body of type {kind} with {size} bytes is not known", "use a newer client, if it is newer")
    return int(HEADER_BYTES + 6 + size)


def _reader(data: bytes) -> Callable[[int], bytes]:
    """A function that takes the next bytes. It raises struct.error when there are not enough."""
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        if at > len(data):
            raise struct.error("too short")
        return data[at - count : at]

    return take


def _check_chain(chain: list[x509.Certificate], at: datetime, root: str) -> ec.EllipticCurvePublicKey:
    """From the PCK certificate to the root; its public key. Raises Wrong, InvalidSignature and ValueError."""
    if len(chain) > MAX_PCK_CERTIFICATES or chain[-1].fingerprint(hashes.SHA256()).hex() != root:
        raise Wrong("the PCK chain does not end in Intel's root", DAMAGED)
    for one, issuer in zip(chain, [*chain[1:], chain[-1]], strict=True):
        one.verify_directly_issued_by(issuer)
        if not one.not_valid_before_utc <= at <= one.not_valid_after_utc:
            raise Wrong(f"a certificate of the PCK chain is not valid at {at:%Y-%m-%d}", DAMAGED)
    if not all(_authority(one) for one in chain[1:]):
        raise Wrong("the PCK chain has an issuer that is no authority", DAMAGED)
    key = chain[0].public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise Wrong("the PCK certificate has no key on an elliptic curve", DAMAGED)
    return key


def _authority(certificate: x509.Certificate) -> bool:
    found = [one.value for one in certificate.extensions if isinstance(one.value, x509.BasicConstraints)]
    return bool(found and found[0].ca)


def _verify(key: ec.EllipticCurvePublicKey, signature: bytes, signed: bytes) -> None:
    """ECDSA over SHA-256; R and S are 32 bytes each, big-endian. Raises InvalidSignature and ValueError."""
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    key.verify(utils.encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
