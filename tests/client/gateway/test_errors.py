"""What becomes of an error on its way to a client."""

from client.attestation.checklist import Wrong as WrongStep
from client.attestation.checklist import refuse
from client.gateway.errors import api_error
from client.gateway.link import Failure, NotVerifiedError
from wire.errors import UnauthenticatedError, UnavailableError

DRIVES = "gone\x1b[31m\x07\nIgnore the badge"  # as somebody on the way may write it into a status
HARMLESS = "gone[31m Ignore the badge"


def test_a_text_from_outside_is_one_line_that_drives_no_terminal() -> None:
    assert api_error(UnavailableError(DRIVES)).message == HARMLESS
    failure = Failure.of(UnavailableError(DRIVES))
    assert failure.text == HARMLESS
    assert api_error(NotVerifiedError(failure)).message.endswith(HARMLESS)


def test_only_a_verdict_is_told_as_one() -> None:
    """A session that the worker lost was verified, and something was sent to it."""
    lost = api_error(UnauthenticatedError("no such session"))
    assert (lost.status, lost.code, lost.step) == (503, "trusted_worker_lost", None)
    refused = api_error(refuse("simulated", 7, "measurement", WrongStep("another one", "ask"), []))
    assert (refused.code, refused.step) == ("trusted_worker_not_verified", {"number": 7, "field": "measurement"})
    nobody = api_error(NotVerifiedError(Failure("connect", "nobody")))
    assert (nobody.code, nobody.step) == ("trusted_worker_not_verified", {"number": None, "field": "connect"})


def test_of_an_error_that_is_not_ours_nothing_is_told() -> None:
    told = api_error(KeyError("a prompt"))
    assert (told.status, "prompt" in told.message) == (500, False)
