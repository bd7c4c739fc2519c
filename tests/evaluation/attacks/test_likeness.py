"""Which form survives which transform: made of random rows, with a fresh secret for every prompt."""

from collections.abc import Callable

import numpy as np
import pytest

from evaluation.attacks.likeness import FORMS, likeness
from evaluation.attacks.view import View
from evaluation.transcript import Array, Transcript

PROMPTS, ROWS, WIDTH = 10, 6, 32
Hide = Callable[[Array, np.random.Generator], Array]


def rotation(size: int, rng: np.random.Generator) -> Array:
    turned: Array = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return turned


def uniform(x: Array, rng: np.random.Generator) -> Array:
    return rng.integers(-(1 << 31), 1 << 31, x.shape).astype(np.int32)


def twice(hide: Hide, seed: int = 0) -> View:
    """Each prompt, and each over again, hidden afresh."""
    rng = np.random.default_rng(seed)
    texts = rng.standard_normal((PROMPTS, ROWS, WIDTH))
    return View(Transcript(()), tuple({("x", 0): hide(text, rng)} for text in [*texts, *texts]))


def recognised(view: View) -> dict[str, float]:
    """The share of those over again that are most like themselves."""
    found = likeness(view, range(PROMPTS, 2 * PROMPTS), range(PROMPTS))
    return {form: float((alike.argmax(axis=1) == np.arange(PROMPTS)).mean()) for form, alike in found.items()}


FIXED = rotation(WIDTH, np.random.default_rng(99))
CASES: list[tuple[str, Hide, set[str]]] = [
    ("nothing", lambda x, rng: x, set(FORMS)),
    ("noise and scale", lambda x, rng: x * 3 + 0.01 * rng.standard_normal(x.shape), set(FORMS) - {"equal words"}),
    ("permutation", lambda x, rng: x[:, rng.permutation(WIDTH)], {"sorted rows", "singular values"}),
    ("rows rotated", lambda x, rng: rotation(ROWS, rng) @ x @ FIXED, {"row spaces", "singular values"}),
    ("rows mixed", lambda x, rng: rng.standard_normal((ROWS, ROWS)) @ x @ FIXED, {"row spaces"}),
    ("both rotated", lambda x, rng: rotation(ROWS, rng) @ x @ rotation(WIDTH, rng), {"singular values"}),
    ("one-time pads", uniform, set()),
]


@pytest.mark.parametrize(("hide", "seen"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_form_sees_through_what_leaves_it(hide: Hide, seen: set[str]) -> None:
    found = recognised(twice(hide))
    assert found.keys() == set(FORMS)
    assert all(found[form] == 1.0 for form in seen)
    assert all(found[form] <= 0.5 for form in set(FORMS) - seen)


def test_heads_are_mixed_apart() -> None:
    """[rows, heads, d], each head's rows rotated by a matrix of its own: one space across heads would be lost."""

    def hide(x: Array, rng: np.random.Generator) -> Array:
        heads = x.reshape(ROWS, 2, -1)
        return np.stack([rotation(ROWS, rng) @ heads[:, one] for one in range(2)], axis=1)

    assert recognised(twice(hide))["row spaces"] == 1.0


def test_one_place_in_the_clear_is_enough() -> None:
    """Among 40 of uniform words."""
    rng, clear = np.random.default_rng(3), twice(lambda x, _: np.rint(x * 1000).astype(np.int32))

    def more(number: int, rows: dict[tuple[str, int], Array]) -> dict[tuple[str, int], Array]:
        return rows | {("masked", layer): uniform(rows["x", 0], rng) for layer in range(40)}

    found = recognised(clear.changed(more))
    assert found["equal words"] == found["rows"] == 1.0


def test_nothing_is_seen_of_nothing() -> None:
    assert likeness(View(Transcript(()), ()), [], []) == {}
