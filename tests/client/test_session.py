import threading
from collections.abc import Callable
from dataclasses import fields

import grpc
import pytest

from client.attestation import policy_file
from client.attestation.policy import Policy
from client.counters import Counters
from client.session import Request, connect
from client.turn import Pacing, Turn
from deploy.local import simulated_policy
from tests.client.fake_worker import EOS, FakeWorker, Script
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
from wire.sealing import SIZES, Receiver
from wire.v1 import trusted_worker_pb2 as pb

Serve = Callable[[Script], FakeWorker]
REQUEST = Request("tiny", "secure-infer", "int8")


def run(worker: FakeWorker, prompt: list[int], pacing: Pacing) -> tuple[list[int], Turn, list[int]]:
    """One turn: the answer's ids, the turn, the context after it."""
    with connect(worker.target, Policy()) as trusted:
        session = trusted.open(REQUEST)
        try:
            turn = session.turn(prompt, pacing)
            return [token.token_id for token in turn], turn, session.context
        finally:
            session.close()


def test_attestation_comes_first_with_a_fresh_nonce(serve: Serve) -> None:
    worker = serve(Script())
    for _ in range(2):
        with connect(worker.target, Policy()) as trusted:
            assert trusted.peer.provider == "none"
    assert len(set(worker.nonces)) == 2
    assert {len(nonce) for nonce in worker.nonces} == {32}


def test_a_refused_peer_receives_nothing_but_the_nonce(serve: Serve) -> None:
    worker = serve(Script(provider="sev-snp"))
    with pytest.raises(UnauthenticatedError):
        connect(worker.target, Policy())
    assert not worker.opened


@pytest.mark.parametrize("credit", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("wanted", [1, 2, 7, 8, 9, 40])
def test_credit_is_never_exceeded(serve: Serve, credit: int, wanted: int) -> None:
    worker = serve(Script(answers=[[5] * 50]))
    ids, turn, context = run(worker, [7, 8], Pacing(credit, wanted))
    assert ids == [5] * wanted
    assert turn.finish_reason == "length"
    assert context == [7, 8] + [5] * wanted
    assert worker.most_outstanding <= credit
    assert sum(frame.credit for frame in worker.frames) == wanted


def test_eos_is_part_of_the_answer(serve: Serve) -> None:
    worker = serve(Script(answers=[[5, 6, EOS]]))
    ids, turn, _ = run(worker, [7], Pacing())
    assert (ids, turn.finish_reason) == ([5, 6, EOS], "eos")


def test_eos_as_the_last_token_that_was_asked_for(serve: Serve) -> None:
    worker = serve(Script(answers=[[5, EOS]]))
    ids, turn, _ = run(worker, [7], Pacing(8, 2))
    assert (ids, turn.finish_reason) == ([5, EOS], "eos")


def test_a_stray_end_of_turn_does_not_end_the_next_turn(serve: Serve) -> None:
    worker = serve(Script(answers=[[5, EOS], [6, 6, EOS]]))
    with connect(worker.target, Policy()) as trusted:
        session = trusted.open(REQUEST)
        assert [token.token_id for token in session.turn([7], Pacing(8, 2))] == [5, EOS]
        assert [token.token_id for token in session.turn([8], Pacing())] == [6, 6, EOS]
        assert session.context == [7, 5, EOS, 8, 6, 6, EOS]
        session.close()


def test_ending_a_turn_drains_it(serve: Serve) -> None:
    worker = serve(Script(answers=[list(range(10, 60))]))
    with connect(worker.target, Policy()) as trusted:
        session = trusted.open(REQUEST)
        turn = session.turn([7], Pacing(credit=8))
        shown = []
        for token in turn:
            assert not session.ready
            shown.append(token.token_id)
            if len(shown) == 3:
                turn.end("stop")
                turn.end("interrupted")  # a second one changes nothing
        assert (shown, turn.finish_reason) == ([10, 11, 12], "stop")
        assert session.ready
        assert session.context == [7, *range(10, 10 + worker.tokens)]
        assert worker.tokens > 3
        session.close()
    assert worker.closed.wait(5)


def test_a_long_prompt_goes_in_frames_with_credit_on_the_last(serve: Serve) -> None:
    worker = serve(Script(answers=[[EOS]], max_frame_tokens=4))
    run(worker, list(range(3, 13)), Pacing(credit=5))
    prompt = [frame for frame in worker.frames if frame.token_ids]
    assert [list(frame.token_ids) for frame in prompt] == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12]]
    assert [frame.credit for frame in prompt] == [0, 0, 5]


def test_log_probabilities_arrive(serve: Serve) -> None:
    worker = serve(Script(answers=[[5, EOS]]))
    with connect(worker.target, Policy()) as trusted:
        session = trusted.open(REQUEST)
        first = next(iter(session.turn([7], Pacing())))
        assert (first.logprob, first.top) == (-0.5, ((5, -0.5),))
        session.close()


def test_what_open_asks_for(serve: Serve) -> None:
    worker = serve(Script())
    request = Request("tiny", "split", "float32", 0.5, 0.25, 40, 1.5, seed=0, logprobs=3, max_context=99)
    with connect(worker.target, Policy()) as trusted:
        trusted.open(request).close()
        trusted.open(REQUEST).close()
    asked = worker.opened[0]
    assert (asked.model, asked.scheme, asked.max_context) == ("tiny", "split", 99)
    assert (asked.sampling.top_k, asked.sampling.logprobs, asked.sampling.seeded) == (40, 3, True)
    assert not worker.opened[1].sampling.seeded


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script(scheme="plain"), DeniedError),
        (Script(refuse_open=(grpc.StatusCode.FAILED_PRECONDITION, "model is loading")), PreconditionError),
        (Script(refuse_open=(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")), ExhaustedError),
        (Script(answers=[[5] * 9], miscount=1), InvalidArgumentError),
        (Script(answers=[[5] * 99], overspend=True), InvalidArgumentError),
        (Script(answers=[[5] * 9], fail_after=3), VerificationError),
        (Script(answers=[[5] * 9], max_context=1), ContextError),
    ],
)
def test_what_goes_wrong_is_the_right_error(serve: Serve, script: Script, error: type[CleaveError]) -> None:
    with pytest.raises(error):
        run(serve(script), [7, 8], Pacing(credit=1, max_new_tokens=6))


def test_counters_are_all_that_stats_says(serve: Serve) -> None:
    names = {field.name for field in fields(Counters)}
    assert names == {field.name for field in pb.StatsResponse.DESCRIPTOR.fields} - {"scheme", "precision"}
    with connect(serve(Script(stats={"kv_pages_used": 3, "tee_profile": "optee"})).target, Policy()) as trusted:
        counters = trusted.counters()
    assert (counters.kv_pages_used, counters.tee_profile, counters.memory_peak) == (3, "optee", 2 << 20)


def test_a_silent_worker_meets_a_deadline(serve: Serve) -> None:
    with pytest.raises(DeadlineError, match="--timeout"):
        run(serve(Script(answers=[[]])), [7], Pacing(step_seconds=0.05))


def test_nobody_there_names_the_command_that_helps(serve: Serve) -> None:
    worker = serve(Script())
    worker.stop()
    with pytest.raises(UnavailableError, match="cleave up"):
        connect(worker.target, Policy())


def test_a_worker_that_stops_in_the_middle(serve: Serve) -> None:
    worker = serve(Script(answers=[[5] * 4]))
    with connect(worker.target, Policy()) as trusted:
        session = trusted.open(REQUEST)
        answer = iter(session.turn([7], Pacing()))
        next(answer)
        worker.stop()
        with pytest.raises(UnavailableError):
            list(answer)
        session.close()


@pytest.mark.parametrize("prompt", [[], [300], [5, -1]])
def test_impossible_prompts_are_refused_here(serve: Serve, prompt: list[int]) -> None:
    worker = serve(Script())
    with pytest.raises(InvalidArgumentError) as caught:
        run(worker, prompt, Pacing())
    assert "-1" not in str(caught.value)
    assert not worker.frames


def test_a_worker_with_another_key_is_verified_again(serve: Serve) -> None:
    worker = serve(Script(answers=[[5, EOS], [6, EOS]]))
    with connect(worker.target, Policy()) as trusted:
        trusted.open(REQUEST).close()
        first, worker.receiver = trusted.peer.hpke_key, Receiver()
        session = trusted.open(REQUEST)
        assert [token.token_id for token in session.turn([7], Pacing())] == [5, EOS]
        assert trusted.peer.hpke_key == worker.receiver.public_key != first
        assert len(worker.nonces) == 2
        session.close()


def test_a_worker_that_became_another_one_receives_nothing(serve: Serve) -> None:
    worker = serve(Script(answers=[[5, EOS]]))
    with connect(worker.target, Policy()) as trusted:
        trusted.open(REQUEST).close()
        before = len(worker.opened)
        worker.receiver, worker.script.provider = Receiver(), "sev-snp"
        with pytest.raises(UnauthenticatedError, match="policy file"):
            trusted.open(REQUEST)
        with pytest.raises(UnauthenticatedError, match="policy file"):
            trusted.open(REQUEST)
    assert (len(worker.opened), worker.frames) == (before, [])


def test_after_a_cut_call_the_worker_is_verified_again(serve: Serve) -> None:
    worker = serve(Script(answers=[[5] * 9, [6, EOS]], cut_after=3))
    with connect(worker.target, Policy()) as trusted:
        session = trusted.open(REQUEST)
        with pytest.raises(UnavailableError, match="cut"):
            list(session.turn([7], Pacing()))
        session.close()
        assert len(worker.nonces) == 1
        session = trusted.open(REQUEST)
        assert len(worker.nonces) == 2
        session.close()
        trusted.open(REQUEST).close()  # sessions that this client closed were not cut
        assert len(worker.nonces) == 2


def test_a_key_that_is_none_is_refused(serve: Serve) -> None:
    worker = serve(Script())
    worker.receiver.public_key = b"short"
    with pytest.raises(UnauthenticatedError, match="key"):
        connect(worker.target, Policy())
    assert not worker.sealed


def test_frames_of_a_session_have_one_size_and_show_nothing(serve: Serve) -> None:
    worker = serve(Script(answers=[[5] * 60]))
    prompt = list(range(200, 290))
    run(worker, prompt, Pacing(8, 40))
    sizes = {len(frame.SerializeToString()) for frame in worker.sealed}
    assert sizes == {SIZES[0]}
    plain = pb.DecodeRequest(token_ids=prompt).SerializeToString()
    assert all(plain[8:16] not in frame.body for frame in worker.sealed)


def test_nothing_is_sent_after_a_loss_until_evidence_is_accepted_again(serve: Serve) -> None:
    worker = serve(Script(answers=[[7, EOS]], cut_after=1))
    with connect(worker.target, Policy()) as trusted:
        session = trusted.open(REQUEST)
        with pytest.raises(UnavailableError):
            list(session.turn([3], Pacing()))
        session.close()
        worker.script.provider = "sev-snp"
        frames = len(worker.sealed)
        for _ in range(3):
            with pytest.raises(UnauthenticatedError):
                trusted.open(REQUEST)
        assert len(worker.sealed) == frames
        worker.script.provider = "none"
        trusted.open(REQUEST).close()


def test_evidence_can_be_renewed_under_another_policy(serve: Serve) -> None:
    worker = serve(Script())
    with connect(worker.target, Policy()) as trusted:
        before = trusted.peer
        trusted.renew(Policy())
        assert trusted.peer.at > before.at
        assert trusted.peer.offer.nonce == worker.nonces[-1] != before.offer.nonce
        with pytest.raises(UnauthenticatedError):
            trusted.renew(Policy(rules=policy_file.read(simulated_policy.text("ab" * 32, "ab" * 48, "split", []))))
        frames = len(worker.sealed)
        with pytest.raises(UnauthenticatedError):
            trusted.open(REQUEST)
        assert len(worker.sealed) == frames


def test_whoever_wants_to_know_is_told_of_losses(serve: Serve) -> None:
    worker = serve(Script(answers=[[7, EOS]] * 2, cut_after=3))
    told = threading.Semaphore(0)
    with connect(worker.target, Policy()) as trusted:
        trusted.on_loss(told.release)
        session = trusted.open(REQUEST)
        assert len(list(session.turn([3], Pacing()))) == 2
        assert not told.acquire(timeout=0.3)
        with pytest.raises(UnavailableError):
            list(session.turn([3], Pacing()))
        assert told.acquire(timeout=10)  # a call was cut
        session.close()
        trusted.renew(Policy())
        while told.acquire(timeout=0.3):
            pass
        worker.stop()
        assert told.acquire(timeout=10)  # the connection ended
