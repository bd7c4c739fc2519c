"""Lengths are counted without looking at a tensor, and kinds follow from them."""

import numpy as np

from evaluation.attacks import metadata
from evaluation.attacks.knowledge import Answers
from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import View
from evaluation.leakage.prompts import Script
from evaluation.transcript import Exchange, Transcript
from tests.evaluation.attacks import scenes
from wire.linears import Linear
from wire.v1 import gpu_worker_pb2 as pb


def ring(rows: int, us: int) -> list[Exchange]:
    """A pass of so many rows; the head takes its last."""
    nothing = np.zeros((rows, 0), np.int32)

    def one(linear: Linear, words: np.ndarray) -> Exchange:
        return Exchange(pb.Operation(ring_matmul=pb.RingMatmul(linear=linear.number)), words, words, us)

    return [one(Linear.QKV, nothing), one(Linear.DOWN, nothing), one(Linear.LM_HEAD, nothing[:1])]


def test_lengths_and_times_are_counted() -> None:
    events = [*ring(5, 10), *ring(1, 1_000_010), *ring(1, 3_000_010), *ring(2, 4_000_000)]
    first, second = metadata.conversations(Transcript(tuple(events)))
    assert (first.prompt, first.answer, first.seconds) == (5, 3, 3.0)
    assert (second.prompt, second.answer, second.seconds) == (2, 1, 0.0)


def test_a_prompt_in_pieces_is_one_prompt() -> None:
    """Only its last piece asks for logits."""
    first, last = ring(5, 0), ring(3, 0)
    (one,) = metadata.conversations(Transcript((*first[:2], *last)))
    assert one.prompt == 8


def test_forwards_and_chains_count_alike() -> None:
    rows = [pb.SequenceRows(sequence=1, rows=4)]
    forward = pb.Operation(forward=pb.Forward(sequences=rows, logit_rows=[3]))
    embed = pb.Step(embed=pb.Embed(sequences=rows))
    chain = pb.Operation(chain=pb.Chain(steps=[embed, pb.Step(project_qkv=pb.ProjectQkv())]))
    head = pb.Operation(
        chain=pb.Chain(steps=[pb.Step(finish_block=pb.FinishBlock()), pb.Step(head=pb.Head(logit_rows=[3]))])
    )
    nothing = np.zeros((0, 0), np.int32)
    for operations in ([forward], [chain, head]):
        events = tuple(Exchange(operation, nothing, nothing) for operation in operations)
        assert [one.prompt for one in metadata.conversations(Transcript(events))] == [4]


def test_all_lengths_of_a_script_are_found_under_masks(public: PublicModel, script: Script) -> None:
    found = metadata.attack(scenes.masked(public, script), script.knowledge)
    said = {one.of: one.said for one in found if isinstance(one, Answers)}
    np.testing.assert_array_equal(said["prompt lengths"], script.truth["prompt lengths"])
    assert set(said["kinds"]) <= {0, 1}
    assert len(said["kinds"]) == len(script.truth["kinds"])


def test_another_number_of_conversations_is_nothing_to_count(script: Script) -> None:
    assert metadata.attack(View(Transcript(tuple(ring(5, 0))), ()), script.knowledge) == []
