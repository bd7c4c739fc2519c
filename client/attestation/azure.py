"""Azure's confidential VMs: the hardware's report lies inside an HCL report in a vTPM. Read so far, and then refused.

The report data of that report is the hash of the vTPM's keys, made when the machine started; a nonce of ours would
have to go through a TPM quote by one of them. That path is not supported. What can be shown is that the hardware's
report inside is good, and that it binds the runtime data beside it.

    "HCLA", header 32 in all, hardware report 1184, u32 size, version, kind, hash, length; then JSON of that length
"""

import hashlib
import json
import struct
from typing import NamedTuple

from client.attestation.checklist import Step, Wrong, refuse
from client.attestation.rules import SEV_SNP
from client.attestation.snp_report import REPORT_BYTES

MAGIC = b"HCLA"
_HEADER_BYTES = 32
_KIND_SNP, _HASH_SHA256 = 2, 1
_ADVICE = "use a cloud or a host whose guests get reports from their own kernel (configfs-tsm)"


class Hcl(NamedTuple):
    """What an HCL report holds."""

    report: bytes  # of the hardware
    runtime: bytes  # JSON; its hash is the report data


def unwrap(data: bytes) -> bytes:
    """The HCL report in `data`: itself, or in the field `report` of a JSON object as a list of bytes. ValueError."""
    if data.lstrip()[:1] != b"{":
        return data
    try:
        return bytes(json.loads(data)["report"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("no HCL report in this JSON") from error


def split(data: bytes) -> Hcl:
    """The parts of an HCL report. Raises ValueError when it is none, or not one of SEV-SNP."""
    if data[:4] != MAGIC:
        raise ValueError("not an HCL report")
    end = _HEADER_BYTES + REPORT_BYTES
    try:
        _, _, kind, digest, length = struct.unpack_from("<5I", data, end)
    except struct.error as error:
        raise ValueError("cut off") from error
    runtime = data[end + 20 : end + 20 + length]
    if (kind, digest) != (_KIND_SNP, _HASH_SHA256) or len(runtime) != length:
        raise ValueError("not an HCL report of SEV-SNP with SHA-256, or cut off")
    return Hcl(data[_HEADER_BYTES:end], runtime)


def expected_report_data(hcl: Hcl) -> bytes:
    """The 64 bytes that the hardware's report must carry, if the runtime data beside it are its own."""
    return hashlib.sha256(hcl.runtime).digest() + bytes(32)


def unsupported(before: tuple[Step, ...]) -> Exception:
    """The refusal that follows even when the hardware's report is good, to be raised."""
    text = (
        "Azure's vTPM path is not supported: the hardware's report above is good, but binds no nonce and no key of ours"
    )
    return refuse(SEV_SNP, len(before) + 1, "Azure vTPM", Wrong(text, _ADVICE), before)
