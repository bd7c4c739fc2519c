"""Frames of the stream socket: lengths, what is read ahead, and who may listen where."""

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from wire import stream_socket
from wire.codec import FRAME_BYTES
from wire.errors import InvalidArgumentError, PreconditionError
from wire.settings import stream_address, stream_beside
from wire.stream_socket import MAX_ENVELOPE_BYTES, PREFIX_BYTES, Inbox, lengths, pack, unsent
from wire.v1 import gpu_worker_pb2 as pb

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_a_prefix_says_how_long_both_parts_are() -> None:
    frame = pb.ExecuteRequest(id=7)
    packed = pack(frame, 5)
    assert lengths(memoryview(packed[:PREFIX_BYTES])) == (frame.ByteSize(), 5)
    assert pb.ExecuteRequest.FromString(packed[PREFIX_BYTES:]) == frame


@pytest.mark.parametrize("over", [(MAX_ENVELOPE_BYTES + 1, 0), (0, FRAME_BYTES + 1), (2**32 - 1, 2**32 - 1)])
def test_lengths_over_the_limits_are_refused(over: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgumentError):
        lengths(memoryview(struct.pack("<II", *over)))
    assert lengths(memoryview(struct.pack("<II", MAX_ENVELOPE_BYTES, FRAME_BYTES))) == (MAX_ENVELOPE_BYTES, FRAME_BYTES)


@pytest.mark.parametrize("size", [1, 8, 4095, 4096, 10_000])
def test_what_is_read_ahead_comes_in_order(pair: Pair, size: int) -> None:
    data = bytes(i % 251 for i in range(30_000))
    pair[0].sendall(data)
    pair[0].close()
    inbox, place, read = Inbox(pair[1]), memoryview(bytearray(size)), b""
    while count := inbox.receive(place):
        read += place[:count]
    assert read == data
    assert inbox.empty


def test_a_part_of_what_is_there_leaves_the_inbox_not_empty(pair: Pair) -> None:
    pair[0].sendall(b"12345678abc")
    inbox, prefix = Inbox(pair[1]), memoryview(bytearray(8))
    assert (inbox.receive(prefix), bytes(prefix), inbox.empty) == (8, b"12345678", False)
    assert (inbox.receive(prefix), bytes(prefix[:3]), inbox.empty) == (3, b"abc", True)


def test_nothing_there_raises_and_loses_nothing(pair: Pair) -> None:
    pair[1].setblocking(False)
    inbox, place = Inbox(pair[1]), memoryview(bytearray(8))
    with pytest.raises(BlockingIOError):
        inbox.receive(place)
    pair[0].sendall(b"x")
    assert inbox.receive(place) == 1


def test_what_is_left_to_send() -> None:
    parts = [memoryview(b"abc"), memoryview(b""), memoryview(b"defg")]
    for sent in range(8):
        assert b"".join(unsent(parts, sent)) == b"abcdefg"[sent:]
    assert unsent(parts, 7) == []


def test_a_socket_that_was_left_behind_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = stream_socket.listen(f"unix:{path}")
    first.close()
    second = stream_socket.listen(f"unix:{path}")
    stream_socket.connect(f"unix:{path}", 1.0).close()
    second.close()
    stream_socket.remove(f"unix:{path}")
    path.write_text("a file")
    with pytest.raises(PreconditionError, match="cannot listen"):
        stream_socket.listen(f"unix:{path}")
    assert path.read_text() == "a file"
    with pytest.raises(PreconditionError):
        stream_socket.listen(f"unix:{tmp_path}/{'x' * 120}")


@pytest.mark.parametrize("text", ["unix:/run/a", "vsock:2:5000", "vsock:4294967295:1"])
def test_addresses(text: str) -> None:
    assert stream_address(text) == text


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "/run/a", "vsock:2", "vsock:a:1", "vsock:1:-1", "vsock:4294967296:1", "vsock:1:2:3", "tcp:1:2"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="vsock"):
        stream_address(text)


def test_a_socket_beside_that_of_grpc() -> None:
    assert stream_beside("unix:/run/gpu") == "unix:/run/gpu.stream"
    assert stream_beside("127.0.0.1:5000") is None


def test_vsock_where_the_kernel_has_it() -> None:
    """Bound on any CID, and heard of again under the same port. Connecting needs a hypervisor or vsock_loopback."""
    try:
        listener = stream_socket.listen(f"vsock:{socket.VMADDR_CID_ANY}:{socket.VMADDR_PORT_ANY}")
    except (PreconditionError, OSError):
        pytest.skip("no vsock here")
    with listener:
        assert listener.family == socket.AF_VSOCK
