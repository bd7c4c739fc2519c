"""One small tree of errors, and the one place that maps it to gRPC status codes.

    CleaveError
    |- InvalidArgumentError      INVALID_ARGUMENT     shape, dtype, token id, malformed message
    |- ContextError              OUT_OF_RANGE         more tokens than the session's context holds
    |- ExhaustedError            RESOURCE_EXHAUSTED   budget or queue: what was asked and what would fit
    |- PreconditionError         FAILED_PRECONDITION  model not loaded, another scheme is served
    |- DeniedError               PERMISSION_DENIED    an operation or policy that this process refuses
    |- UnauthenticatedError      UNAUTHENTICATED      no evidence, bad evidence, unknown session
    |- VerificationError         DATA_LOSS            a product or a seal failed its check; never retried silently
    |  |- ParkedError            DATA_LOSS            the same of our own disk: not the GPU worker's doing
    |  `- SealError              DATA_LOSS            a frame between client and trusted worker was tampered with
    |- UnavailableError          UNAVAILABLE          the peer is gone or draining
    |- DeadlineError             DEADLINE_EXCEEDED    the peer did not answer in time
    `- CheckpointError           FAILED_PRECONDITION  a model folder that cannot be read; local, never sent by a peer

Texts that cross the wire are written by us, name no secret, and never repeat what a library said.
"""

from typing import ClassVar

import grpc


class CleaveError(Exception):
    """Base of everything that Cleave raises on purpose. `str(error)` is fit for a peer and for a log."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL


class InvalidArgumentError(CleaveError):
    """The request is malformed or out of its type's range."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class ContextError(CleaveError):
    """The tokens do not fit the session's context."""

    code = grpc.StatusCode.OUT_OF_RANGE


class ExhaustedError(CleaveError):
    """Memory or a queue is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class PreconditionError(CleaveError):
    """The process is not in a state in which it could do that."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class CheckpointError(PreconditionError):
    """A model folder that cannot be read: says which file and what is wrong with it."""


class DeniedError(CleaveError):
    """A policy forbids it."""

    code = grpc.StatusCode.PERMISSION_DENIED


class UnauthenticatedError(CleaveError):
    """No evidence, evidence that fails the policy, or a session that is not known."""

    code = grpc.StatusCode.UNAUTHENTICATED


class VerificationError(CleaveError):
    """Something that a peer returned failed its check. One text for every cause: causes are not told to anybody."""

    code = grpc.StatusCode.DATA_LOSS

    def __init__(self) -> None:
        super().__init__("verification failed: a result or a page from outside was rejected; the session is closed")


class ParkedError(VerificationError):
    """Something that was parked on our own disk failed its check. No peer had a part in it; the text is the same."""


class SealError(VerificationError):
    """A frame of the confidential channel does not open in its place. One text for every cause."""

    TEXT: ClassVar[str] = "a sealed frame was changed, repeated, out of order or lost on the way; the session is closed"

    def __init__(self) -> None:
        CleaveError.__init__(self, self.TEXT)


class UnavailableError(CleaveError):
    """The peer is gone, or draining."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineError(CleaveError):
    """The peer did not answer within its deadline."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


_BY_CODE: dict[grpc.StatusCode, type[CleaveError]] = {
    kind.code: kind
    for kind in (
        InvalidArgumentError,
        ContextError,
        ExhaustedError,
        PreconditionError,
        DeniedError,
        UnauthenticatedError,
        UnavailableError,
        DeadlineError,
    )
}

_OF_THE_TRANSPORT = ("failed to connect", "Socket closed", "Connection reset", "Broken pipe", "GOAWAY", "recvmsg")


def from_status(code: grpc.StatusCode, details: str | None) -> CleaveError:
    """The error that a peer's status stands for. Unknown codes become UnavailableError; cancelled calls too."""
    if code is grpc.StatusCode.DATA_LOSS:
        return SealError() if details == SealError.TEXT else VerificationError()
    if not details or any(sign in details for sign in _OF_THE_TRANSPORT):
        details = "the peer is gone or cannot be reached"
    return _BY_CODE.get(code, UnavailableError)(details)
