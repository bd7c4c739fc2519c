"""One answer, driven against a scripted worker: whoever cancels it ends it, also where nothing comes."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.attestation.policy import Policy
from client.gateway import generation, requests
from client.gateway.generation import End, Generation, Model, Piece
from client.session import Request, connect
from client.tokenizer import Tokenizer
from tests.client.fake_worker import EOS, FakeWorker, Script
from tests.client.gateway.stand import asked
from tests.faults.fleet import until
from wire.errors import ContextError, UnavailableError

Serve = Callable[[Script], FakeWorker]
BASE = Request("tiny", "secure-infer", "int8")


def order(text: str = "hi", **fields: Any) -> requests.Order:
    return requests.chat({"messages": asked(text)} | fields, BASE)


def model(folder: Path) -> Model:
    return Model(BASE, 64, Tokenizer(folder), 8, 20.0)


def test_pieces_have_their_tokens_and_the_end_has_the_counts(serve: Serve, folder: Path) -> None:
    ids = Tokenizer(folder).text("a ü")  # ü is two tokens
    events: list[Any] = []
    with connect(serve(Script(answers=[[*ids, EOS]])).target, Policy()) as worker:
        Generation(worker, model(folder), order(), events.append).run()
    *pieces, end = events
    assert [(piece.text, [token.token_id for token in piece.tokens]) for piece in pieces] == [
        ("a", ids[:1]), (" ", ids[1:2]), ("ü", ids[2:])
    ]  # fmt: skip
    assert isinstance(end, End)
    assert (end.reason, end.tokens, end.prompt_tokens, end.completion_tokens) == ("eos", (), 5, 5)
    assert end.products_verified >= 0


def test_tokens_of_a_stop_string_are_not_reported(serve: Serve, folder: Path) -> None:
    ids, events = Tokenizer(folder).text("abSTOPc"), list[Any]()
    with connect(serve(Script(answers=[[*ids, EOS]])).target, Policy()) as worker:
        Generation(worker, model(folder), order(stop="STOP"), events.append).run()
    *pieces, end = events
    assert "".join(piece.text for piece in pieces) == "ab"
    assert [token.token_id for piece in pieces for token in piece.tokens] == ids[:2]
    assert (end.tokens, end.completion_tokens) == ((), 6)
    assert end.reason in ("stop", "eos")  # the worker may have ended it too


@pytest.mark.parametrize("count", [0, 1])
def test_cancelling_ends_the_answer_of_a_worker_that_is_silent(serve: Serve, folder: Path, count: int) -> None:
    """It sends so many tokens and then nothing, whatever it is told."""
    fake, events = serve(Script(answers=[Tokenizer(folder).text("a")[:count]], deaf=True)), list[Any]()
    with connect(fake.target, Policy()) as worker:
        one = Generation(worker, model(folder), order(), events.append)
        thread = threading.Thread(target=one.run)
        thread.start()
        until(lambda: len(fake.frames) and len(events) == count)
        one.cancel()
        thread.join(10)
        assert not thread.is_alive()
    assert fake.closed.wait(10)
    assert [type(event) for event in events] == [*[Piece] * count, UnavailableError]


def test_who_cancels_before_it_begins_sends_no_prompt(serve: Serve, folder: Path) -> None:
    fake = serve(Script(answers=[[EOS]]))
    with connect(fake.target, Policy()) as worker:
        one = Generation(worker, model(folder), order(), lambda _: None)
        one.cancel()
        one.run()
    assert not fake.frames
    assert fake.closed.wait(10)


def test_a_prompt_beyond_the_context_is_not_sent(serve: Serve, folder: Path) -> None:
    fake, events = serve(Script()), list[Any]()
    with connect(fake.target, Policy()) as worker:
        Generation(worker, model(folder), order("x" * 100), events.append).run()
    assert isinstance(events[0], ContextError)
    assert not fake.opened


def test_no_text_of_a_library_reaches_a_client(serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a prompt")

    monkeypatch.setattr(generation, "Answer", fail)
    events = list[Any]()
    with connect(serve(Script()).target, Policy()) as worker:
        Generation(worker, model(folder), order(), events.append).run()
    assert str(events[0]) == "internal error of the gateway: ValueError"
