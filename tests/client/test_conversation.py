from collections.abc import Callable
from pathlib import Path

import pytest

from client.attestation.policy import Policy
from client.conversation import Conversation
from client.session import Request, connect
from client.tokenizer import Tokenizer
from client.turn import Pacing
from tests.client.fake_worker import EOS, FakeWorker, Script
from wire.errors import VerificationError

Serve = Callable[[Script], FakeWorker]
REQUEST = Request("tiny", "secure-infer", "int8")


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text's tokens without the template around it (user + text + end + assistant)."""
    return tokenizer.chat([{"role": "user", "content": text}])[1:-2]


def talk(worker: FakeWorker, tokenizer: Tokenizer, prompts: list[str], stops: list[str]) -> list[str]:
    with connect(worker.target, Policy()) as trusted:
        conversation = Conversation(trusted, REQUEST, tokenizer, Pacing(), stops)
        answers = ["".join(conversation.ask(prompt)) for prompt in prompts]
        conversation.reset()
    return answers


def sent(worker: FakeWorker) -> list[int]:
    """How many token ids each prompt had."""
    return [len(frame.token_ids) for frame in worker.frames if frame.token_ids]


def test_only_what_is_new_is_sent(serve: Serve, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    answers = [[*ids(tokenizer, text), EOS] for text in ("hello", "grüß dich")]
    worker = serve(Script(answers=answers))
    assert talk(worker, tokenizer, ["hi", "again"], []) == ["hello", "grüß dich"]
    assert len(worker.opened) == 1
    assert sent(worker) == [len("hi") + 3, len("again") + 3]


def test_an_answer_without_its_end_is_completed(serve: Serve, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    worker = serve(Script(answers=[ids(tokenizer, "x" * 300), [EOS]]))
    assert talk(worker, tokenizer, ["hi", "again"], [])[0] == "x" * 256
    assert len(worker.opened) == 1
    assert sent(worker)[1] == len("again") + 4  # the end token that the answer lacked comes first


def test_a_stop_string_opens_a_fresh_session(serve: Serve, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    worker = serve(Script(answers=[ids(tokenizer, "good. bad. worse."), [*ids(tokenizer, "ok"), EOS]]))
    assert talk(worker, tokenizer, ["hi", "again"], [" bad"]) == ["good.", "ok"]
    assert len(worker.opened) == 2
    whole = [("user", "hi"), ("assistant", "good."), ("user", "again")]
    assert sent(worker)[1] == len(tokenizer.chat([{"role": role, "content": text} for role, text in whole]))


def test_an_answer_that_tokenises_differently_opens_a_fresh_session(serve: Serve, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    half_character = ids(tokenizer, "é")[0]
    worker = serve(Script(answers=[[half_character, EOS], [EOS]]))
    assert talk(worker, tokenizer, ["hi", "again"], []) == ["", ""]
    assert len(worker.opened) == 2


def test_a_failed_turn_is_not_kept(serve: Serve, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    worker = serve(Script(answers=[[5, 6, 7], [EOS]], fail_after=2))
    with connect(worker.target, Policy()) as trusted:
        conversation = Conversation(trusted, REQUEST, tokenizer, Pacing(), [])
        with pytest.raises(VerificationError):
            list(conversation.ask("lost"))
        list(conversation.ask("kept"))
        conversation.reset()
    assert sent(worker) == [len("lost") + 3, len("kept") + 3]
    assert len(worker.opened) == 2


def test_an_abandoned_answer_closes_its_session(serve: Serve, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    worker = serve(Script(answers=[ids(tokenizer, "abcdef")]))
    with connect(worker.target, Policy()) as trusted:
        pieces = Conversation(trusted, REQUEST, tokenizer, Pacing(), []).ask("hi")
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        assert worker.closed.wait(5)


def test_reset_starts_over(serve: Serve, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    worker = serve(Script(answers=[[EOS], [EOS]]))
    with connect(worker.target, Policy()) as trusted:
        conversation = Conversation(trusted, REQUEST, tokenizer, Pacing(), [])
        list(conversation.ask("hi"))
        conversation.reset()
        list(conversation.ask("hi"))
        conversation.reset()
    assert sent(worker) == [5, 5]
