"""The welcome of a hostile GPU worker: it has a deadline as a whole, and no data."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trusted_worker.stream_plane import StreamPlane
from wire.errors import UnavailableError
from wire.stream_socket import MAX_ENVELOPE_BYTES, TICKET_BYTES, pack
from wire.v1 import gpu_worker_pb2 as pb

TICKET = bytes(TICKET_BYTES)


@contextmanager
def saying(path: Path, welcome: bytes, pause: float) -> Iterator[str]:
    """The address of a worker that says so, a byte at a time, and then nothing."""
    over = threading.Event()

    def speak() -> None:
        peer, _ = listener.accept()
        with peer, contextlib.suppress(OSError):
            for byte in welcome:
                peer.sendall(bytes([byte]))
                if over.wait(pause):
                    return
            over.wait()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=speak)
        thread.start()
        yield f"unix:{path}"
        over.set()
        thread.join()


def test_a_welcome_is_waited_for_as_a_whole(tmp_path: Path) -> None:
    """Each of its bytes comes in time; all of them would take an hour."""
    welcome = struct.pack("<II", MAX_ENVELOPE_BYTES, 0) + bytes(MAX_ENVELOPE_BYTES)
    with saying(tmp_path / "socket", welcome, 0.05) as address, pytest.raises(UnavailableError, match="refused"):
        StreamPlane(address, TICKET, 0.3)


def test_a_welcome_with_data_is_none(tmp_path: Path) -> None:
    welcome = pack(pb.ExecuteResponse(), 8)
    with saying(tmp_path / "socket", welcome, 0) as address, pytest.raises(UnavailableError, match="refused"):
        StreamPlane(address, TICKET, 10)


def test_an_empty_welcome_opens_the_stream(tmp_path: Path) -> None:
    with saying(tmp_path / "socket", pack(pb.ExecuteResponse()), 0) as address:
        plane = StreamPlane(address, TICKET, 10)
        assert not plane.ended
        plane.close()
