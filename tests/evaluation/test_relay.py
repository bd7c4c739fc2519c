"""Relays between two real sockets: bytes pass, and connections end when and where they should."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.relay import Relay, Relays

PATIENCE = 20.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "far"))
        listening.listen()
        listening.settimeout(PATIENCE)
        yield listening


@pytest.fixture
def relays() -> Iterator[Relays]:
    with Relays() as running:
        yield running


@pytest.fixture
def relay(relays: Relays, server: socket.socket, tmp_path: Path) -> Relay:
    return relays.add(f"unix:{tmp_path / 'near'}", f"unix:{tmp_path / 'far'}")


def connect(relay: Relay) -> socket.socket:
    near = socket.socket(socket.AF_UNIX)
    near.settimeout(PATIENCE)
    near.connect(relay.target.removeprefix("unix:"))
    return near


def ended(end: socket.socket) -> bool:
    """Whether nothing more comes; waits for it."""
    try:
        return end.recv(1) == b""
    except ConnectionResetError:
        return True


def test_bytes_pass_both_ways(relay: Relay, server: socket.socket) -> None:
    with connect(relay) as near, server.accept()[0] as far:
        sent = bytes(range(256)) * 4096
        writing = threading.Thread(target=near.sendall, args=(sent,))
        writing.start()
        received = bytearray()
        while len(received) < len(sent):
            received += far.recv(1 << 16)
        writing.join()
        assert received == sent
        far.sendall(b"back")
        assert near.recv(4) == b"back"


def test_an_end_is_passed_on(relay: Relay, server: socket.socket) -> None:
    near = connect(relay)
    with server.accept()[0] as far:
        near.close()
        assert ended(far)


def test_a_cut_ends_both_sides_and_the_next_connection_passes(
    relay: Relay, relays: Relays, server: socket.socket
) -> None:
    with connect(relay) as near, server.accept()[0] as far:
        relays.drop(relay, 0.0)
        assert ended(near)
        assert ended(far)
    with connect(relay) as near, server.accept()[0] as far:
        near.sendall(b"again")
        assert far.recv(5) == b"again"


def test_in_silence_the_far_side_hears_nothing_and_nobody_gets_through(
    relay: Relay, relays: Relays, server: socket.socket
) -> None:
    with connect(relay) as near, server.accept()[0] as far:
        relays.drop(relay, 3600.0)
        assert ended(near)
        with connect(relay) as refused:
            assert ended(refused)
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(1)


def test_after_the_silence_the_far_side_hears_of_the_end(relay: Relay, relays: Relays, server: socket.socket) -> None:
    with connect(relay) as near, server.accept()[0] as far:
        relays.drop(relay, 0.05)
        assert ended(near)
        far.settimeout(PATIENCE)
        assert ended(far)


def test_nobody_at_the_far_end_ends_the_connection(relay: Relay, server: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "far").unlink()
    with connect(relay) as near:
        assert ended(near)
