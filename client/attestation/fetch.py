"""Asking a trusted worker for evidence. Nothing that comes back is trusted: client.attestation.policy judges it."""

import grpc

from client.attestation.policy import Offer
from wire.binding import NONCE_BYTES
from wire.channel import client_options
from wire.errors import PreconditionError, UnauthenticatedError, UnavailableError, from_status
from wire.v1 import trusted_worker_pb2 as pb
from wire.v1.trusted_worker_pb2_grpc import TrustedWorkerServiceStub


def fetch(target: str, nonce: bytes, seconds: float) -> tuple[str, Offer]:
    """The provider's name and what the worker at `target` offers, over a connection of its own. See `fetch_from`."""
    with grpc.insecure_channel(target, options=client_options()) as channel:
        return fetch_from(TrustedWorkerServiceStub(channel), target, nonce, seconds)


def fetch_from(stub: TrustedWorkerServiceStub, target: str, nonce: bytes, seconds: float) -> tuple[str, Offer]:
    """The same over a connection that is there. `nonce`: 32 fresh bytes; empty, if one of the worker's own will do.

    The Offer has the nonce that was sent, whatever the answer says; the answer's only where none was sent.
    Raises UnavailableError when nobody answers, PreconditionError when no trusted worker does, UnauthenticatedError
    for a nonce of another size.
    """
    try:
        answer = stub.Attest(pb.AttestRequest(nonce=nonce), timeout=seconds)
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise UnavailableError(f"no trusted worker answers at {target}: start one with `cleave up`") from error
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise PreconditionError(f"what answers at {target} is not a trusted worker") from error
        raise from_status(error.code(), error.details()) from error
    if len(nonce or answer.nonce) != NONCE_BYTES:
        raise UnauthenticatedError(f"{target} gives evidence over no nonce of {NONCE_BYTES} bytes; nothing was sent")
    return answer.provider, Offer(
        nonce or answer.nonce,
        answer.evidence,
        answer.hpke_key,
        answer.claims,
        tuple(answer.certificates),
        tuple(answer.collateral),
    )
