"""TDX quotes in Intel's format, signed under a root of our own. Collateral is stubbed: it is too much to imitate."""

import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import Encoding

from tests.client.attestation.dev_pki import BEGIN, END, EXPECTED, MEASUREMENT

BODY = {
    "mr_seam": (16, 48),
    "attributes": (120, 8),
    "mr_td": (136, 48),
    "mr_config_id": (184, 48),
    "report_data": (520, 64),
}
BODY |= {f"rtmr{number}": (328 + 48 * number, 48) for number in range(4)}
GOOD = dict.fromkeys(BODY, MEASUREMENT) | {"attributes": bytes.fromhex("0000001000000000"), "report_data": EXPECTED}
ISSUED = datetime(2025, 5, 25, tzinfo=UTC)


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = utils.decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _point(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


@dataclass
class Quotes:
    """A root, a platform's authority, a PCK and an attestation key."""

    root_key: ec.EllipticCurvePrivateKey = field(default_factory=_key)
    platform_key: ec.EllipticCurvePrivateKey = field(default_factory=_key)
    pck_key: ec.EllipticCurvePrivateKey = field(default_factory=_key)
    key: ec.EllipticCurvePrivateKey = field(default_factory=_key)

    def certificate(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        issuer: str,
        signer: ec.EllipticCurvePrivateKey,
        ca: bool = True,
    ) -> x509.Certificate:
        builder = x509.CertificateBuilder(_name(issuer), _name(name), key.public_key(), 1, BEGIN, END)
        return builder.add_extension(x509.BasicConstraints(ca, None), True).sign(signer, hashes.SHA256())

    def root(self) -> x509.Certificate:
        if not hasattr(self, "_root"):
            self._root = self.certificate("root", self.root_key, "root", self.root_key)
        return self._root

    @property
    def pin(self) -> str:
        return self.root().fingerprint(hashes.SHA256()).hex()

    def chain(self) -> list[x509.Certificate]:
        platform = self.certificate("platform", self.platform_key, "root", self.root_key)
        return [self.certificate("PCK", self.pck_key, "platform", self.platform_key, False), platform, self.root()]

    def signed(self, version: int = 4, key_type: int = 2, tee: int = 0x81, **fields: bytes) -> bytes:
        """Header and body."""
        body = bytearray(584)
        for name, value in {**GOOD, **fields}.items():
            offset, size = BODY[name]
            body[offset : offset + size] = value
        header = struct.pack("<HHI", version, key_type, tee) + bytes(4)
        header += bytes.fromhex("939a7233f79c4ca9940a0db3957f0607") + bytes(20)
        return header + (struct.pack("<HI", 2, 584) if version == 5 else b"") + bytes(body)

    def quote(self, signed: bytes, chain: list[x509.Certificate] | None = None, kind: int = 5, **parts: bytes) -> bytes:
        """A whole quote; `parts` replace what is made by default: signature, bound, qe_signature."""
        data = b"a" * 32
        digest = hashes.Hash(hashes.SHA256())
        digest.update(_point(self.key) + data)
        report = bytes(320) + parts.get("bound", digest.finalize()) + bytes(32)
        pem = b"".join(one.public_bytes(Encoding.PEM) for one in chain or self.chain())
        inner = report + parts.get("qe_signature", _signature(self.pck_key, report))
        inner += struct.pack("<H", len(data)) + data + struct.pack("<HI", kind, len(pem)) + pem
        rest = parts.get("signature", _signature(self.key, signed)) + _point(self.key)
        rest += struct.pack("<HI", 6, len(inner)) + inner
        return signed + struct.pack("<I", len(rest)) + rest


def stub(status: str = "UpToDate", issued: str = ISSUED.isoformat()) -> Any:
    """dcap-qvl, with collateral that suits every quote; reading quotes is its own."""
    import dcap_qvl

    text = f'{{"issueDate": "{issued}"}}'

    def verify(*_: object) -> SimpleNamespace:
        if status == "refused":
            raise ValueError("TCBInfo expired")
        return SimpleNamespace(status=status)

    collateral = SimpleNamespace(tcb_info=text, qe_identity=text)
    reader = SimpleNamespace(from_json=lambda _: collateral)
    return SimpleNamespace(Quote=dcap_qvl.Quote, QuoteCollateralV3=reader, verify=verify)
