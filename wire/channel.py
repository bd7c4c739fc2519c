"""gRPC channel and server options, in one place: sizes, keepalive, and which addresses are local.

A frame's data is at most codec.FRAME_BYTES; the message limit leaves room for its envelope and no more.
"""

import ipaddress

from wire.codec import FRAME_BYTES

MAX_MESSAGE_BYTES = FRAME_BYTES + (1 << 16)
CONNECT_SECONDS = 10.0

Options = list[tuple[str, int]]

_COMMON: Options = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


def client_options() -> Options:
    """Options of a channel; it never goes through a proxy."""
    return [*_COMMON, ("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", 2_000)]


def server_options() -> Options:
    """Options of a server. A second server on the same port is an error, not a load balancer."""
    return [*_COMMON, ("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 10_000)]


def is_local(target: str) -> bool:
    """Whether a gRPC target is a Unix socket or a loopback address."""
    if target.startswith("unix:"):
        return True
    host = target.rpartition(":")[0]
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
