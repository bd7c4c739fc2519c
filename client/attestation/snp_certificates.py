"""AMD's certificates: reading them, telling them apart, and the chain from a VCEK or VLEK to a pinned ARK.

Certificates come from whoever sent the evidence. Roots are pinned by fingerprint, names decide nothing, and the keys
must be what AMD uses: RSA with PSS above, P-384 in the leaf. The serial number of every VCEK is 0, which X.509 forbids
and `cryptography` warns of; the warning says nothing about the evidence.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from client.attestation.checklist import Wrong

MAX_CERTIFICATES = 16
MAX_CERTIFICATE_BYTES = 1 << 16  # of one file
ROOT_KEY_BITS = 4096
_AMD = "1.3.6.1.4.1.3704.1"
_PRODUCT, _HWID, _CSP_ID = (f"{_AMD}.{number}" for number in (2, 4, 5))
_TCB = {"bl": f"{_AMD}.3.1", "tee": f"{_AMD}.3.2", "snp": f"{_AMD}.3.3", "ucode": f"{_AMD}.3.8", "fmc": f"{_AMD}.3.9"}
_INTEGER, _OCTETS, _IA5 = 0x02, 0x04, 0x16
UNREADABLE = (  # what `cryptography` raises for certificates and lists that it cannot read
    ValueError,
    TypeError,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
)
_FETCH = "fetch them from AMD's key distribution service (kdsintf.amd.com) and pass them with --certs"


@dataclass(frozen=True)
class Leaf:
    """A VCEK or a VLEK: the certificate of the key that signs reports."""

    certificate: x509.Certificate

    @cached_property
    def values(self) -> dict[str, bytes]:
        """Contents of extensions that X.509 does not know, by their numbers."""
        found = [(one.oid.dotted_string, one.value) for one in self.certificate.extensions]
        return {oid: value.value for oid, value in found if isinstance(value, x509.UnrecognizedExtension)}

    @property
    def name(self) -> str:
        """The common name: SEV-VCEK or SEV-VLEK."""
        names = self.certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return str(names[0].value) if len(names) == 1 else ""

    @property
    def key(self) -> ec.EllipticCurvePublicKey:
        """The public key. Raises Wrong when it is not on P-384."""
        key = self.certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            raise Wrong("the key of the VCEK or VLEK is not on the curve P-384", _FETCH)
        return key

    def product_name(self) -> str:
        """As in Milan-B0. Raises Wrong."""
        return _text(self._value(_PRODUCT, "the product name"))

    def tcb(self, parts: Sequence[str]) -> dict[str, int]:
        """The parts of the TCB that the key was made for. Raises Wrong."""
        return {part: _byte(self._value(_TCB[part], f"the TCB part {part}")) for part in parts}

    def hardware_id(self, size: int) -> bytes | None:
        """The chip's id in `size` bytes, bare or as an OCTET STRING; None when there is none. Raises Wrong."""
        value = self.values.get(_HWID)
        if value is None or len(value) == size:
            return value
        if value[:2] == bytes((_OCTETS, size)) and len(value) == size + 2:
            return value[2:]
        raise _unreadable(f"its hardware id has {len(value)} bytes instead of {size}")

    def csp_id(self) -> str | None:
        """The cloud provider's name in a VLEK; None when there is none. Raises Wrong."""
        value = self.values.get(_CSP_ID)
        return None if value is None else _text(value)

    def _value(self, oid: str, what: str) -> bytes:
        if oid not in self.values:
            raise _unreadable(f"it lacks {what}")
        return self.values[oid]


@dataclass(frozen=True)
class Chain:
    """From the key that signed to the root."""

    leaf: Leaf
    ask: x509.Certificate  # or ASVK, above a VLEK
    ark: x509.Certificate

    def all(self) -> tuple[tuple[str, x509.Certificate], ...]:
        """Names and certificates."""
        return (self.leaf.name or "leaf", self.leaf.certificate), ("ASK", self.ask), ("ARK", self.ark)


def read_certificates(blobs: Sequence[bytes]) -> tuple[x509.Certificate, ...]:
    """Every certificate of PEM or DER files, each once. Raises Wrong."""
    found: dict[bytes, x509.Certificate] = {}
    for blob in blobs:
        if len(blob) > MAX_CERTIFICATE_BYTES:
            raise _unreadable(f"a certificate file has more than {MAX_CERTIFICATE_BYTES} bytes")
        for one in _read(blob):
            found[one.fingerprint(hashes.SHA256())] = one
    if len(found) > MAX_CERTIFICATES:
        raise _unreadable(f"there are more than {MAX_CERTIFICATES} certificates")
    return tuple(found.values())


def find_leaf(certificates: Sequence[x509.Certificate]) -> Leaf:
    """The only certificate that no authority's key is in. Raises Wrong."""
    leaves = [one for one in certificates if not isinstance(one.public_key(), rsa.RSAPublicKey)]
    if len(leaves) != 1:
        raise Wrong(f"there are {len(leaves)} VCEK or VLEK certificates instead of one", _FETCH)
    return Leaf(leaves[0])


def build_chain(certificates: Sequence[x509.Certificate], pin: str) -> Chain:
    """Leaf, ASK and the pinned ARK, every signature checked. Raises Wrong."""
    leaf = find_leaf(certificates)
    arks = [one for one in certificates if fingerprint(one) == pin]
    if not arks:
        raise Wrong("no certificate is the root (ARK) that is pinned for this product line", _FETCH)
    asks = [one for one in certificates if one.subject == leaf.certificate.issuer and one != leaf.certificate]
    if len(asks) != 1:
        raise Wrong(f"there are {len(asks)} certificates (ASK, ASVK) that could have issued the leaf", _FETCH)
    _check_authority(asks[0], "ASK")
    _check_authority(arks[0], "ARK")
    _check_issued(leaf.certificate, asks[0], "VCEK or VLEK", "ASK")
    _check_issued(asks[0], arks[0], "ASK", "ARK")
    _check_issued(arks[0], arks[0], "ARK", "ARK")
    return Chain(leaf, asks[0], arks[0])


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate, in hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def _read(blob: bytes) -> list[x509.Certificate]:
    """Certificates whose every part that is used below can be read: parsing is lazy, and must not fail later."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Parsed a serial number")
        try:
            pem = b"-----BEGIN" in blob
            found = x509.load_pem_x509_certificates(blob) if pem else [x509.load_der_x509_certificate(blob)]
            for one in found:
                _ = one.subject, one.issuer, one.extensions, one.public_key()
                _ = one.signature_hash_algorithm, one.signature_algorithm_parameters
        except UNREADABLE as error:
            raise _unreadable("it is no certificate in PEM or DER, or not of a kind that AMD issues") from error
    return found


def _check_authority(certificate: x509.Certificate, name: str) -> None:
    key = certificate.public_key()
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != ROOT_KEY_BITS:
        raise Wrong(f"the key of the {name} is not RSA of {ROOT_KEY_BITS} bits", _FETCH)
    try:
        authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound as error:
        raise _unreadable(f"the {name} does not say that it may issue certificates") from error
    if not (authority and usage):
        raise Wrong(f"the {name} may not issue certificates", _FETCH)


def _check_issued(certificate: x509.Certificate, issuer: x509.Certificate, name: str, above: str) -> None:
    if not isinstance(certificate.signature_algorithm_parameters, padding.PSS):
        raise Wrong(f"the {name} is not signed with RSA-PSS, as AMD signs", _FETCH)
    if not isinstance(certificate.signature_hash_algorithm, hashes.SHA384):
        raise Wrong(f"the {name} is not signed over SHA-384, as AMD signs", _FETCH)
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *UNREADABLE) as error:
        raise Wrong(f"the {name} was not issued by the {above} that came with it", _FETCH) from error


def _der(value: bytes, tag: int) -> bytes:
    """The contents of one short DER value and nothing after it. Raises Wrong."""
    if len(value) < 2 or value[0] != tag or value[1] > 0x7F or len(value) != value[1] + 2:
        raise _unreadable("an extension is not the DER that AMD writes")
    return value[2:]


def _byte(value: bytes) -> int:
    """A DER INTEGER from 0 to 255: 128 and more have a zero byte in front. Raises Wrong."""
    contents = _der(value, _INTEGER)
    number = int.from_bytes(contents, "big", signed=True)
    if not contents or not 0 <= number <= 0xFF or len(contents) != 1 + (number > 0x7F):
        raise _unreadable("a TCB part is not a whole number from 0 to 255")
    return number


def _text(value: bytes) -> str:
    contents = _der(value, _IA5)
    if not contents.isascii() or not contents.decode("ascii").isprintable():
        raise _unreadable("a name in it is not printable")
    return contents.decode("ascii")


def _unreadable(text: str) -> Wrong:
    return Wrong(f"a certificate cannot be used: {text}", _FETCH)
