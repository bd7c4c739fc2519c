"""An SEV-SNP attestation report: 1184 bytes, little-endian, versions 2 to 5. Reading it judges nothing.

Offsets and names are those of AMD's SEV-SNP ABI specification (publication 56860), table ATTESTATION_REPORT.
"""

import struct
from typing import NamedTuple

REPORT_BYTES = 1184
SIGNED_BYTES = 0x2A0
VERSIONS = (2, 3, 4, 5)
CPUID_SINCE = 3  # versions before have reserved bytes there
MITIGATIONS_SINCE = 5
SCALAR_BYTES = 72  # of R and of S, little-endian; a P-384 scalar takes 48
VCEK, VLEK = 0, 1  # SIGNING_KEY; 7: none
SIGNERS = {VCEK: "vcek", VLEK: "vlek"}

_LAYOUT = struct.Struct("<IIQ16s16sII8sQII64s48s32s48s48s32s32s8s24s64s8s4s4s8s168s512s")
_POLICY_MUST_BE_ONE, _POLICY_RESERVED = 1 << 17, ~((1 << 26) - 1)
_POLICY_MIGRATION, _POLICY_DEBUG = 1 << 18, 1 << 19
_PLATFORM_RESERVED = ~0b1011_1111
_KEYS_RESERVED = ~0b1_1111


class Report(NamedTuple):
    """The fields in their order; byte strings as they lie, integers read."""

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    signature_algorithm: int
    current_tcb: bytes
    platform_info: int
    keys: int  # bit 0 AUTHOR_KEY_EN, bit 1 MASK_CHIP_KEY, bits 2 to 4 SIGNING_KEY
    reserved_4c: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid: bytes  # family, model, stepping, then reserved
    chip_id: bytes
    committed_tcb: bytes
    current_firmware: bytes  # build, minor, major, reserved
    committed_firmware: bytes
    launch_tcb: bytes
    mitigations: bytes  # two vectors of 8 bytes from version 5 on, then reserved
    signature: bytes

    @property
    def signing_key(self) -> int:
        """VCEK, VLEK, or something else."""
        return self.keys >> 2 & 0b111

    @property
    def author_key_enabled(self) -> bool:
        """Whether AUTHOR_KEY_DIGEST says something."""
        return bool(self.keys & 1)

    @property
    def debug(self) -> bool:
        """Whether the host may read the guest's memory."""
        return bool(self.policy & _POLICY_DEBUG)

    @property
    def migration(self) -> bool:
        """Whether a migration agent may move the guest."""
        return bool(self.policy & _POLICY_MIGRATION)


def read(raw: bytes) -> Report:
    """The report in exactly REPORT_BYTES bytes. Raises ValueError for another size."""
    if len(raw) != REPORT_BYTES:
        raise ValueError("not the size of a report")
    return Report._make(_LAYOUT.unpack(raw))


def not_zero(report: Report) -> list[str]:
    """Names of what is reserved and set, or should be set and is not. Reserved bytes of TCBs depend on the product."""
    cpuid = 3 if report.version >= CPUID_SINCE else 0
    vectors = 16 if report.version >= MITIGATIONS_SINCE else 0
    found = {
        "POLICY": report.policy & _POLICY_RESERVED or not report.policy & _POLICY_MUST_BE_ONE,
        "PLATFORM_INFO": report.platform_info & _PLATFORM_RESERVED,
        "key information": report.keys & _KEYS_RESERVED,
        "offset 0x4C": report.reserved_4c,
        "offset 0x188": any(report.cpuid[cpuid:]),
        "offset 0x1EB": report.current_firmware[3],
        "offset 0x1EF": report.committed_firmware[3],
        "offset 0x1F8": any(report.mitigations[vectors:]),
        "SIGNATURE": any(report.signature[2 * SCALAR_BYTES :]),
    }
    return [name for name, wrong in found.items() if wrong]


def scalars(report: Report) -> tuple[int, int]:
    """R and S of the signature."""
    r, s = report.signature[:SCALAR_BYTES], report.signature[SCALAR_BYTES : 2 * SCALAR_BYTES]
    return int.from_bytes(r, "little"), int.from_bytes(s, "little")


def firmware(version: bytes) -> tuple[int, int, int]:
    """Major, minor and build of a firmware version."""
    return version[2], version[1], version[0]
