"""The compute thread: who shares a step, whose error ends what, and that nothing kills it."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from tests.trusted_worker.fakes import VOCABULARY, Client, logits_for
from trusted_worker.engine import MAX_SESSIONS, Engine
from trusted_worker.model import Accept, Batch
from wire.errors import (
    CleaveError,
    ExhaustedError,
    InvalidArgumentError,
    ParkedError,
    PreconditionError,
    UnavailableError,
    VerificationError,
)
from wire.v1 import trusted_worker_pb2 as pb

PRIVATE = "what the user said"


class Model:
    """Counts upwards: the answer to token t is t + 1. Remembers batches, and raises what it is told to."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.raises: dict[int, Exception] = {}  # by a token of the batch
        self.infinite: set[int] = set()  # tokens whose logits are not finite
        self.distrusted = 0
        self.distrust_raises: Exception | None = None
        self.tiles = 0
        self.idle_raises: Exception | None = None

    def forward(self, batch: Batch, accept: Accept) -> None:
        """See engine.Runner."""
        self.batches.append(batch)
        for token in batch.ids:
            if int(token) in self.raises:
                raise self.raises[int(token)]
        for run in batch.runs:
            assert run.position == run.cache.length
            run.cache.commit(run.stop - run.start)
        answers = [logits_for((int(token) + 1) % VOCABULARY) for token in batch.ids[batch.logit_rows]]
        for row, token in enumerate(batch.ids[batch.logit_rows]):
            if int(token) in self.infinite:
                answers[row][0] = np.nan
        for index, answer in enumerate(answers):
            accept(index, answer)

    def idle(self) -> bool:
        """See engine.Runner."""
        if self.idle_raises is not None:
            error, self.idle_raises = self.idle_raises, None
            raise error
        self.tiles -= 1
        return self.tiles >= 0

    def distrust(self) -> None:
        """See engine.Runner."""
        self.distrusted += 1
        if self.distrust_raises is not None:
            raise self.distrust_raises


class Rig:
    """An engine over the counting model, with everything done in its thread."""

    def __init__(self, max_rows: int = 8) -> None:
        self.model = Model()
        self.engine = Engine(lambda: self.model, max_rows)
        self.engine.start()
        self.engine.loaded.result(10)

    def do(self, work: Callable[[], object]) -> None:
        """In the compute thread, between two steps."""
        self.engine.submit(work).result(10)

    def clients(self, count: int, capacity: int = 48) -> list[Client]:
        """Sessions that take part."""
        made = [Client(capacity) for _ in range(count)]
        for client in made:
            self.do(partial(self.engine.add, client.session))
        return made

    def feed(self, *frames: tuple[Client, list[int], int]) -> None:
        """Frames that arrive at once: all of them are there before the next step."""

        def arrive() -> None:
            for client, ids, credit in frames:
                client.session.feed(ids, credit, end_turn=False)

        self.do(arrive)

    def works(self) -> bool:
        """Whether a new session is served."""
        [client] = self.clients(1)
        self.feed((client, [30], 1))
        return client.token() == 31


@pytest.fixture
def rig() -> Iterator[Rig]:
    one = Rig()
    yield one
    one.engine.stop()
    one.engine.join(10)
    assert not one.engine.is_alive()


def _sizes(batch: Batch) -> list[int]:
    return [run.stop - run.start for run in batch.runs]


def test_one_session_decodes_token_by_token(rig: Rig) -> None:
    [client] = rig.clients(1)
    rig.feed((client, [1, 2, 3], 4))
    assert [client.token() for _ in range(4)] == [4, 5, 6, 7]
    assert [list(batch.ids) for batch in rig.model.batches] == [[1, 2, 3], [4], [5], [6]]
    assert [list(batch.positions) for batch in rig.model.batches] == [[0, 1, 2], [3], [4], [5]]
    assert rig.engine.steps_rows == 6


def test_rows_of_several_sessions_share_a_step_and_everyone_gets_their_own_answer(rig: Rig) -> None:
    clients = rig.clients(3)
    rig.feed(*((client, [10 * number], 3) for number, client in enumerate(clients)))
    for number, client in enumerate(clients):
        assert [client.token() for _ in range(3)] == [10 * number + 1, 10 * number + 2, 10 * number + 3]
    assert [len(batch.ids) for batch in rig.model.batches] == [3, 3, 3]
    for batch in rig.model.batches:
        assert [(run.start, run.stop) for run in batch.runs] == [(0, 1), (1, 2), (2, 3)]
        assert list(batch.logit_rows) == [0, 1, 2]


def test_decode_rows_come_before_prefill_rows(rig: Rig) -> None:
    long, one, two = rig.clients(3)
    rig.feed((long, [1, 2, 3, 4], 1), (one, [20], 1), (two, [30], 1))
    assert [long.token(), one.token(), two.token()] == [5, 21, 31]
    [batch] = rig.model.batches
    assert _sizes(batch) == [1, 1, 4]
    assert sorted(batch.ids[:2]) == [20, 30]
    assert list(batch.ids[2:]) == [1, 2, 3, 4]
    assert list(batch.logit_rows) == [0, 1, 5]


def test_a_long_prompt_is_cut_into_steps_and_others_decode_meanwhile(rig: Rig) -> None:
    long, short = rig.clients(2)
    prompt = list(range(20))
    rig.feed((long, prompt, 1), (short, [30], 3))
    assert [short.token() for _ in range(3)] == [31, 32, 33]
    assert long.token() == 20
    assert [_sizes(batch) for batch in rig.model.batches] == [[1, 7], [1, 7], [1, 6]]
    assert [len(batch.logit_rows) for batch in rig.model.batches] == [1, 1, 2]
    assert all(len(batch.ids) <= 8 for batch in rig.model.batches)


def test_a_prompt_without_credit_is_computed_but_for_its_last_token(rig: Rig) -> None:
    [client] = rig.clients(1)
    rig.feed((client, [1, 2, 3], 0))
    rig.do(lambda: None)
    rig.do(lambda: None)
    assert [list(batch.ids) for batch in rig.model.batches] == [[1, 2]]
    assert len(rig.model.batches[0].logit_rows) == 0
    rig.feed((client, [], 1))
    assert client.token() == 4


def test_more_sessions_than_a_step_holds_all_go_on() -> None:
    rig = Rig(max_rows=4)
    clients = rig.clients(11)
    rig.feed(*((client, [number], 3) for number, client in enumerate(clients)))
    for number, client in enumerate(clients):
        assert [client.token() for _ in range(3)] == [number + 1, number + 2, number + 3]
    assert all(len(batch.ids) <= 4 for batch in rig.model.batches)
    assert len(rig.model.batches) <= 15
    rig.engine.stop()


def test_logits_are_asked_for_at_most_as_often_as_the_scratch_holds() -> None:
    rig = Rig(max_rows=64)
    clients = rig.clients(30)
    rig.feed(*((client, [number], 1) for number, client in enumerate(clients)))
    assert [client.token() for client in clients] == [number + 1 for number in range(30)]
    assert all(len(batch.logit_rows) <= 16 for batch in rig.model.batches)
    rig.engine.stop()


def test_an_error_ends_the_sessions_of_its_step_and_no_others() -> None:
    rig = Rig(max_rows=1)
    good, bad = rig.clients(2)
    rig.model.raises[20] = UnavailableError("the GPU worker is gone")
    rig.feed((good, [1], 3), (bad, [20], 3))
    assert [good.token() for _ in range(3)] == [2, 3, 4]
    assert isinstance(bad.next(), UnavailableError)
    rig.do(lambda: None)
    assert (good.session.dead, bad.session.dead) == (False, True)
    assert (good.cache.freed, bad.cache.freed) == (0, 1)
    assert rig.engine.sessions == 1
    assert rig.model.distrusted == 0
    rig.engine.stop()


def test_a_sequence_that_cannot_wake_ends_its_session_and_no_other(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = rig.clients(2)

    def refuse(tokens: int) -> int:
        raise UnavailableError("its cache is lost")

    monkeypatch.setattr(bad.cache, "wake", refuse)
    rig.feed((bad, [20, 21], 2), (good, [1], 2))
    assert str(bad.next()) == "its cache is lost"
    assert [good.token(), good.token()] == [2, 3]
    assert [list(batch.ids) for batch in rig.model.batches] == [[1], [2]]
    assert good.cache.wakes == 2
    assert bad.cache.freed == 1


def test_a_page_that_was_rejected_ends_its_own_session_and_the_others_try_again(rig: Rig) -> None:
    """Not the GPU worker's doing: nothing that it may know is renewed."""
    good, bad = rig.clients(2)
    rig.feed((bad, [19, 20], 1), (good, [1, 2, 3], 2))
    assert [bad.token(), good.token(), good.token()] == [21, 4, 5]
    bad.cache.failed = True
    rig.model.raises[21] = ParkedError()
    rig.feed((bad, [], 1), (good, [6, 7], 2))
    assert isinstance(bad.next(), VerificationError)
    assert [good.token(), good.token()] == [8, 9]
    assert [list(batch.ids) for batch in rig.model.batches[-2:]] == [[5, 6, 7], [8]]
    assert (bad.cache.freed, good.cache.freed) == (1, 0)
    assert rig.model.distrusted == 0


def test_an_error_ends_every_session_of_a_shared_step(rig: Rig) -> None:
    clients = rig.clients(2)
    rig.model.raises[20] = InvalidArgumentError("the model's activations are not finite")
    rig.feed((clients[0], [1], 1), (clients[1], [20], 1))
    assert {str(client.next()) for client in clients} == {"the model's activations are not finite"}
    assert rig.works()


def test_a_failed_choice_ends_one_session_of_a_shared_step(rig: Rig) -> None:
    good, bad = rig.clients(2)
    rig.model.infinite.add(20)
    rig.feed((good, [1], 2), (bad, [20], 2))
    assert isinstance(bad.next(), InvalidArgumentError)
    assert [good.token(), good.token()] == [2, 3]
    assert [len(batch.ids) for batch in rig.model.batches] == [2, 1]


def test_a_verification_error_is_told_and_the_secret_is_renewed_once(rig: Rig) -> None:
    clients = rig.clients(3)
    rig.model.raises[20] = VerificationError()
    rig.feed(*((client, [20], 1) for client in clients))
    for client in clients:
        assert isinstance(client.next(), VerificationError)
    rig.do(lambda: None)
    assert len(rig.model.batches) == rig.model.distrusted == 1
    assert rig.works()


UNRENEWED = [VerificationError(), UnavailableError("gone"), RuntimeError(PRIVATE)]


@pytest.mark.parametrize("error", UNRENEWED, ids=lambda error: type(error).__name__)
def test_no_step_is_made_until_the_secret_could_be_renewed(rig: Rig, error: Exception) -> None:
    """Renewing reads the weights again, so the disk can make it fail: with the very error that asks for it."""
    bad, other = rig.clients(2)
    rig.model.raises[20], rig.model.distrust_raises = VerificationError(), error
    rig.feed((bad, [20], 1))
    assert isinstance(bad.next(), VerificationError)
    rig.feed((other, [1], 1))
    refused = other.next()
    assert isinstance(refused, UnavailableError)
    assert PRIVATE not in str(refused)
    assert len(rig.model.batches) == 1  # the rejected one
    assert rig.model.distrusted >= 1
    rig.model.distrust_raises = None
    assert rig.works()
    renewed = rig.model.distrusted
    assert rig.works()
    assert rig.model.distrusted == renewed


def test_after_a_rejection_in_idle_time_the_secret_is_renewed_before_the_next_step(rig: Rig) -> None:
    distrusted: list[int] = []
    answer = rig.model.forward

    def forward(batch: Batch, accept: Accept) -> None:
        distrusted.append(rig.model.distrusted)
        answer(batch, accept)

    def prepare() -> None:
        rig.model.idle_raises = VerificationError()
        setattr(rig.model, "forward", forward)  # noqa: B010  (mypy)

    rig.do(prepare)
    for _ in range(1000):
        if rig.model.idle_raises is None:
            break
        time.sleep(0.005)
    assert rig.model.idle_raises is None
    assert rig.works()
    assert distrusted == [1]


def test_an_internal_error_reaches_nobody_in_words(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    [client] = rig.clients(1)
    rig.model.raises[20] = ValueError(PRIVATE)
    with caplog.at_level(logging.DEBUG):
        rig.feed((client, [20], 1))
        error = client.next()
    assert isinstance(error, PreconditionError)
    assert PRIVATE not in str(error)
    assert "20" not in str(error)
    assert "ValueError" in caplog.text
    assert PRIVATE not in caplog.text
    assert rig.model.distrusted == 0
    assert rig.works()


def test_a_client_that_cannot_be_told_does_not_stop_the_others(rig: Rig) -> None:
    good, gone = rig.clients(2)

    def closed(event: object) -> None:
        raise RuntimeError("the event loop is closed")

    rig.do(lambda: gone.session.attach(closed))
    rig.feed((good, [1], 2), (gone, [20], 2))
    assert [good.token(), good.token()] == [2, 3]
    assert rig.works()


def test_a_session_that_was_removed_takes_no_further_part(rig: Rig) -> None:
    [client] = rig.clients(1)

    def feed_and_remove() -> None:
        client.session.feed([1, 2], 9, end_turn=False)
        rig.engine.remove(client.session)

    rig.do(feed_and_remove)
    rig.do(lambda: None)
    assert rig.engine.sessions == 0
    assert rig.model.batches == []
    assert client.cache.freed == 1


def test_there_is_a_most_of_sessions(rig: Rig) -> None:
    clients = rig.clients(MAX_SESSIONS)
    late = Client()
    with pytest.raises(ExhaustedError, match=str(MAX_SESSIONS)):
        rig.do(lambda: rig.engine.add(late.session))
    assert (late.session.dead, late.cache.freed) == (True, 1)
    assert rig.engine.sessions == MAX_SESSIONS
    rig.do(lambda: rig.engine.remove(clients[0].session))
    assert rig.works()


def test_stop_tells_every_session() -> None:
    rig = Rig()
    clients = rig.clients(3)
    rig.feed((clients[0], [1, 2], 0))
    rig.engine.stop()
    rig.engine.join(10)
    for client in clients:
        assert isinstance(client.next(), UnavailableError)
        assert (client.session.dead, client.cache.freed) == (True, 1)


def test_cancelled_futures_do_not_kill_the_thread(rig: Rig) -> None:
    running, go = threading.Event(), threading.Event()
    ran: list[int] = []

    def block() -> None:
        running.set()
        go.wait(10)

    blocked = rig.engine.submit(block)
    running.wait(10)
    cancelled = rig.engine.submit(lambda: ran.append(1))
    assert cancelled.cancel()
    assert not blocked.cancel()
    go.set()
    blocked.result(10)
    rig.do(lambda: ran.append(2))
    assert ran == [2]
    assert rig.works()


def test_a_waiter_that_gives_up_on_loading_does_not_kill_the_thread() -> None:
    loading, go = threading.Event(), threading.Event()

    def load() -> Model:
        loading.set()
        go.wait(10)
        return Model()

    engine = Engine(load, 8)
    engine.start()
    loading.wait(10)
    engine.loaded.cancel()
    go.set()
    assert engine.submit(lambda: 5).result(5) == 5
    engine.stop()


@pytest.mark.parametrize("error", [ExhaustedError("full"), ValueError(PRIVATE), SystemExit(3)])
def test_what_a_command_raises_goes_to_its_future(rig: Rig, error: BaseException) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error)):
        rig.do(work)
    assert rig.works()


def test_a_failed_load_is_told_and_ends_the_thread() -> None:
    def load() -> Model:
        raise PreconditionError("no such model")

    engine = Engine(load, 8)
    engine.start()
    with pytest.raises(PreconditionError, match="no such model"):
        engine.loaded.result(10)
    engine.join(10)
    assert not engine.is_alive()
    assert engine.scheme is None


def test_idle_work_runs_a_tile_at_a_time_until_there_is_none() -> None:
    rig = Rig()
    done: queue.SimpleQueue[None] = queue.SimpleQueue()
    calls: list[int] = []

    def idle() -> bool:
        calls.append(len(rig.model.batches))
        if len(calls) == 20:
            done.put(None)
        return len(calls) < 20

    rig.do(lambda: setattr(rig.model, "idle", idle))
    done.get(timeout=10)
    assert rig.works()
    rig.engine.stop()


def test_idle_work_gives_way_to_commands_and_steps() -> None:
    """With idle work that never ends, sessions are still served."""
    rig = Rig()
    rig.do(lambda: setattr(rig.model, "tiles", 1 << 60))
    [client] = rig.clients(1)
    rig.feed((client, [1], 5))
    assert [client.token() for _ in range(5)] == [2, 3, 4, 5, 6]
    rig.engine.stop()
    rig.engine.join(10)
    assert not rig.engine.is_alive()


@pytest.mark.parametrize("error", [VerificationError(), ValueError(PRIVATE), StopIteration()])
def test_an_error_in_idle_work_ends_no_session(rig: Rig, error: Exception) -> None:
    [client] = rig.clients(1)
    rig.do(lambda: setattr(rig.model, "idle_raises", error))
    rig.feed((client, [1], 1))
    assert client.token() == 2
    rig.do(lambda: None)
    assert not client.session.dead
    assert rig.works()


def test_events_are_messages_or_errors_of_our_tree(rig: Rig) -> None:
    [client] = rig.clients(1)
    rig.feed((client, [1], 1))
    event = client.next()
    assert isinstance(event, pb.DecodeResponse | CleaveError)


def test_a_prompt_is_not_starved_by_answers_that_go_on() -> None:
    """More sessions decode than a step takes; the prompt still gets in after a few steps."""
    rig = Rig(max_rows=2)
    talking, asking = rig.clients(6)[:5], rig.clients(1)[0]
    rig.feed(*((client, [1], 30) for client in talking), (asking, [47, 47, 47], 1))
    assert asking.token() == 48
    first = next(number for number, batch in enumerate(rig.model.batches) if 47 in batch.ids)
    rig.engine.stop()
    assert first < 8


def test_a_model_that_cannot_be_loaded_leaves_nobody_waiting() -> None:
    def load() -> Model:
        raise UnavailableError("no such disk")

    engine = Engine(load, 8)
    engine.start()
    with pytest.raises(UnavailableError, match="no such disk"):
        engine.loaded.result(10)
    with pytest.raises(CleaveError):
        engine.submit(lambda: None).result(3)
