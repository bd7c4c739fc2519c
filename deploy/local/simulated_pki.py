"""A development PKI of AMD's form, and the SEV-SNP reports that it signs. Nothing in it protects anybody.

What is seen: a genuine format. ARK, ASK and VCEK are certificates of the kinds that AMD issues, and every report says
SIMULATED-NO-TEE in its FAMILY_ID. What is learnt: that the process with these keys made the report, which signs all
that it is asked to. What breaks it: whoever runs this machine. So a client takes it from this machine only, under a
policy that names this root.

Keys are made anew at every start and stay in memory; those of the authorities are dropped when the VCEK is signed.
"""

import os
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import Encoding

MARKER = b"SIMULATED-NO-TEE"  # 16 bytes
REPORT_DATA_BYTES, MEASUREMENT_BYTES = 64, 48
_REPORT_BYTES, _SIGNED_BYTES, _SCALAR_BYTES = 1184, 0x2A0, 72
_AMD = "1.3.6.1.4.1.3704.1"
_PRODUCT, _CPUID = b"Milan-B0", bytes((0x19, 0x01, 1))  # family, model, stepping
_TCB = {"3.1": 3, "3.2": 0, "3.3": 8, "3.8": 84}  # boot loader, TEE, SNP, microcode; each below 128
_TCB_BYTES = bytes((_TCB["3.1"], _TCB["3.2"], 0, 0, 0, 0, _TCB["3.3"], _TCB["3.8"]))
_FIRMWARE = bytes((4, 55, 1))  # build, minor, major
_GUIDS = (  # of VCEK, ASK, ARK in the certificate table of the GHCB specification, in the order of their text
    uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd"),
    uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"),
    uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"),
)


class DevPki:
    """A fresh root and one simulated chip. `root` is the SHA-256 of the ARK in hexadecimal, what a policy names."""

    def __init__(self) -> None:
        with ThreadPoolExecutor(2) as makers:  # about a second for both: the library lets go of the interpreter
            ark_key, ask_key = makers.map(lambda bits: rsa.generate_private_key(65537, bits), (4096, 4096))
        self._chip_id = os.urandom(64)
        self._key = ec.generate_private_key(ec.SECP384R1())
        ark = _authority("ARK-Simulated", "ARK-Simulated", ark_key.public_key(), ark_key)
        ask = _authority("SEV-Simulated", "ARK-Simulated", ask_key.public_key(), ark_key)
        vcek = _vcek(self._key.public_key(), self._chip_id, ask_key)
        self.root = ark.fingerprint(hashes.SHA256()).hex()
        self.table = certificate_table([one.public_bytes(Encoding.DER) for one in (vcek, ask, ark)])

    def report(self, report_data: bytes, measurement: bytes) -> bytes:
        """A signed report, 1184 bytes, over 64 bytes of report data and a measurement of 48 bytes.

        Raises ValueError for other sizes.
        """
        if (len(report_data), len(measurement)) != (REPORT_DATA_BYTES, MEASUREMENT_BYTES):
            raise ValueError("report data or measurement have another size")
        report = bytearray(_REPORT_BYTES)
        for offset, value in _fields(report_data, measurement, self._chip_id).items():
            report[offset : offset + len(value)] = value
        signed = bytes(report[:_SIGNED_BYTES])
        scalars = utils.decode_dss_signature(self._key.sign(signed, ec.ECDSA(hashes.SHA384())))
        signature = b"".join(one.to_bytes(_SCALAR_BYTES, "little") for one in scalars)
        return signed + signature.ljust(_REPORT_BYTES - _SIGNED_BYTES, b"\0")


def certificate_table(certificates: list[bytes]) -> bytes:
    """The host's table of VCEK, ASK and ARK in DER, as it lies in auxblob.

    Entries are GUID, offset u32, length u32, little-endian; an entry of zeros ends them, the certificates follow.
    """
    offset = 24 * (len(certificates) + 1)
    entries = b""
    for guid, certificate in zip(_GUIDS, certificates, strict=True):
        entries += guid.bytes + offset.to_bytes(4, "little") + len(certificate).to_bytes(4, "little")
        offset += len(certificate)
    return entries + bytes(24) + b"".join(certificates)


def _fields(report_data: bytes, measurement: bytes, chip_id: bytes) -> Mapping[int, bytes]:
    """Offset and bytes of what is not zero: version 3, of a guest without debugging and migration, at VMPL 0."""
    return {
        0x000: (3).to_bytes(4, "little"),
        0x008: (0x30000).to_bytes(8, "little"),  # POLICY: SMT, and the bit that must be one
        0x010: MARKER,
        0x034: (1).to_bytes(4, "little"),  # ECDSA on P-384 with SHA-384
        0x038: _TCB_BYTES,  # current
        0x050: report_data,
        0x090: measurement,
        0x140: os.urandom(32),  # REPORT_ID
        0x160: b"\xff" * 32,  # no migration agent
        0x180: _TCB_BYTES,  # reported
        0x188: _CPUID,
        0x1A0: chip_id,
        0x1E0: _TCB_BYTES,  # committed
        0x1E8: _FIRMWARE,
        0x1EC: _FIRMWARE,  # committed
        0x1F0: _TCB_BYTES,  # launch
    }


def _authority(name: str, issuer: str, key: rsa.RSAPublicKey, signer: rsa.RSAPrivateKey) -> x509.Certificate:
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # certificates, revocation lists
    builder = _builder(name, issuer, key)
    builder = builder.add_extension(x509.BasicConstraints(True, None), True).add_extension(usage, True)
    return _sign(builder, signer)


def _vcek(key: ec.EllipticCurvePublicKey, chip_id: bytes, signer: rsa.RSAPrivateKey) -> x509.Certificate:
    extensions = {number: bytes((2, 1, value)) for number, value in _TCB.items()}  # DER INTEGERs
    extensions |= {"2": bytes((0x16, len(_PRODUCT))) + _PRODUCT, "4": chip_id}
    builder = _builder("SEV-VCEK", "SEV-Simulated", key)
    for number, value in extensions.items():
        oid = x509.ObjectIdentifier(f"{_AMD}.{number}")
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), False)
    return _sign(builder, signer)


def _builder(name: str, issuer: str, key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    begin = datetime.now(UTC) - timedelta(hours=1)
    end = begin + timedelta(days=3650)
    return x509.CertificateBuilder(_name(issuer), _name(name), key, x509.random_serial_number(), begin, end)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _sign(builder: x509.CertificateBuilder, key: rsa.RSAPrivateKey) -> x509.Certificate:
    digest = hashes.SHA384()
    return builder.sign(key, digest, rsa_padding=padding.PSS(padding.MGF1(digest), digest.digest_size))
