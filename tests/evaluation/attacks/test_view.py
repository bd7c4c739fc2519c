"""Rows find their prompts, whichever way calls were cut, and what does not fit is left out."""

from dataclasses import replace

import numpy as np

from evaluation.attacks.crossed import crossed
from evaluation.attacks.view import View
from evaluation.transcript import Array, Cache, Event, Exchange, Held, Transcript
from wire.linears import Linear
from wire.v1 import gpu_worker_pb2 as pb

WIDTH = 4


def product(rows: int, start: int, layer: int = 0, linear: Linear = Linear.QKV) -> Exchange:
    up = np.arange(start, start + rows * WIDTH, dtype=np.int32).reshape(rows, WIDTH)
    return Exchange(pb.Operation(ring_matmul=pb.RingMatmul(layer=layer, linear=linear.number)), up, -up)


def view(lengths: list[int], *events: Event) -> View:
    return View.of(Transcript(events), lengths)


def test_one_call_is_one_prompt() -> None:
    found = view([2, 3], product(2, 0), product(3, 100))
    np.testing.assert_array_equal(found.prompts[1]["input", 0], product(3, 100).up)
    np.testing.assert_array_equal(found.prompts[0]["qkv", 0], -product(2, 0).up)


def test_a_prompt_may_come_in_pieces() -> None:
    found = view([5, 2], product(2, 0), product(3, 8), product(2, 100))
    np.testing.assert_array_equal(found.prompts[0]["input", 0].ravel(), np.arange(20))
    assert len(found.rows("input", 0, [0, 1])) == 7


def test_single_rows_belong_to_answers() -> None:
    found = view([2, 2], product(2, 0), product(1, 50), product(1, 60), product(2, 100))
    np.testing.assert_array_equal(found.prompts[1]["input", 0], product(2, 100).up)


def test_places_are_told_apart() -> None:
    events = [product(2, 10 * layer, layer, linear) for layer in (0, 1) for linear in (Linear.QKV, Linear.DOWN)]
    found = view([2], *events)
    assert set(found.prompts[0]) == {(n, layer) for n in ("input", "qkv", "ffn_inner", "down") for layer in (0, 1)}


def test_what_does_not_fit_is_left_out() -> None:
    for events in ([product(2, 0)], [product(2, 0), product(4, 0)], [product(2, 0), product(2, 0), product(2, 9)]):
        assert not view([2, 2] if len(events) != 2 else [3, 3], *events).has("input")


def test_a_cache_is_cut_to_its_prompt() -> None:
    """[layers, heads, tokens, dims] becomes rows; the answer's tokens behind the prompt are left out."""
    half: Array = np.arange(2 * 3 * 5 * 4, dtype=np.float32).reshape(2, 3, 5, 4)
    found = view([4], Cache("drop", half, half + 1000), Cache("wipe", half * 0, half * 0))
    np.testing.assert_array_equal(found.prompts[0]["cache_k", 1], half[1, :, :4].transpose(1, 0, 2))
    np.testing.assert_array_equal(found.prompts[0]["cache_v", 0], half[0, :, :4].transpose(1, 0, 2) + 1000)
    assert not found.prompts[0]["wiped_v", 0].any()


def test_held_tensors_are_rows_too() -> None:
    found = view([2], Held("residual", 1, np.ones((2, 3), np.float32)))
    assert found.has("residual", 1)
    assert not found.has("residual", 0)


def test_a_refused_call_has_no_place_but_was_received() -> None:
    refused = replace(product(2, 50), refused=True)
    found = view([2], product(2, 0), refused)
    np.testing.assert_array_equal(found.prompts[0]["input", 0], product(2, 0).up)
    assert found.transcript.exchanges == [found.transcript.events[0]]
    assert len(crossed(found.transcript)[0]) == 4


def test_other_rows_in_their_place() -> None:
    found = view([2, 2], product(2, 0), product(2, 100))
    changed = found.changed(lambda number, rows: {("input", 0): rows["input", 0] * 0 + number})
    assert (changed.prompts[1]["input", 0] == 1).all()
    assert not changed.has("qkv")
    assert found.has("qkv")
