"""A client of a soak, against a worker that answers from a script."""

import random
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest

from client.attestation.policy import Policy
from client.session import Request, connect
from evaluation import clients
from evaluation.clients import Client, Turn, answered, conversations
from tests.client.fake_worker import EOS, FakeWorker, Script, scripted_workers
from wire.errors import VerificationError

REQUEST = Request("demo", "secure-infer", "int8")
TWO_TURNS = (Turn((1, 2), 3, (7, 8, 9)), Turn((4,), 2, (5, EOS)))


@pytest.fixture
def serve() -> Iterator[Callable[[Script], FakeWorker]]:
    yield from scripted_workers()


def one_conversation(worker: FakeWorker, monkeypatch: pytest.MonkeyPatch, leaving: float = 0.0) -> Client:
    """A client that has had TWO_TURNS once."""
    stopping = threading.Event()
    monkeypatch.setattr(clients, "LEAVING", leaving)
    client = Client(3, worker.target, REQUEST, [TWO_TURNS], stopping, seed=1)
    monkeypatch.setattr(stopping, "wait", lambda _: stopping.set())
    client.run()
    return client


def test_right_answers_are_counted(serve: Callable[[Script], FakeWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    worker = serve(Script([[7, 8, 9, 1, 1], [5, EOS]]))
    client = one_conversation(worker, monkeypatch)
    assert (client.completed, client.left, client.wrong, client.failures) == (2, 0, [], [])
    assert worker.closed.is_set()


def test_a_wrong_token_is_found(serve: Callable[[Script], FakeWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    client = one_conversation(serve(Script([[7, 8, 6], [5, EOS]])), monkeypatch)
    assert client.wrong == ["client 3 got [7, 8, 6], alone it was [7, 8, 9]"]


def test_an_answer_that_ends_too_early_is_wrong(
    serve: Callable[[Script], FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = one_conversation(serve(Script([[7, EOS], [5, EOS]])), monkeypatch)
    assert len(client.wrong) == 1


@pytest.mark.parametrize(("answer", "wrong"), [([7, 8, 9], 0), ([7, 6, 9], 1)])
def test_a_failure_is_kept_and_what_came_before_it_is_compared(
    serve: Callable[[Script], FakeWorker], monkeypatch: pytest.MonkeyPatch, answer: list[int], wrong: int
) -> None:
    client = one_conversation(serve(Script([answer], fail_after=3)), monkeypatch)
    assert (client.completed, len(client.wrong)) == (0, wrong)
    assert isinstance(client.failures[0].error, VerificationError)
    assert not client.failures[0].clear
    assert client.failures[0].start <= client.failures[0].end


def test_who_leaves_early_compares_too(serve: Callable[[Script], FakeWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    client = one_conversation(serve(Script([[7, 8, 9], [5, EOS]])), monkeypatch, leaving=1.0)
    assert (client.completed, client.left, client.wrong) == (0, 1, [])
    client = one_conversation(serve(Script([[6, 6, 6], [6, EOS]])), monkeypatch, leaving=1.0)
    assert client.wrong


def test_a_refusal_to_open_is_a_failure(serve: Callable[[Script], FakeWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    client = one_conversation(serve(Script(refuse_open=(grpc.StatusCode.UNAVAILABLE, "draining"))), monkeypatch)
    assert [str(failure) for failure in client.failures] == ["UnavailableError: draining"]


def test_references_are_the_answers_that_came(serve: Callable[[Script], FakeWorker]) -> None:
    with connect(serve(Script([[7, 8, 9, 1], [5, EOS]])).target, Policy()) as worker:
        asked = tuple(Turn(turn.prompt, turn.most) for turn in TWO_TURNS)
        assert answered(worker, REQUEST, asked) == TWO_TURNS


def test_conversations_differ_in_length_and_come_from_the_seed() -> None:
    made = conversations(50, 30, random.Random(1))
    assert made == conversations(50, 30, random.Random(1))
    assert {len(conversation) for conversation in made} == {1, 2}
    assert len({len(conversation[0].prompt) for conversation in made}) > 3
    assert all(0 <= token < 50 for conversation in made for turn in conversation for token in turn.prompt)
