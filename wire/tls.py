"""Mutual TLS between the workers: who listens and who connects both show a certificate of one authority.

It keeps others off the line and out of the GPU worker. What the GPU worker may know does not depend on it.
"""

import argparse
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from wire.errors import DeniedError, PreconditionError


@dataclass(frozen=True)
class Tls:
    """PEM files: this worker's certificate and key, and the authority that signed the other one's."""

    certificate: Path
    key: Path
    authority: Path

    def server(self) -> grpc.ServerCredentials:
        """For whoever listens: a client without a certificate of the authority gets no further. Raises."""
        certificate, key, authority = self._read()
        return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)

    def client(self) -> grpc.ChannelCredentials:
        """For whoever connects: the server's name must be in its certificate. Raises PreconditionError."""
        certificate, key, authority = self._read()
        return grpc.ssl_channel_credentials(authority, key, certificate)

    def _read(self) -> tuple[bytes, bytes, bytes]:
        """The three files. Raises PreconditionError for what gRPC would take without a word, and then not work with."""
        content = _read(self.certificate), _read(self.key), _read(self.authority)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(self.authority)
            context.load_cert_chain(self.certificate, self.key, password="")  # else it would ask at the terminal
        except OSError:
            text = f"{self.certificate}, {self.key} and {self.authority} are no certificate, its open key, an authority"
            raise PreconditionError(text) from None
        return content


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The three files. All of them, or none."""
    group = parser.add_argument_group("mutual TLS between the workers")
    for name, text in (("certificate", "of this worker"), ("key", "of this worker"), ("authority", "of both workers")):
        group.add_argument(f"--tls-{name}", type=Path, metavar="PEM", help=text)


def from_flags(certificate: Path | None, key: Path | None, authority: Path | None) -> Tls | None:
    """What the flags say. Raises DeniedError for one or two of three: half of TLS is none."""
    if certificate and key and authority:
        return Tls(certificate, key, authority)
    if certificate or key or authority:
        raise DeniedError("mutual TLS needs all of --tls-certificate, --tls-key and --tls-authority")
    return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PreconditionError(f"{path} cannot be read: {error.strerror}") from None
