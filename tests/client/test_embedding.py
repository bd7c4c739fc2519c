"""A trusted worker that leaves embedding to its clients: it gets the rows that it would have looked up, each once."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from client.__main__ import main
from client.attestation.policy import Policy
from client.embedding import EmbeddingTable
from client.session import Request, Session, connect
from client.turn import Pacing
from tests.client.fake_worker import EOS, FakeWorker, Script
from tests.model_folders import MODELS
from wire import parameters
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError, InvalidArgumentError, PreconditionError
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name
from wire.quantize import quantize_rows

F32 = npt.NDArray[np.float32]
Serve = Callable[[Script], FakeWorker]
Opened = Callable[[FakeWorker], Session]
Output = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]
CHAT = [sys.executable, "-m", "client", "chat"]
REQUEST = Request("tiny", "secure-infer", "int8")


@pytest.fixture
def table(folder: Path) -> F32:
    """The table of `folder` as int8 sessions use it, float32[300, 8]. The folder has no other weights."""
    weights = np.random.default_rng(3).standard_normal((300, 8), np.float32)
    save_file({"model.embed_tokens.weight": weights}, folder / "model.safetensors")
    return as_int8(weights)


def as_int8(weights: F32) -> F32:
    quantized, scale = quantize_rows(weights)
    return np.multiply(quantized, scale[:, None], dtype=np.float32)


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[[FakeWorker], Session]]:
    """Opens sessions of a client that has `folder`."""
    with contextlib.ExitStack() as stack:

        def make(worker: FakeWorker) -> Session:
            trusted = stack.enter_context(connect(worker.target, Policy()))
            session = trusted.open(replace(REQUEST, model_folder=folder))
            stack.callback(session.close)
            return session

        yield make


def ask(session: Session, ids: Sequence[int], pacing: Pacing | None = None) -> list[int]:
    return [token.token_id for token in session.turn(list(ids), pacing or Pacing())]


def chat(worker: FakeWorker, folder: Path, *flags: str) -> int:
    return main(["chat", "--connect", worker.target, "--model", str(folder), *flags])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_rows_are_those_that_a_trusted_worker_looks_up(
    model_folder: Callable[[str], Path], name: str, precision: str
) -> None:
    folder = model_folder(name)
    config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
    whole = parameters.read(checkpoint, parameters.parameters(config)[Name(Kind.EMBEDDING)])
    expected = as_int8(whole) if precision == "int8" else whole
    ids = [5, 0, config.vocabulary - 1, 5]
    table = EmbeddingTable(folder, precision)
    assert table.shape == expected.shape
    assert table.rows(ids) == expected[ids].tobytes()
    for outside in (-1, config.vocabulary):
        with pytest.raises(InvalidArgumentError, match="out of range"):
            table.rows([outside])
    table.close()


@pytest.mark.parametrize("credit", [1, 2, 3, 8])
@pytest.mark.parametrize("frame", [1, 4, 4096])
def test_turns_of_every_end_send_each_row_once(
    serve: Serve, opened: Opened, table: F32, credit: int, frame: int
) -> None:
    answers = [[5, 6, EOS], [7] * 20, [8, EOS], [9] * 20, [10, EOS]]
    worker = serve(Script(answers=answers, table=table, max_frame_tokens=frame))
    session = opened(worker)
    assert ask(session, range(20, 33), Pacing(credit)) == [5, 6, EOS]
    assert ask(session, [40], Pacing(credit, max_new_tokens=4)) == [7] * 4
    assert ask(session, [41, 42, 43, 44], Pacing(credit, max_new_tokens=2)) == [8, EOS]
    assert ask(session, [45], Pacing(credit, max_new_tokens=1)) == [9]
    assert ask(session, [46, 47], Pacing(credit)) == [10, EOS]
    heads = [*range(20, 33), 5, 6, EOS, 40, 7, 7, 7, 7, 41, 42, 43, 44, 8, EOS, 45, 9, 46, 47]
    assert session.context == [*heads, 10, EOS]
    sent = b"".join(one.embeddings for one in list(worker.frames))
    assert sent.startswith(table[heads].tobytes())
    assert max(len(one.embeddings) for one in worker.frames) <= frame * 32
    assert worker.most_outstanding <= credit


@pytest.mark.parametrize("shown", [1, 3])
def test_an_interrupted_turn_leaves_the_count_right(serve: Serve, opened: Opened, table: F32, shown: int) -> None:
    worker = serve(Script(answers=[list(range(10, 60)), [5, EOS]], table=table))
    session = opened(worker)
    turn = session.turn([7, 8], Pacing())
    for token in turn:
        if token.token_id == 9 + shown:
            turn.end("interrupted")
    assert turn.finish_reason == "interrupted"
    assert ask(session, [3, 4]) == [5, EOS]
    assert session.context[-4:] == [3, 4, 5, EOS]
    assert session.context[:-4] == [7, 8, *range(10, 60)][: len(session.context) - 4]


def test_a_turn_ended_before_its_first_token(serve: Serve, opened: Opened, table: F32) -> None:
    worker = serve(Script(answers=[[], [5, EOS]], table=table, max_frame_tokens=2))
    session = opened(worker)
    turn = session.turn([7, 8, 9], Pacing())
    turn.end("interrupted")
    assert list(turn) == []
    assert ask(session, [3]) == [5, EOS]


def test_a_worker_that_embeds_itself_gets_no_rows(serve: Serve, opened: Opened, table: F32) -> None:
    worker = serve(Script(answers=[[5, EOS]]))
    session = opened(worker)
    assert ask(session, [7]) == [5, EOS]
    assert not any(frame.embeddings for frame in worker.frames)


def test_a_token_that_does_not_exist_has_no_row(serve: Serve, opened: Opened, table: F32) -> None:
    session = opened(serve(Script(answers=[[300]], table=table)))
    with pytest.raises(InvalidArgumentError, match="out of range"):
        ask(session, [7])


def test_without_a_model_the_session_is_given_back(serve: Serve, table: F32) -> None:
    worker = serve(Script(table=table))
    with connect(worker.target, Policy()) as trusted, pytest.raises(PreconditionError, match="local copy of the model"):
        trusted.open(REQUEST)
    assert worker.closed.wait(5)


def test_another_model_is_told_from_the_sizes(serve: Serve, opened: Opened, table: F32) -> None:
    for other in (Script(table=table[:, :4]), Script(table=table, vocabulary=299)):
        worker = serve(other)
        with pytest.raises(PreconditionError, match="another model"):
            opened(worker)
        assert worker.closed.wait(5)


def test_a_folder_whose_weights_differ_from_its_configuration(folder: Path) -> None:
    save_file({"model.embed_tokens.weight": np.zeros((300, 9), np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="asks for"):
        EmbeddingTable(folder, "int8").rows([1])


@pytest.mark.parametrize(
    ("file", "says"),
    [("tokenizer.json", "holds no weights"), ("model.safetensors.sealed", "holds sealed weights only")],
)
def test_the_command_line_says_what_is_missing(
    serve: Serve, folder: Path, table: F32, capsys: Output, file: str, says: str
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / file).touch()
    assert chat(serve(Script(table=table)), folder, "--prompt", "secret") == 1
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("leaves embedding to its clients", str(folder), says, "give a folder"):
        assert part in line
    assert "secret" not in line


def test_chat_over_a_connection_embeds(serve: Serve, folder: Path, table: F32, capsys: Output) -> None:
    worker = serve(Script(answers=[[5, 6, EOS]], table=table))
    assert chat(worker, folder, "--prompt", "hello", "--json") == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == [5, 6, EOS]
    assert all(frame.embeddings for frame in worker.frames)


def say(*flags: str) -> dict[str, Any]:
    """A one-shot answer of real workers, as a user gets it."""
    ids = ",".join(map(str, np.random.default_rng(7).integers(1, 299, 70)))
    words = ["--token-ids", ids, "--max-new-tokens", "24", "--json", "--logprobs", "3", *flags]
    done = subprocess.run(CHAT + words, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.parametrize("scheme", ["secure-infer", "tee-only"])
def test_answers_do_not_depend_on_who_embeds(model_folder: Callable[[str], Path], scheme: str) -> None:
    flags = ["--model", str(model_folder("qwen2")), "--scheme", scheme]
    alone, together = say(*flags), say(*flags, "--embed", "client")
    assert alone["secure_memory"]["embedding"] != "client"
    assert together["secure_memory"]["embedding"] == "client"
    for key in ("token_ids", "logprobs", "finish_reason"):
        assert together[key] == alone[key]


def test_a_conversation_does_not_depend_on_who_embeds() -> None:
    said = []
    for flags in ([], ["--embed", "client"]):
        words = ["--scheme", "tee-only", "--max-new-tokens", "12", *flags]
        lines = "Who are you?\nWhat can you do?\n"
        done = subprocess.run(
            CHAT + words, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1]
    assert len(said[0].splitlines()) >= 2
