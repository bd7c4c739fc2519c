"""Client, network and trusted worker as they are, with somebody in the middle who reads and changes what passes."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import grpc
import pytest

from client.attestation.policy import Policy
from client.session import connect
from client.tokenizer import Tokenizer
from client.turn import Pacing
from tests.faults.fleet import DEMO, until
from tests.pressure.processes import Trusted, trusted_worker
from tests.sealed import Opened, RawClient, status
from tests.simulators.in_the_middle import Hook, InTheMiddle, in_the_middle
from wire.errors import SealError, UnauthenticatedError, UnavailableError
from wire.sealing import SIZES
from wire.v1 import trusted_worker_pb2 as pb

PROMPT = Tokenizer(DEMO).chat([{"role": "user", "content": "What is an onion router?"}])  # has a long answer
COUNT = 12


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trusted]:
    with trusted_worker(tmp_path_factory.mktemp("trusted"), "tee-only", "--session-seconds", "1") as worker:
        yield worker


@pytest.fixture
def middle(trusted: Trusted) -> Iterator[InTheMiddle]:
    with in_the_middle(trusted.address) as one:
        yield one


def say(middle: InTheMiddle, trusted: Trusted, *prompts: list[int]) -> list[int]:
    """A session of several turns through the middle: the tokens of all answers."""
    with connect(middle.target, Policy()) as worker:
        session = worker.open(trusted.request)
        try:
            pacing = Pacing(4, COUNT, 20.0)
            return [token.token_id for prompt in prompts for token in session.turn(prompt, pacing)]
        finally:
            session.close()


def test_who_listens_sees_frames_of_few_sizes_and_no_token(trusted: Trusted, middle: InTheMiddle) -> None:
    said = say(middle, trusted, PROMPT, PROMPT, PROMPT * 3)
    assert say(middle, trusted, PROMPT) == said[:COUNT]
    sizes = {len(frame) for frame in middle.passed}
    assert sizes <= set(SIZES)
    assert len(sizes) <= 4
    plain = pb.DecodeRequest(token_ids=PROMPT).SerializeToString()
    tokens = [pb.Token(token_id=token).SerializeToString() for token in said]
    whole = b"".join(middle.passed)
    assert all(plain[start : start + 8] not in whole for start in range(4, len(plain) - 8))
    assert tokens
    assert len(set(middle.passed)) == len(middle.passed)


def test_one_and_the_same_conversation_looks_like_another_of_its_length(trusted: Trusted, middle: InTheMiddle) -> None:
    shapes = []
    for prompt in (PROMPT, PROMPT[::-1], [3] * len(PROMPT)):
        middle.passed.clear()
        with connect(middle.target, Policy()) as worker:
            session = worker.open(trusted.request)
            for _ in zip(range(4), session.turn(prompt, Pacing(1, 4, 20.0)), strict=False):
                pass
            session.close()
        shapes.append(sorted({len(frame) for frame in middle.passed}))
    assert shapes[0] == shapes[1] == shapes[2]


def changed(frame: pb.Sealed) -> pb.Sealed:
    other = pb.Sealed.FromString(frame.SerializeToString())
    other.body = frame.body[:40] + bytes([frame.body[40] ^ 16]) + frame.body[41:]
    return other


def late(at: int) -> Hook:
    """Frames `at` and the next one in the other order."""
    kept: list[pb.Sealed] = []

    def hook(method: str, number: int, frame: pb.Sealed) -> list[pb.Sealed]:
        if method != "Decode" or number not in (at, at + 1):
            return [frame]
        if number == at:
            kept.append(frame)
            return []
        return [frame, *kept]

    return hook


def at(place: int, what: Callable[[pb.Sealed], list[pb.Sealed]]) -> Hook:
    return lambda method, number, frame: what(frame) if (method, number) == ("Decode", place) else [frame]


MEDDLING: dict[str, Callable[[int], Hook]] = {
    "changed": lambda place: at(place, lambda frame: [changed(frame)]),
    "dropped": lambda place: at(place, lambda frame: []),
    "repeated": lambda place: at(place, lambda frame: [frame, frame]),
    "out of order": late,
    "shortened": lambda place: at(place, lambda frame: [pb.Sealed(nonce=frame.nonce, body=frame.body[:-16])]),
    "emptied": lambda place: at(place, lambda frame: [pb.Sealed()]),
    "replaced by junk": lambda place: at(place, lambda frame: [pb.Sealed(body=bytes(len(frame.body)))]),
}


@pytest.mark.parametrize("how", MEDDLING)
def test_meddling_with_a_stream_to_the_worker_ends_the_session(trusted: Trusted, middle: InTheMiddle, how: str) -> None:
    middle.up = MEDDLING[how](1)
    with pytest.raises(SealError) as caught:
        say(middle, trusted, PROMPT)
    assert str(caught.value) == SealError.TEXT
    until(lambda: not trusted.stats().sessions, 10)
    middle.up = lambda method, number, frame: [frame]
    assert len(say(middle, trusted, PROMPT)) == COUNT


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("how", MEDDLING)
def test_meddling_with_a_stream_to_the_client_ends_the_session(
    trusted: Trusted, middle: InTheMiddle, how: str, place: int
) -> None:
    middle.down = MEDDLING[how](place)
    with pytest.raises(SealError):
        say(middle, trusted, PROMPT)
    until(lambda: not trusted.stats().sessions, 10)


@pytest.mark.parametrize("how", ["changed", "shortened", "emptied", "replaced by junk"])
@pytest.mark.parametrize("method", ["Open", "Decode"])
def test_a_first_frame_that_was_changed_opens_nothing(
    trusted: Trusted, middle: InTheMiddle, method: str, how: str
) -> None:
    make = {
        "changed": changed,
        "shortened": lambda frame: pb.Sealed(enc=frame.enc, session=frame.session, body=frame.body[:-16]),
        "emptied": lambda frame: pb.Sealed(),
        "replaced by junk": lambda frame: pb.Sealed(enc=frame.enc, session=frame.session, body=bytes(400)),
    }[how]
    middle.up = lambda name, number, frame: [make(frame) if name == method and number == 0 else frame]
    with pytest.raises(UnauthenticatedError):
        say(middle, trusted, PROMPT)
    until(lambda: not trusted.stats().sessions, 10)


def test_an_answer_to_open_that_was_changed_is_refused(trusted: Trusted, middle: InTheMiddle) -> None:
    middle.down = lambda name, number, frame: [changed(frame) if name == "Open" else frame]
    with pytest.raises(SealError):
        say(middle, trusted, PROMPT)
    assert [name for name, _ in middle.sent] == ["Open"]
    until(lambda: not trusted.stats().sessions, 10)  # whose name nobody knows


def test_an_answer_without_its_end_is_an_error(trusted: Trusted, middle: InTheMiddle) -> None:
    """The stream is closed as if all were well, right before FINAL."""

    def cut(name: str, frames: Iterator[pb.Sealed]) -> Iterator[pb.Sealed]:
        return islice(frames, COUNT) if name == "Decode" else frames

    middle._answers = cut  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match="cut before the end"):
        say(middle, trusted, PROMPT)


def reopened(trusted: Trusted, frame: pb.Sealed) -> Any:
    """The error of an Open."""
    with pytest.raises(grpc.RpcError) as caught:
        trusted.stub.Open(frame, timeout=20)
    return caught.value


def test_replayed_calls_are_refused_and_harm_nobody(trusted: Trusted, middle: InTheMiddle) -> None:
    """Every first frame that ever passed, again, while a session is open."""
    with connect(middle.target, Policy()) as worker:
        session = worker.open(trusted.request)
        said = [token.token_id for token in session.turn(PROMPT, Pacing(4, COUNT, 20.0))]
        tokens = trusted.stats().tokens
        for name, frame in [one for one in middle.sent if one[1].enc]:
            error = (
                status(trusted.stub.Decode(iter([frame]), timeout=20)) if name == "Decode" else reopened(trusted, frame)
            )
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "repeated" in error.details()
        assert trusted.stats().tokens == tokens
        assert trusted.stats().sessions == 1
        more = [token.token_id for token in session.turn(PROMPT, Pacing(4, COUNT, 20.0))]
        session.close()
    assert said + more == say(middle, trusted, PROMPT, PROMPT)


def test_frames_of_another_stream_do_not_open(trusted: Trusted, middle: InTheMiddle) -> None:
    """The second frame of an earlier conversation, in the place of this one's."""
    say(middle, trusted, PROMPT)
    old = [frame for name, frame in middle.sent if name == "Decode"][1]
    middle.up = at(1, lambda frame: [old])
    with pytest.raises(SealError):
        say(middle, trusted, PROMPT)


def test_a_session_cannot_be_taken_over_by_its_name(trusted: Trusted, middle: InTheMiddle) -> None:
    """Names travel in the clear; the secret does not."""
    with connect(middle.target, Policy()) as worker:
        session = worker.open(trusted.request)
        answer = iter(session.turn(PROMPT, Pacing(1, COUNT, 20.0)))
        next(answer)
        name = next(frame.session for kind, frame in middle.sent if kind == "Decode")
        thief = RawClient(trusted.stub)  # he has the worker's key, as everybody has
        for secret in (bytes(32), b"a guess".ljust(32)):
            call = thief.call(Opened(name, secret, pb.OpenResponse()))
            error = status(trusted.stub.Decode(iter([call.wrap(pb.DecodeRequest(credit=1))]), timeout=20))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert len(list(answer)) == COUNT - 1
        session.close()
