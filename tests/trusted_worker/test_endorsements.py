"""The host's table of certificates against hostile bytes, and the operator's files."""

import base64
import os
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trusted_worker.endorsements import (
    MAX_CERTIFICATE_BYTES,
    MAX_COLLATERAL,
    MAX_COLLATERAL_BYTES,
    Endorsements,
    in_file,
    in_table,
)
from wire.channel import MAX_MESSAGE_BYTES
from wire.errors import PreconditionError, UnavailableError

CASES = settings(deadline=None, max_examples=200, derandomize=True)
# Written out: the bytes of a GUID stand in the order of its digits
VCEK = bytes.fromhex("63da758de6644564adc5f4b93be8accd")
VLEK = bytes.fromhex("a8074bc2a25a483eaae639c045a0b8a1")
ASK = bytes.fromhex("4ab7b379bbac4fe4a02f05aef327c782")
ARK = bytes.fromhex("c0b406a4a8034952" + "97433fb6014cd0ae")
CRL = bytes.fromhex("92f81bc358114d3d" + "97ffd19f88dc67ea")
KNOWN = (VCEK, VLEK, ASK, ARK)
DER = st.binary(max_size=40).map(lambda rest: b"\x30" + rest)
ENTRY = struct.Struct("<16sII")


def table(entries: list[tuple[bytes, bytes]], gap: int = 0) -> bytes:
    """A table of (GUID, blob), each blob `gap` bytes behind the one before."""
    at, head, body = ENTRY.size * (len(entries) + 1), b"", b""
    for guid, blob in entries:
        body += bytes(gap)
        head += ENTRY.pack(guid, at + len(body), len(blob))
        body += blob
    return head + bytes(ENTRY.size) + body


def pem(der: bytes) -> bytes:
    lines = base64.encodebytes(der).replace(b"\n", b"\r\n")
    return b"-----BEGIN CERTIFICATE-----\r\n" + lines + b"-----END CERTIFICATE-----\r\n"


@CASES
@given(st.lists(st.tuples(st.sampled_from([*KNOWN, CRL, bytes(15) + b"\1"]), DER), max_size=6), st.integers(0, 5))
def test_what_is_in_a_table_comes_out(entries: list[tuple[bytes, bytes]], gap: int) -> None:
    assert in_table(table(entries, gap) + bytes(100)) == [blob for guid, blob in entries if guid in KNOWN]


@pytest.mark.parametrize("size", [0, ENTRY.size, 4096])
def test_an_empty_table(size: int) -> None:
    assert in_table(bytes(size)) == []


@CASES
@given(st.binary(max_size=200))
@example(VCEK + struct.pack("<II", 48, 0xFFFFFFFF) + bytes(24))
@example(bytes(23))
def test_any_bytes_give_certificates_of_theirs_or_an_error(data: bytes) -> None:
    try:
        found = in_table(data)
    except ValueError:
        return
    assert all(one in data for one in found)


@CASES
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@example(48, 10)
@example(47, 1)
@example(48, 11)
@example(58, 0)
@example(2**32 - 1, 2)
def test_entries_lie_behind_the_header_and_inside_the_table(offset: int, length: int) -> None:
    data = ENTRY.pack(ARK, offset, length) + bytes(ENTRY.size) + b"\x30" * 10
    if offset >= 48 and offset + length <= 58 and length:
        assert in_table(data) == [b"\x30" * length]
    else:
        with pytest.raises(ValueError, match=r"points outside|neither PEM nor DER"):
            in_table(data)


@pytest.mark.parametrize("left", [24, 30, 47])
def test_a_table_without_an_end_is_refused(left: int) -> None:
    with pytest.raises(ValueError, match="no end"):
        in_table(table([(VCEK, b"\x30")])[:left])


def test_only_one_order_of_a_guids_bytes_is_known() -> None:
    mixed = VCEK[3::-1] + VCEK[5:3:-1] + VCEK[7:5:-1] + VCEK[8:]
    assert in_table(table([(mixed, b"\x30one"), (VCEK, b"\x30two")])) == [b"\x30two"]


@CASES
@given(st.lists(DER, min_size=1, max_size=4))
def test_pem_with_several_certificates(ders: list[bytes]) -> None:
    assert in_file(b"text before\n" + b"and between\n".join(map(pem, ders))) == ders
    assert in_table(table([(ASK, b"\n" + b"".join(map(pem, ders)))])) == ders


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
        pem(b"\x02\x01\x00"),
        pem(b"\x30") + pem(b"\x31"),
        pem(b"\x30")[:-30],
        b"-----BEGIN CERTIFICATE-----\nMA=\n-----END CERTIFICATE-----\n",
        b"-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n",
    ],
)
def test_what_is_no_certificate_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither PEM nor DER"):
        in_file(data)
    (tmp_path / "file").write_bytes(data or b"\n")
    with pytest.raises(PreconditionError, match="file holds no certificates"):
        Endorsements([tmp_path / "file"], [])


def test_the_hosts_certificates_come_before_the_operators(tmp_path: Path) -> None:
    (tmp_path / "chain.pem").write_bytes(pem(b"\x30ask") + pem(b"\x30ark"))
    (tmp_path / "vcek.der").write_bytes(b"\x30vcek")
    files = Endorsements([tmp_path / "vcek.der", tmp_path / "chain.pem"], [])
    assert files.certificates(b"") == [b"\x30vcek", b"\x30ask", b"\x30ark"]
    assert files.certificates(table([(VLEK, b"\x30vlek")])) == [b"\x30vlek", b"\x30vcek", b"\x30ask", b"\x30ark"]
    with pytest.raises(UnavailableError, match="malformed"):
        files.certificates(b"not a table")


def test_a_replaced_file_of_collateral_is_read_again(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"first")
    two.write_bytes(b"other")
    files = Endorsements([], [one, two])
    assert files.collateral() == [b"first", b"other"]
    (tmp_path / "new").write_bytes(b"later")
    os.replace(tmp_path / "new", one)
    assert files.collateral() == [b"later", b"other"]
    two.write_bytes(b"edited in place")
    os.utime(two, ns=(1, 1))
    assert files.collateral() == [b"later", b"edited in place"]


def test_collateral_that_cannot_be_renewed_stays_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "list.crl"
    path.write_bytes(b"good")
    files = Endorsements([], [path])
    for spoil in (
        path.unlink,
        lambda: path.write_bytes(bytes(MAX_COLLATERAL_BYTES + 1)),
        lambda: path.write_bytes(b""),
    ):
        spoil()
        assert files.collateral() == [b"good"]
    assert caplog.messages == ["collateral could not be renewed: list.crl"] * 3
    path.write_bytes(b"good again")
    assert files.collateral() == [b"good again"]


def test_files_have_bounds_that_leave_room_in_a_message(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"\x30" * MAX_CERTIFICATE_BYTES)
    (tmp_path / "more").write_bytes(b"\x30" * (MAX_CERTIFICATE_BYTES + 1))
    (tmp_path / "list").write_bytes(bytes(MAX_COLLATERAL_BYTES))
    (tmp_path / "empty").touch()
    files = Endorsements([tmp_path / "large"], [tmp_path / "list"])
    host, evidence, claims = 64 << 10, 32 << 10, 16 << 10
    most = MAX_COLLATERAL * MAX_COLLATERAL_BYTES + MAX_CERTIFICATE_BYTES + host + evidence + claims
    assert sum(map(len, files.collateral() + files.certificates(b""))) < most < MAX_MESSAGE_BYTES - 4096
    for certificates, collateral, text in (
        (["more"], [], "more than"),
        (["large", "large"], [], "leave some out"),
        (["empty"], [], "empty"),
        (["missing"], [], "missing cannot be read"),
        ([], ["missing"], "missing cannot be read"),
        ([], ["empty"], "empty"),
        ([], ["list"] * (MAX_COLLATERAL + 1), "cannot travel"),
    ):
        with pytest.raises(PreconditionError, match=text):
            Endorsements([tmp_path / name for name in certificates], [tmp_path / name for name in collateral])
