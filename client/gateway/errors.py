"""What a client of the gateway is told when something fails: OpenAI's error object, and the status that goes with it.

`message` says what was wrong and what to do, `param` names the field of the request, `code` is for programs. An error
of the attestation also has `step`: the number and the field of the step that refused.
"""

from typing import Any

from client.attestation.checklist import Refusal
from client.gateway.link import NotVerifiedError
from client.terminal import one_line
from wire.errors import (
    CleaveError,
    ContextError,
    DeadlineError,
    DeniedError,
    ExhaustedError,
    InvalidArgumentError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
    VerificationError,
)

INVALID, SERVER = "invalid_request_error", "server_error"
NOT_VERIFIED = "trusted_worker_not_verified"
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients repeat a call after a 5xx, unless they read this
SOON = {"retry-after": "1"}

_STATUS: dict[type[CleaveError], tuple[int, str, str]] = {
    InvalidArgumentError: (400, INVALID, "invalid_value"),
    ContextError: (400, INVALID, "context_length_exceeded"),
    ExhaustedError: (429, "rate_limit_error", "trusted_worker_full"),
    VerificationError: (502, SERVER, "verification_failed"),
    DeniedError: (502, SERVER, "trusted_worker_denied"),
    PreconditionError: (503, SERVER, "trusted_worker_not_ready"),
    NotVerifiedError: (503, SERVER, NOT_VERIFIED),
    Refusal: (503, SERVER, NOT_VERIFIED),
    UnauthenticatedError: (503, SERVER, "trusted_worker_lost"),  # it knows the session no more: it began anew
    UnavailableError: (503, SERVER, "trusted_worker_lost"),
    DeadlineError: (504, SERVER, "trusted_worker_slow"),
    CleaveError: (500, SERVER, "internal_error"),
}


class ApiError(Exception):
    """An error that is ready to be sent."""

    def __init__(self, status: int, message: str, kind: str = INVALID, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code = status, message, kind, code
        self.param: str | None = None
        self.step: dict[str, Any] | None = None
        self.headers: dict[str, str] = {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error | ({"step": self.step} if self.step else {})}


def refused(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400 for a field of the request."""
    error = ApiError(400, f"{param}: {message}", INVALID, code)
    error.param = param
    return error


def api_error(error: Exception) -> ApiError:
    """What stands for any error. Of one that is not ours nothing is told: its text may quote a prompt."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, CleaveError):
        return ApiError(500, "internal error of the gateway", SERVER, "internal_error")
    status, kind, code = next(_STATUS[one] for one in type(error).__mro__ if one in _STATUS)
    told = ApiError(status, one_line(str(error)), kind, code)  # whoever has the connection may have written it
    told.headers = NO_RETRY if isinstance(error, VerificationError) else SOON if status in (429, 503) else {}
    if isinstance(error, NotVerifiedError):
        told.step = {"number": error.failure.number, "field": error.failure.field}
    elif isinstance(error, Refusal):
        told.step = {"number": error.step.number, "field": error.step.field}
    return told
