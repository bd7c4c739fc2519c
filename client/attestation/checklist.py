"""A checklist: steps in a fixed order, each of which passes, is left out on purpose, or refuses and ends the check.

A step is a function that returns what it saw in a few words. It refuses by raising `Wrong`; the checklist turns that
into a `Refusal`, which names the step by number and field. Nothing but a Refusal comes out of untrusted bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from wire.errors import UnauthenticatedError

PASSED = "passed"
NOT_CHECKED = "not checked"
REFUSED = "refused"

C = TypeVar("C")


@dataclass(frozen=True)
class Step:
    """One line of a verdict."""

    number: int
    field: str
    verdict: str  # PASSED, NOT_CHECKED, REFUSED
    text: str


class NotChecked(str):
    """What a step returns that the policy, or the caller, left out on purpose."""

    __slots__ = ()


class Wrong(Exception):  # noqa: N818 - never leaves a checklist
    """A step refuses: what is wrong, and what to do about it."""

    def __init__(self, text: str, advice: str) -> None:
        super().__init__(text)
        self.text = text
        self.advice = advice


class Refusal(UnauthenticatedError):  # noqa: N818 - what it is called everywhere
    """Evidence was refused. `step` is the one that refused; `steps` are all that were taken, it included."""

    def __init__(self, provider: str, step: Step, advice: str, before: Sequence[Step] = ()) -> None:
        super().__init__(f"{provider} evidence refused at step {step.number}, {step.field}: {step.text}; {advice}")
        self.provider = provider
        self.step = step
        self.advice = advice
        self.steps = (*before, step)


def refuse(provider: str, number: int, field: str, wrong: Wrong, before: Sequence[Step] = ()) -> Refusal:
    """The Refusal of one step, to be raised."""
    return Refusal(provider, Step(number, field, REFUSED, wrong.text), wrong.advice, before)


def run(
    provider: str, steps: Sequence[tuple[str, Callable[[C], str]]], case: C, before: Sequence[Step] = ()
) -> tuple[Step, ...]:
    """Take the steps in their order, numbered from 1. Raises Refusal at the first one that is wrong.

    `before` are steps of another list, taken already: they come first in what is returned, and in the Refusal.
    """
    taken = list(before)
    for number, (field, check) in enumerate(steps, 1):
        try:
            seen = check(case)
        except Wrong as wrong:
            raise refuse(provider, number, field, wrong, taken) from wrong
        taken.append(Step(number, field, NOT_CHECKED if isinstance(seen, NotChecked) else PASSED, seen))
    return tuple(taken)
