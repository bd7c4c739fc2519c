"""The tree of errors and its one mapping to status codes."""

import re
from pathlib import Path

import grpc
import pytest

from wire import errors
from wire.errors import (
    CheckpointError,
    CleaveError,
    ParkedError,
    SealError,
    UnavailableError,
    VerificationError,
    from_status,
)

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, CleaveError) and kind is not CleaveError
]
SENT = [kind for kind in KINDS if kind not in (CheckpointError, ParkedError)]


@pytest.mark.parametrize("kind", SENT, ids=lambda kind: kind.__name__)
def test_every_error_survives_the_wire(kind: type[CleaveError]) -> None:
    error = kind() if issubclass(kind, VerificationError) else kind("what was wrong")
    arrived = from_status(error.code, str(error))
    assert type(arrived) is kind
    assert str(arrived) == str(error)


def test_codes_are_distinct_and_never_unknown() -> None:
    codes = [kind.code for kind in SENT if kind is not SealError]  # which has that of its parent, and its own text
    assert len(set(codes)) == len(codes)
    assert grpc.StatusCode.UNKNOWN not in {kind.code for kind in KINDS}
    assert CleaveError.code is grpc.StatusCode.INTERNAL


def test_the_tree_in_the_documentation_is_the_tree() -> None:
    text = Path(errors.__file__).read_text()
    listed = re.findall(r"[|`]- (\w+)\s+([A-Z_]+)", text)
    assert dict(listed) == {kind.__name__: kind.code.name for kind in KINDS}


@pytest.mark.parametrize("code", list(grpc.StatusCode), ids=lambda code: code.name)
@pytest.mark.parametrize("details", [None, "", "text"])
def test_every_status_becomes_an_error_of_our_tree(code: grpc.StatusCode, details: str | None) -> None:
    error = from_status(code, details)
    assert isinstance(error, CleaveError)
    assert str(error)
    if code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL):
        assert type(error) is UnavailableError


def test_verification_failures_have_one_text_whatever_the_peer_says() -> None:
    assert str(from_status(grpc.StatusCode.DATA_LOSS, "row 5 was wrong")) == str(VerificationError())
    assert str(VerificationError()) == str(VerificationError())


def test_what_was_parked_fails_like_any_verification_for_a_peer() -> None:
    assert type(from_status(ParkedError.code, str(ParkedError()))) is VerificationError
    assert str(ParkedError()) == str(VerificationError())


def test_a_checkpoint_error_is_local() -> None:
    arrived = from_status(CheckpointError.code, "text")
    assert type(arrived) is errors.PreconditionError


@pytest.mark.parametrize(
    "details", [None, "", "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1", "Socket closed"]
)
def test_what_the_transport_says_is_said_in_our_words(details: str | None) -> None:
    assert str(from_status(grpc.StatusCode.UNAVAILABLE, details)) == "the peer is gone or cannot be reached"
