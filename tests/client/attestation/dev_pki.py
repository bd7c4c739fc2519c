"""A PKI like AMD's, made once a test session, and reports in AMD's format that it signs.

Keys are of AMD's kinds (RSA-4096 with PSS above, P-384 in the leaf), since the verifier takes no others. Offsets are
written here again, from the specification: a mistake in the verifier's layout must not cancel itself out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import Encoding

from client.attestation.rules import AllowList, SnpRules
from client.attestation.snp_case import SnpEvidence

AT = datetime(2025, 6, 1, tzinfo=UTC)
BEGIN, END = datetime(2024, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC)
EXPECTED = bytes(range(64))
MEASUREMENT, HOST_DATA, ID_KEY, AUTHOR_KEY = b"\x11" * 48, b"\x22" * 32, b"\x33" * 48, b"\x44" * 48
CSP = "CN=cc-test.example"
TCB = {"bl": 3, "tee": 1, "snp": 8, "ucode": 217}
CPUID = {"Milan": (0x19, 0x01), "Genoa": (0x19, 0x11), "Turin": (0x1A, 0x02)}
OFFSETS = {
    "version": (0x000, 4), "guest_svn": (0x004, 4), "policy": (0x008, 8), "family_id": (0x010, 16),
    "image_id": (0x020, 16), "vmpl": (0x030, 4), "algorithm": (0x034, 4), "current_tcb": (0x038, 8),
    "platform_info": (0x040, 8), "keys": (0x048, 4), "reserved_4c": (0x04C, 4), "report_data": (0x050, 64),
    "measurement": (0x090, 48), "host_data": (0x0C0, 32), "id_key_digest": (0x0E0, 48),
    "author_key_digest": (0x110, 48), "report_id": (0x140, 32), "report_id_ma": (0x160, 32),
    "reported_tcb": (0x180, 8), "cpuid": (0x188, 3), "reserved_18b": (0x18B, 21), "chip_id": (0x1A0, 64),
    "committed_tcb": (0x1E0, 8), "current_build": (0x1E8, 1), "current_minor": (0x1E9, 1),
    "current_major": (0x1EA, 1), "reserved_1eb": (0x1EB, 1), "committed_build": (0x1EC, 1),
    "committed_minor": (0x1ED, 1), "committed_major": (0x1EE, 1), "reserved_1ef": (0x1EF, 1),
    "launch_tcb": (0x1F0, 8), "launch_mitigations": (0x1F8, 8), "current_mitigations": (0x200, 8),
    "reserved_208": (0x208, 152), "signature_r": (0x2A0, 72), "signature_s": (0x2E8, 72),
    "signature_rest": (0x330, 368),
}  # fmt: skip
_AMD = "1.3.6.1.4.1.3704.1"
_PARTS = {"bl": "3.1", "tee": "3.2", "snp": "3.3", "ucode": "3.8", "fmc": "3.9"}


def tcb_bytes(product: str, parts: Mapping[str, int]) -> bytes:
    """A TCB version as it lies in a report."""
    if product == "Turin":
        return bytes([parts["fmc"], parts["bl"], parts["tee"], parts["snp"], 0, 0, 0, parts["ucode"]])
    return bytes([parts["bl"], parts["tee"], 0, 0, 0, 0, parts["snp"], parts["ucode"]])


def tcb_of(product: str) -> dict[str, int]:
    return {**TCB, "fmc": 2} if product == "Turin" else dict(TCB)


def hardware_id(product: str) -> bytes:
    return bytes(range(1, 9)) if product == "Turin" else bytes(range(100, 164))


def integer(value: int) -> bytes:
    """DER, as AMD writes it."""
    return b"\x02\x02\x00" + bytes([value]) if value > 127 else bytes([2, 1, value])


def ia5(text: str) -> bytes:
    return bytes([0x16, len(text)]) + text.encode()


@dataclass(frozen=True)
class LeafForm:
    """What a leaf certificate says. Each test changes one thing."""

    name: str
    extensions: Mapping[str, bytes]  # by the last part of the number
    begin: datetime = BEGIN
    end: datetime = END
    curve: ec.EllipticCurve = field(default_factory=ec.SECP384R1)
    hash: Any = field(default_factory=hashes.SHA384)
    pss: bool = True

    def without(self, extension: str) -> "LeafForm":
        return replace(self, extensions={key: value for key, value in self.extensions.items() if key != extension})

    def having(self, extension: str, value: bytes) -> "LeafForm":
        return replace(self, extensions={**self.extensions, extension: value})


def leaf_form(product: str, signer: str) -> LeafForm:
    """A good VCEK or VLEK."""
    extensions = {_PARTS[part]: integer(value) for part, value in tcb_of(product).items()}
    extensions["2"] = ia5(product if signer == "vlek" or product != "Milan" else "Milan-B0")
    extensions |= {"5": ia5(CSP)} if signer == "vlek" else {"4": hardware_id(product)}
    return LeafForm(f"SEV-{signer.upper()}", extensions)


class Authority:
    """One RSA key and certificates of it."""

    def __init__(self, bits: int = 4096) -> None:
        self.key = rsa.generate_private_key(65537, bits)

    def sign(self, builder: Any, digest: Any = None, pss: bool = True) -> Any:
        """Sign a certificate or a revocation list as AMD does, unless told otherwise."""
        digest = digest or hashes.SHA384()
        scheme: Any = padding.PSS(padding.MGF1(digest), digest.digest_size) if pss else padding.PKCS1v15()
        return builder.sign(self.key, digest, rsa_padding=scheme)


class Pki:
    """ARK, ASK and ASVK; an impostor with the same names; leaves and reports on demand."""

    def __init__(self) -> None:
        self.ark_key, self.ask_key, self.impostor = Authority(), Authority(), Authority()
        self.ark = self.authority("ARK-Dev", "ARK-Dev", self.ark_key, self.ark_key)
        self.ask = self.authority("SEV-Dev", "ARK-Dev", self.ask_key, self.ark_key)
        self.asvk = self.authority("SEV-VLEK-Dev", "ARK-Dev", self.ask_key, self.ark_key)
        self._leaves: dict[tuple[str, str], tuple[ec.EllipticCurvePrivateKey, x509.Certificate]] = {}

    @property
    def roots(self) -> dict[str, str]:
        return dict.fromkeys(CPUID, self.ark.fingerprint(hashes.SHA256()).hex())

    def authority(
        self,
        name: str,
        issuer: str,
        key: Authority,
        signer: Authority,
        end: datetime = END,
        ca: bool = True,
        **sign: Any,
    ) -> x509.Certificate:
        usage = x509.KeyUsage(False, False, False, False, False, ca, False, False, False)
        builder = (
            _builder(name, issuer, key.key.public_key(), BEGIN, end)
            .add_extension(x509.BasicConstraints(ca, None), True)
            .add_extension(usage, True)
        )
        return signer.sign(builder, **sign)  # type: ignore[no-any-return]

    def leaf(
        self, form: LeafForm, issuer: str, signer: Authority | None = None
    ) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        key = ec.generate_private_key(form.curve)
        builder = _builder(form.name, issuer, key.public_key(), form.begin, form.end)
        for number, value in form.extensions.items():
            oid = x509.ObjectIdentifier(f"{_AMD}.{number}")
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), False)
        return key, (signer or self.ask_key).sign(builder, form.hash, form.pss)

    def good_leaf(self, product: str, signer: str) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        """Made once for each."""
        if (product, signer) not in self._leaves:
            self._leaves[product, signer] = self.leaf(leaf_form(product, signer), issuer_of(signer))
        return self._leaves[product, signer]

    def revocation_list(
        self,
        serials: tuple[int, ...] = (),
        signer: Authority | None = None,
        begin: datetime = BEGIN,
        end: datetime = END,
    ) -> bytes:
        builder = x509.CertificateRevocationListBuilder(_name("ARK-Dev"), begin, end)
        for serial in serials:
            one = x509.RevokedCertificateBuilder(serial, BEGIN).build()
            builder = builder.add_revoked_certificate(one)
        return (signer or self.ark_key).sign(builder).public_bytes(Encoding.DER)  # type: ignore[no-any-return]


def issuer_of(signer: str) -> str:
    return "SEV-VLEK-Dev" if signer == "vlek" else "SEV-Dev"


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _builder(name: str, issuer: str, key: Any, begin: datetime, end: datetime) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(_name(issuer), _name(name), key, x509.random_serial_number(), begin, end)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def fields_of(product: str, version: int, signer: str) -> dict[str, int | bytes]:
    """A good report's fields."""
    tcb = tcb_bytes(product, tcb_of(product))
    fields: dict[str, int | bytes] = {
        "version": version, "guest_svn": 7, "policy": 0x30000, "family_id": b"f" * 16, "image_id": b"i" * 16,
        "vmpl": 0, "algorithm": 1, "platform_info": 0x25, "keys": 0b101 if signer == "vlek" else 1,
        "report_data": EXPECTED, "measurement": MEASUREMENT, "host_data": HOST_DATA, "id_key_digest": ID_KEY,
        "author_key_digest": AUTHOR_KEY, "report_id": b"r" * 32, "report_id_ma": b"\xff" * 32,
        "current_tcb": tcb, "reported_tcb": tcb, "committed_tcb": tcb, "launch_tcb": tcb,
        "chip_id": bytes(64) if signer == "vlek" else hardware_id(product).ljust(64, b"\0"),
        "current_build": 4, "current_minor": 55, "current_major": 1,
        "committed_build": 4, "committed_minor": 55, "committed_major": 1,
    }  # fmt: skip
    if version >= 3:
        fields["cpuid"] = bytes([*CPUID[product], 1])
    if version >= 5:
        fields |= {"launch_mitigations": 3, "current_mitigations": 7}
    return fields


def pack(fields: Mapping[str, int | bytes]) -> bytes:
    report = bytearray(1184)
    for name, value in fields.items():
        offset, size = OFFSETS[name]
        report[offset : offset + size] = value.to_bytes(size, "little") if isinstance(value, int) else value
    return bytes(report)


def sign(report: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The report with its signature; what lies behind it stays."""
    r, s = utils.decode_dss_signature(key.sign(report[:0x2A0], ec.ECDSA(hashes.SHA384())))
    return report[:0x2A0] + r.to_bytes(72, "little") + s.to_bytes(72, "little") + report[0x330:]


def report(
    key: ec.EllipticCurvePrivateKey, product: str, version: int = 3, signer: str = "vcek", **changes: int | bytes
) -> bytes:
    """A signed report, in which `changes` replace good fields before it is signed."""
    return sign(pack({**fields_of(product, version, signer), **changes}), key)


def evidence(
    pki: Pki, product: str = "Milan", version: int = 3, signer: str = "vcek", **changes: int | bytes
) -> SnpEvidence:
    key, leaf = pki.good_leaf(product, signer)
    above = pki.asvk if signer == "vlek" else pki.ask
    certificates = (der(leaf), der(above), der(pki.ark))
    return SnpEvidence(report(key, product, version, signer, **changes), certificates, (pki.revocation_list(),))


def rules(**changes: Any) -> SnpRules:
    """Rules under which every good report of a VCEK is accepted, and every field is checked."""
    good = SnpRules(
        products=frozenset(CPUID),
        signers=frozenset({"vcek"}),
        vlek_csp_ids=AllowList(frozenset({CSP})),
        chip_ids=AllowList(frozenset(hardware_id(product).hex() for product in CPUID)),
        vmpl=0,
        min_abi=(1, 55),
        min_tcb={product: tcb_of(product) for product in CPUID},
        allow_provisional_firmware=False,
        require_crl=True,
        measurements=AllowList(frozenset({MEASUREMENT.hex()})),
        host_data=AllowList(frozenset({HOST_DATA.hex()})),
        id_key_digests=AllowList(frozenset({ID_KEY.hex()})),
        author_key_digests=AllowList(frozenset({AUTHOR_KEY.hex()})),
    )
    return replace(good, **changes)


VLEK = {"signers": frozenset({"vlek"}), "chip_ids": AllowList(unchecked=True)}
