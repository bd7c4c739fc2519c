"""Which targets are local, and the options that both ends agree on."""

import pytest

from wire import channel
from wire.channel import is_local
from wire.codec import FRAME_BYTES

LOCAL = [
    "unix:/run/cleave.sock",
    "unix:///run/cleave.sock",
    "unix:relative",
    "127.0.0.1:50051",
    "127.0.0.1:0",
    "127.8.9.10:1",
    "[::1]:50051",
    "localhost:50051",
]
REMOTE = [
    "",
    ":50051",
    "0.0.0.0:50051",
    "[::]:50051",
    "*:50051",
    "10.0.0.1:50051",
    "128.0.0.1:50051",
    "worker.example.com:50051",
    "127.0.0.1.evil.com:50051",
    "localhost.evil.com:50051",
    "evil.com:127.0.0.1",
    "127.0.0.1@evil.com:50051",
    "evil.com/127.0.0.1:50051",
    "dns:///evil.com:50051",
    "dns://127.0.0.1/evil.com:50051",
    "ipv4:10.0.0.1:50051",
    "ipv4:127.0.0.1:1,10.0.0.1:50051",
    "127.0.0.1:1,10.0.0.1:50051",
    "unix.evil.com:50051",
    "unix-evil:50051",
    "xunix:/run/cleave.sock",
    " unix:/run/cleave.sock",
    "vsock:2:50051",
    "[fe80::1]:50051",
    "[::ffff:10.0.0.1]:50051",
    "[2001:db8::1]:50051",
    "[::1].evil.com:50051",
    "2130706433:50051",
    "0177.0.0.1:50051",
    "127.0.0.1",
    "localhost",
]


@pytest.mark.parametrize("target", LOCAL)
def test_unix_sockets_and_loopback_are_local(target: str) -> None:
    assert is_local(target)


@pytest.mark.parametrize("target", REMOTE)
def test_everything_else_is_not(target: str) -> None:
    assert not is_local(target)


def test_abstract_sockets_are_not_taken_for_local_ones() -> None:
    """They have no file and so no permissions: every user of the machine could connect."""
    assert not is_local("unix-abstract:cleave")


@pytest.mark.parametrize("target", ["::1:50051", "::1:8443"])
def test_an_ipv6_address_needs_its_brackets(target: str) -> None:
    """Without them gRPC takes all of it for the address: ::1:50051 is another host, on the default port."""
    assert not is_local(target)


def test_a_frame_and_its_envelope_fit_a_message_and_not_much_more() -> None:
    for options in (dict(channel.client_options()), dict(channel.server_options())):
        for direction in ("send", "receive"):
            assert FRAME_BYTES < options[f"grpc.max_{direction}_message_length"] <= FRAME_BYTES + (1 << 16)
        assert options["grpc.keepalive_time_ms"] > 0


def test_a_channel_goes_through_no_proxy_and_a_port_has_one_server() -> None:
    assert dict(channel.client_options())["grpc.enable_http_proxy"] == 0
    assert dict(channel.server_options())["grpc.so_reuseport"] == 0


def test_a_server_permits_the_pings_of_its_clients() -> None:
    """A client that pings more often than the server allows is disconnected ("too many pings")."""
    server, client = dict(channel.server_options()), dict(channel.client_options())
    assert client["grpc.keepalive_time_ms"] >= server["grpc.http2.min_ping_interval_without_data_ms"]
