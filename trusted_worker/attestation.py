"""Evidence for clients. An ordinary process has none, and says so: provider "none", nothing to verify."""

from wire.errors import InvalidArgumentError
from wire.v1 import trusted_worker_pb2 as pb

NONCE_BYTES = 32


def attest(nonce: bytes) -> pb.AttestResponse:
    """Evidence over a client's fresh nonce. Raises InvalidArgumentError for a nonce of another size."""
    if len(nonce) != NONCE_BYTES:
        raise InvalidArgumentError(f"the nonce must be {NONCE_BYTES} bytes")
    return pb.AttestResponse(provider="none")
