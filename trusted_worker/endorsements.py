"""What travels with evidence and helps to verify it: certificates, revocation lists, collateral. None of it is trusted.

Certificates come from the host's table, where it gives one, and from the operator's files, which are read once.
Collateral comes from files alone, which may be replaced while the worker runs: a changed file is read again.

The host's table, as the GHCB specification has it: entries of 24 bytes, GUID, u32 offset, u32 length (little-endian),
up to an entry of zeros; offsets count from the table's start and lie behind its entries. A GUID's bytes stand in the
order of its digits.
"""

import base64
import binascii
import logging
import os
import re
import struct
import uuid
from pathlib import Path

from wire.errors import PreconditionError, UnavailableError

MAX_CERTIFICATE_BYTES = 64 << 10  # of a file, which may hold several, and of all of them
MAX_COLLATERAL_BYTES = 256 << 10  # of a file
MAX_COLLATERAL = 3  # files; with evidence, the host's table and claims they fit into one message
_ENTRY = struct.Struct("<16sII")
_GUIDS = {
    uuid.UUID(text).bytes
    for text in (
        "63da758d-e664-4564-adc5-f4b93be8accd",  # VCEK
        "a8074bc2-a25a-483e-aae6-39c045a0b8a1",  # VLEK
        "4ab7b379-bbac-4fe4-a02f-05aef327c782",  # ASK or ASVK
        "c0b406a4-a803-4952-9743-3fb6014cd0ae",  # ARK
    )
}
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")
_DER = b"\x30"  # a certificate is a SEQUENCE

log = logging.getLogger(__name__)


def in_table(table: bytes) -> list[bytes]:
    """The certificates of a host's table, DER; those of kinds that we do not know are left out. Raises ValueError."""
    if not table:
        return []
    entries = _entries(table)
    header, found = (len(entries) + 1) * _ENTRY.size, list[bytes]()
    for guid, offset, length in entries:
        if offset < header or offset + length > len(table):
            raise ValueError("an entry points outside the table")
        if guid in _GUIDS:
            found += in_file(table[offset : offset + length])
    return found


def _entries(table: bytes) -> list[tuple[bytes, int, int]]:
    found = list[tuple[bytes, int, int]]()
    for at in range(0, len(table) - _ENTRY.size + 1, _ENTRY.size):
        if not any(table[at : at + _ENTRY.size]):
            return found
        found.append(_ENTRY.unpack_from(table, at))
    raise ValueError("the table has no end")


def in_file(data: bytes) -> list[bytes]:
    """The certificates in PEM, as DER, or the one in DER. Raises ValueError when there are none."""
    if data.startswith(_DER):
        return [data]
    try:
        found = [base64.b64decode(b"".join(one.split()), validate=True) for one in _PEM.findall(data)]
    except binascii.Error:
        found = []
    if not found or not all(one.startswith(_DER) for one in found):
        raise ValueError("neither PEM nor DER")
    return found


class Endorsements:
    """The operator's files. Raises PreconditionError for what cannot be read or sent."""

    def __init__(self, certificates: list[Path], collateral: list[Path]) -> None:
        if len(collateral) > MAX_COLLATERAL:
            raise PreconditionError(f"more than {MAX_COLLATERAL} files of collateral cannot travel with evidence")
        self._certificates = [one for path in certificates for one in _certificates(path)]
        if sum(map(len, self._certificates)) > MAX_CERTIFICATE_BYTES:
            raise PreconditionError(f"the certificates have more than {MAX_CERTIFICATE_BYTES} bytes: leave some out")
        self._collateral = {path: (_stamp(path), _read(path, MAX_COLLATERAL_BYTES)) for path in collateral}

    def certificates(self, table: bytes) -> list[bytes]:
        """The host's, then the operator's, DER. Raises UnavailableError when the host's table is malformed."""
        try:
            return in_table(table) + self._certificates
        except ValueError as error:
            raise UnavailableError("the host's table of certificates is malformed: ask its operator") from error

    def collateral(self) -> list[bytes]:
        """What the files hold now; of one that cannot be read or is too large, what it held before."""
        for path, (stamp, _) in self._collateral.items():
            try:
                if (now := _stamp(path)) != stamp:
                    self._collateral[path] = now, _read(path, MAX_COLLATERAL_BYTES)
            except PreconditionError:
                log.warning("collateral could not be renewed: %s", path.name)
        return [held for _, held in self._collateral.values()]


def _certificates(path: Path) -> list[bytes]:
    try:
        return in_file(_read(path, MAX_CERTIFICATE_BYTES))
    except ValueError as error:
        raise PreconditionError(f"{path} holds no certificates in PEM or DER") from error


def _stamp(path: Path) -> tuple[int, int, int]:
    """What differs when a file was replaced or written."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise PreconditionError(f"{path} cannot be read") from error
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise PreconditionError(f"{path} cannot be read") from error
    if not 0 < len(data) <= most:
        raise PreconditionError(f"{path} is empty or has more than {most} bytes")
    return data
