"""What an attacker is given beside the transcript, and what he may say. The truth is neither.

An attack is a function of a View and a Knowledge; it returns Findings. Each finding is of one target, a place that it
read, and is either a list of answers, which somebody else compares with the truth, or a measured fact that needs no
truth: that so many of so many trials came out as they would not by chance.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import View

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Knowledge:
    """Numbers of prompts are places in the transcript. `rng` is the only source of chance."""

    model: PublicModel  # public weights
    lengths: tuple[int, ...]  # of all prompts, in tokens
    known: dict[int, Ints]  # prompts whose tokens the attacker knows, or chose
    victims: tuple[int, ...]  # those he wants
    prefix: Ints  # how every one of them begins: a system prompt
    again: tuple[int, ...] = ()  # each is one of `known` over again: which?
    labels: dict[int, int] = field(default_factory=dict)  # of messages that the attacker made himself: 0 or 1
    unlabelled: tuple[int, ...] = ()  # messages of one or the other kind
    repeated: int | None = None  # the prompt that is one token, over and over, which he chose
    seed: int = 0

    @property
    def rng(self) -> np.random.Generator:
        """Always the same."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Answers:
    """What the attacker says, in order, about `of`: tokens (of the victims, behind the prefix), again, unlabelled.

    `pool`: how many answers there are to choose from; who guesses is right once in so many. `said` may have several
    guesses for each question, [questions, guesses]: it is right if one of them is, and so is chance as many times.
    """

    target: str
    of: str
    said: Ints
    pool: int


@dataclass(frozen=True)
class Fact:
    """`hits` of `trials` are as only somebody who broke the scheme would have them, or as chance has with `chance`.

    `p`: the probability of so extreme a fact if nothing leaks, where it is not the binomial one.
    """

    target: str
    metric: str
    hits: int
    trials: int
    chance: float
    p: float | None = None


Finding = Answers | Fact
Attack = Callable[[View, Knowledge], list[Finding]]  # an empty list: there is nothing for it in this transcript


def tokens_wanted(known: Knowledge) -> int:
    """How many tokens of the victims the attacker does not know."""
    return sum(known.lengths[number] - len(known.prefix) for number in known.victims)
