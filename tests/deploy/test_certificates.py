"""Test certificates: what the script makes, and that a pair of gRPC ends takes these and no others."""

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from wire.tls import Tls

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "tls" / "make_certificates.sh"
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def make(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), str(folder), *options], capture_output=True, text=True, timeout=60, check=False)


def show(certificate: Path, *options: str) -> str:
    command = ["openssl", "x509", "-in", str(certificate), "-noout", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def pair(folder: Path, role: str, authority: Path | None = None) -> Tls:
    return Tls(folder / f"{role}.pem", folder / f"{role}.key", (authority or folder) / "authority.pem")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tls") / "certificates"
    done = make(made, "--gpu", "gpu.example,10.0.0.7", "--trusted", "trusted.example")
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of another authority."""
    made = tmp_path_factory.mktemp("others")
    assert make(made).returncode == 0
    return made


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    """A server with the GPU worker's certificate that answers every call with its request."""

    def answer(call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request)

    class Echo(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return answer(handler_call_details)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Echo()])
    number = server.add_secure_port("127.0.0.1:0", pair(folder, "gpu-worker").server())
    server.start()
    yield number
    server.stop(None).wait()


def call(port: int, credentials: grpc.ChannelCredentials, host: str = "127.0.0.1") -> bytes:
    options = [("grpc.ssl_target_name_override", host), ("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        echo: Any = channel.unary_unary("/echo/Echo")
        answer: bytes = echo(b"hello", timeout=20)
        return answer


def refused(port: int, credentials: grpc.ChannelCredentials, host: str = "127.0.0.1") -> bool:
    with pytest.raises(grpc.RpcError) as caught:
        call(port, credentials, host)
    code: grpc.StatusCode = caught.value.code()
    return code == grpc.StatusCode.UNAVAILABLE


def test_keys_are_their_owners_and_certificates_name_their_hosts(folder: Path) -> None:
    for name in ("authority", "trusted-worker", "gpu-worker"):
        assert (folder / f"{name}.key").stat().st_mode & 0o777 == 0o600
    names = show(folder / "gpu-worker.pem", "-ext", "subjectAltName")
    for name in ("DNS:localhost", "IP Address:127.0.0.1", "DNS:gpu.example", "IP Address:10.0.0.7"):
        assert name in names
    assert "trusted.example" not in names
    assert "trusted.example" in show(folder / "trusted-worker.pem", "-ext", "subjectAltName")
    assert "CA:TRUE" in show(folder / "authority.pem", "-ext", "basicConstraints")
    assert "CA:FALSE" in show(folder / "gpu-worker.pem", "-ext", "basicConstraints")


def test_certificates_last_for_30_days(folder: Path) -> None:
    day = 24 * 3600
    assert "will not expire" in show(folder / "gpu-worker.pem", "-checkend", str(29 * day))
    late = ["openssl", "x509", "-in", str(folder / "gpu-worker.pem"), "-noout", "-checkend", str(31 * day)]
    assert subprocess.run(late, capture_output=True, check=False).returncode == 1


def test_nothing_is_overwritten(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = make(folder)
    assert done.returncode == 2
    assert "is not overwritten" in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "options", [("--gpu", "a;b"), ("--gpu", "*"), ("--days", "0"), ("--days", "x"), ("--days",), ("--else", "1")]
)
def test_bad_options_make_nothing(options: tuple[str, ...], tmp_path: Path) -> None:
    done = make(tmp_path / "new", *options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_right_pair_talks(folder: Path, port: int) -> None:
    for host in ("127.0.0.1", "localhost", "gpu.example", "10.0.0.7"):
        assert call(port, pair(folder, "trusted-worker").client(), host) == b"hello"


def test_a_client_without_a_certificate_is_refused(folder: Path, port: int) -> None:
    assert refused(port, grpc.ssl_channel_credentials((folder / "authority.pem").read_bytes()))


def test_a_client_of_another_authority_is_refused(folder: Path, others: Path, port: int) -> None:
    assert refused(port, pair(others, "trusted-worker", authority=folder).client())


def test_a_server_of_another_authority_or_name_is_refused(folder: Path, others: Path, port: int) -> None:
    assert refused(port, pair(folder, "trusted-worker", authority=others).client())
    assert refused(port, pair(folder, "trusted-worker").client(), "elsewhere.example")


def test_the_gpu_workers_certificate_opens_nothing(folder: Path, port: int) -> None:
    assert refused(port, pair(folder, "gpu-worker").client())
