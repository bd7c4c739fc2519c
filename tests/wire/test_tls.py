"""Mutual TLS over real sockets: who shows what is asked for gets through, and nobody else."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from wire.errors import DeniedError, PreconditionError
from wire.tls import Tls, from_flags

# P-256 certificates that are valid for a hundred years. `authority` signed `worker` (localhost, 127.0.0.1) and
# `elsewhere` (another name); `stranger` signed `intruder`. The keys protect nothing.
FILES = Path(__file__).parent / "certificates"


def files(name: str, authority: str = "authority") -> Tls:
    return Tls(FILES / f"{name}.pem", FILES / f"{name}.key", FILES / f"{authority}.pem")


class _Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, _: request)


def _serve(credentials: grpc.ServerCredentials) -> tuple[grpc.Server, int]:
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((_Echo(),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    return server, port


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server, port = _serve(files("worker").server())
    yield port
    server.stop(0)


def _call(channel: grpc.Channel) -> bytes:
    with channel:
        method: Any = channel.unary_unary("/any/Method")
        answer: bytes = method(b"hello", timeout=20)
    return answer


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_both_show_their_certificates(port: int, host: str) -> None:
    assert _call(grpc.secure_channel(f"{host}:{port}", files("worker").client())) == b"hello"


@pytest.mark.parametrize(
    "client",
    [
        pytest.param(files("intruder"), id="certificate of another authority"),
        pytest.param(files("worker", "stranger"), id="does not trust the server"),
    ],
)
def test_strangers_are_refused(port: int, client: Tls) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        _call(grpc.secure_channel(f"127.0.0.1:{port}", client.client()))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_client_without_a_certificate_is_refused(port: int) -> None:
    credentials = grpc.ssl_channel_credentials((FILES / "authority.pem").read_bytes())
    with pytest.raises(grpc.RpcError) as caught:
        _call(grpc.secure_channel(f"127.0.0.1:{port}", credentials))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_plaintext_is_refused(port: int) -> None:
    with pytest.raises(grpc.RpcError):
        _call(grpc.insecure_channel(f"127.0.0.1:{port}"))


def test_a_server_with_another_name_is_refused() -> None:
    server, port = _serve(files("elsewhere").server())
    with pytest.raises(grpc.RpcError) as caught:
        _call(grpc.secure_channel(f"127.0.0.1:{port}", files("worker").client()))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    server.stop(0)


def test_all_three_files_or_none() -> None:
    one = Path("x.pem")
    assert from_flags(None, None, None) is None
    assert from_flags(one, one, one) == Tls(one, one, one)
    for some in ((one, None, None), (None, one, one), (one, one, None)):
        with pytest.raises(DeniedError, match="all of --tls-certificate"):
            from_flags(*some)


def _with(folder: Path, part: str) -> tuple[Tls, str]:
    """Files of which one is something else, and what should be said."""
    (folder / "empty.pem").write_bytes(b"")
    (folder / "noise.pem").write_bytes(bytes(range(256)))
    good = files("worker")
    return {
        "no certificate": (Tls(folder / "noise.pem", good.key, good.authority), "noise.pem"),
        "no key": (Tls(good.certificate, good.certificate, good.authority), "worker.pem"),
        "another key": (Tls(good.certificate, FILES / "elsewhere.key", good.authority), "elsewhere.key"),
        "no authority": (Tls(good.certificate, good.key, folder / "empty.pem"), "empty.pem"),
        "missing": (Tls(good.certificate, folder / "missing.key", good.authority), "missing.key cannot be read"),
        "folder": (Tls(folder, good.key, good.authority), "cannot be read"),
    }[part]


@pytest.mark.parametrize("part", ["no certificate", "no key", "another key", "no authority", "missing", "folder"])
def test_files_that_cannot_work_are_named(tmp_path: Path, part: str) -> None:
    tls, complaint = _with(tmp_path, part)
    for make in (tls.server, tls.client):
        with pytest.raises(PreconditionError, match=complaint) as caught:
            make()
        assert "\n" not in str(caught.value)
