"""One conversation's state machine: credit, turns, context, and who holds it."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.trusted_worker.fakes import EOS, VOCABULARY, Client, logits_for
from trusted_worker.session import MAX_CREDIT, MAX_FRAME_TOKENS
from wire.errors import CleaveError, ContextError, InvalidArgumentError, UnavailableError
from wire.v1 import trusted_worker_pb2 as pb


def test_a_turn_sends_as_many_tokens_as_there_is_credit_for() -> None:
    client = Client()
    client.session.feed([1, 2, 3], 2, end_turn=False)
    assert client.session.rows == 3
    assert [client.step(7), client.step(8), client.step(9)] == [True, True, False]
    assert [client.token(), client.token()] == [7, 8]
    assert client.events.empty()
    client.session.feed([], 1, end_turn=False)
    assert client.step(9)
    assert client.token() == 9


def test_without_credit_all_but_the_last_token_are_computed() -> None:
    client = Client()
    client.session.feed([1, 2, 3], 0, end_turn=False)
    assert client.session.rows == 2
    assert client.step(7)
    assert not client.step(7)
    assert (client.cache.length, client.events.empty()) == (2, True)
    client.session.feed([], 1, end_turn=False)
    assert client.session.rows == 1
    assert client.step(7)
    assert client.token() == 7


def test_a_prompt_in_several_frames() -> None:
    client = Client()
    client.session.feed([1, 2], 0, end_turn=False)
    client.session.feed([3, 4], 1, end_turn=False)
    assert client.session.take(4) == ([1, 2, 3, 4], [], True)


def test_a_chunk_that_is_not_the_last_wants_no_logits() -> None:
    client = Client()
    client.session.feed([1, 2, 3], 1, end_turn=False)
    assert client.session.take(2) == ([1, 2], [], False)
    assert client.session.take(1) == ([3], [], True)


def test_a_turn_ends_at_an_end_of_sequence_token() -> None:
    client = Client()
    client.session.feed([1], 5, end_turn=False)
    client.step(3)
    client.step(EOS)
    assert [client.token(), client.token()] == [3, EOS]
    final = client.final()
    assert (final.reason, final.context_tokens) == (pb.FINISH_REASON_EOS, 3)
    assert client.session.rows == 0


def test_a_turn_ends_when_the_context_is_full() -> None:
    client = Client(capacity=4)
    client.session.feed([1, 2], 10, end_turn=False)
    sent = 0
    while client.step(5):
        sent += 1
    assert [client.token() for _ in range(sent)] == [5] * sent
    assert client.final().reason == pb.FINISH_REASON_CONTEXT
    assert client.cache.length <= 4


def test_a_prompt_that_fills_the_context_gets_one_token() -> None:
    client = Client(capacity=3)
    client.session.feed([1, 2, 3], 5, end_turn=False)
    assert client.step(6)
    assert client.token() == 6
    final = client.final()
    assert (final.reason, final.context_tokens) == (pb.FINISH_REASON_CONTEXT, 4)
    assert client.session.rows == 0


def test_a_turn_ends_when_the_client_says_so() -> None:
    client = Client()
    client.session.feed([1], 5, end_turn=False)
    client.step(3)
    client.session.feed([], 0, end_turn=True)
    assert client.token() == 3
    assert client.final().reason == pb.FINISH_REASON_ENDED
    assert client.session.rows == 0


def test_the_next_turn_goes_on_after_the_token_sampled_last() -> None:
    client = Client()
    client.session.feed([1, 2], 1, end_turn=False)
    client.step(3)
    client.session.feed([], 0, end_turn=True)
    client.session.feed([4, 5], 1, end_turn=False)
    assert client.session.take(3) == ([3, 4, 5], [], True)


def test_tokens_that_were_not_computed_when_a_turn_ended_are_not_lost() -> None:
    client = Client()
    client.session.feed([1, 2, 3], 1, end_turn=True)
    assert client.final().context_tokens == 3
    assert client.session.rows == 0
    client.session.feed([4], 1, end_turn=False)
    assert client.session.take(4) == ([1, 2, 3, 4], [], True)


def test_no_more_tokens_can_be_outstanding_than_a_stream_should_hold() -> None:
    client = Client()
    client.session.feed([1], MAX_CREDIT, end_turn=False)
    with pytest.raises(InvalidArgumentError, match=str(MAX_CREDIT)):
        client.session.feed([], 1, end_turn=False)
    client.step(7)
    client.session.feed([], 1, end_turn=False)
    assert client.token() == 7


def test_credit_does_not_outlive_its_turn() -> None:
    client = Client()
    client.session.feed([1], 30, end_turn=True)
    client.session.feed([2], 1, end_turn=False)
    assert client.step(5)
    assert not client.step(6)


def test_frames_outside_a_turn_are_ignored() -> None:
    client = Client()
    client.session.feed([], 9, end_turn=False)
    client.session.feed([], 0, end_turn=True)
    assert client.session.rows == 0
    assert client.events.empty()
    client.session.feed([1], 1, end_turn=False)
    client.step(EOS)
    client.token()
    client.final()
    client.session.feed([], 9, end_turn=True)
    assert client.session.rows == 0
    assert client.events.empty()
    client.session.feed([2], 0, end_turn=False)
    assert not client.session._credit


@pytest.mark.parametrize("token", [VOCABULARY, VOCABULARY + 1, 2**32 - 1])
def test_a_token_out_of_range_changes_nothing(token: int) -> None:
    client = Client()
    client.session.feed([1], 0, end_turn=False)
    with pytest.raises(InvalidArgumentError, match=str(VOCABULARY)):
        client.session.feed([2, token], 3, end_turn=True)
    assert client.session.rows == 0
    assert client.events.empty()
    client.session.feed([VOCABULARY - 1], 1, end_turn=False)
    assert client.session.take(2) == ([1, VOCABULARY - 1], [], True)


def test_a_frame_holds_a_limited_number_of_tokens() -> None:
    client = Client(capacity=2 * MAX_FRAME_TOKENS)
    with pytest.raises(InvalidArgumentError, match=str(MAX_FRAME_TOKENS)):
        client.session.feed([1] * (MAX_FRAME_TOKENS + 1), 1, end_turn=False)
    assert client.session.rows == 0
    client.session.feed([1] * MAX_FRAME_TOKENS, 1, end_turn=False)
    assert client.session.rows == MAX_FRAME_TOKENS


def test_a_context_overflow_changes_nothing() -> None:
    client = Client(capacity=5)
    client.session.feed([1, 2, 3], 0, end_turn=False)
    with pytest.raises(ContextError, match="3 more tokens do not fit: the context has room for 2"):
        client.session.feed([1, 1, 1], 4, end_turn=True)
    assert client.events.empty()
    assert client.session.rows == 2
    client.session.feed([4, 5], 1, end_turn=False)
    assert client.session.take(5) == ([1, 2, 3, 4, 5], [], True)


def test_a_full_context_has_room_for_none() -> None:
    client = Client(capacity=3)
    client.session.feed([1, 2, 3], 1, end_turn=False)
    client.step(6)
    with pytest.raises(ContextError, match="room for 0"):
        client.session.feed([4], 1, end_turn=False)


def test_a_detached_session_stops_and_another_stream_goes_on() -> None:
    client = Client()
    client.session.feed([1, 2], 9, end_turn=False)
    client.step(3)
    assert client.token() == 3
    assert client.session.detach(client.emit)
    assert not client.session.attached
    assert client.session.rows == 0
    later = Client()
    client.session.attach(later.emit)
    client.session.feed([4], 1, end_turn=False)
    assert client.step(5)
    assert later.token() == 5
    assert client.events.empty()
    assert client.cache.length == 4


def test_a_stream_that_was_replaced_cannot_detach() -> None:
    client, later = Client(), Client()
    client.session.attach(later.emit)
    client.session.feed([1], 1, end_turn=False)
    assert not client.session.detach(client.emit)
    assert client.step(5)
    assert later.token() == 5


def test_a_token_of_a_client_that_left_during_the_step_is_kept_unsent() -> None:
    client = Client()
    client.session.feed([1, 2], 9, end_turn=False)
    client.session.take(2)
    client.session.detach(client.emit)
    client.cache.commit(2)
    client.session.accept(logits_for(7))
    assert client.events.empty()
    client.session.attach(client.emit)
    client.session.feed([3], 1, end_turn=False)
    assert client.session.take(2) == ([7, 3], [], True)


def test_a_failed_session_says_so_once_and_is_wiped() -> None:
    client = Client()
    client.session.feed([1], 1, end_turn=False)
    for _ in range(2):
        client.session.fail(UnavailableError("gone"))
        client.session.close()
    assert isinstance(client.next(), UnavailableError)
    assert client.events.empty()
    assert client.session.dead
    assert client.session.rows == 0
    assert client.cache.freed == 1
    assert not client.session._tokens
    assert not client.session._pending


def test_a_dead_session_takes_no_more_tokens_and_says_so() -> None:
    """A stream outlives a session that another call closed: its client must not wait for ever, nor tokens stay."""
    client = Client()
    client.session.close()
    with pytest.raises(CleaveError):
        client.session.feed([1, 2], 1, end_turn=False)
    assert not client.session._tokens
    assert not client.session._pending


class Conversation(RuleBasedStateMachine):
    """Any order of frames, steps and reconnects, against a count of what was granted and sent."""

    def __init__(self) -> None:
        super().__init__()
        self.client = Client(capacity=24)
        self.in_turn = False
        self.allowed = 0  # tokens that may still come
        self.context: list[int] = []
        self.computed: list[int] = []

    @rule(
        ids=st.lists(st.integers(0, VOCABULARY + 1), max_size=6),
        credit=st.integers(0, 5),
        end_turn=st.booleans(),
    )
    def frame(self, ids: list[int], credit: int, end_turn: bool) -> None:
        known = [token for token in ids if token < VOCABULARY]
        room = 24 - len(self.context)
        if len(known) < len(ids):
            with pytest.raises(InvalidArgumentError):
                self.client.session.feed(ids, credit, end_turn)
        elif len(ids) > room:
            with pytest.raises(ContextError):
                self.client.session.feed(ids, credit, end_turn)
        elif len(ids) <= room:
            self.client.session.feed(ids, credit, end_turn)
            self.context += ids
            self.in_turn = self.in_turn or bool(ids)
            if self.in_turn:
                self.allowed += credit
                if end_turn:
                    self._ended(pb.FINISH_REASON_ENDED)

    @rule(most=st.integers(1, 4), token=st.sampled_from([3, 4, EOS]))
    def step(self, most: int, token: int) -> None:
        rows = min(self.client.session.rows, most)
        assert rows >= 0
        if not rows:
            return
        assert self.in_turn
        ids, _, wants = self.client.session.take(rows)
        self.computed += ids
        self.client.cache.commit(rows)
        assert wants == (len(self.computed) == len(self.context))
        if not wants:
            return
        self.client.session.accept(logits_for(token))
        self.context.append(token)
        self.allowed -= 1
        assert self.client.token() == token
        if token == EOS:
            self._ended(pb.FINISH_REASON_EOS)
        elif len(self.context) >= 24:
            self._ended(pb.FINISH_REASON_CONTEXT)

    @rule()
    def reconnect(self) -> None:
        assert self.client.session.detach(self.client.emit)
        self.client.session.attach(self.client.emit)
        self.in_turn, self.allowed = False, 0

    def _ended(self, reason: pb.FinishReason.ValueType) -> None:
        final = self.client.final()
        assert (final.reason, final.context_tokens) == (reason, len(self.context))
        self.in_turn, self.allowed = False, 0

    @invariant()
    def nothing_was_sent_beyond_the_credit(self) -> None:
        assert self.allowed >= 0
        assert self.client.events.empty()

    @invariant()
    def every_token_is_computed_once_and_in_order(self) -> None:
        assert self.computed == self.context[: len(self.computed)]
        assert self.client.cache.length == len(self.computed) <= 24


TestConversation = Conversation.TestCase
TestConversation.settings = settings(deadline=None, max_examples=60, stateful_step_count=40, derandomize=True)


def test_a_sequence_rests_when_its_turn_is_over_or_its_client_is_gone() -> None:
    client = Client()
    client.session.feed([1, 2], credit=5, end_turn=False)
    client.step(7)
    assert client.cache.rests == 0
    client.session.feed([], credit=0, end_turn=True)
    assert client.cache.rests == 1
    client.session.feed([3], credit=5, end_turn=False)
    client.session.detach(client.emit)
    assert client.cache.rests == 2


def test_latencies_are_observed_while_a_token_could_be_computed() -> None:
    client = Client()
    latencies = client.session._latencies
    client.session.feed([1, 2], credit=2, end_turn=False)
    for _ in range(2):
        client.step(7)
    client.session.feed([], credit=1, end_turn=False)
    client.step(7)
    counts = [one.lines("x", "")[-1] for one in (latencies.first_token, latencies.next_token)]
    assert counts == ["x_count 1", "x_count 2"]
    assert (latencies.prompt_tokens, latencies.generated_tokens) == (2, 3)
