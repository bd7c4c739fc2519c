"""What an attacker is given beside the transcript, and what he may say. The truth is neither.

An attack is a function of a View and a Knowledge; it returns Findings. Each finding is of one target, a place that it
read, and is either a list of answers, which somebody else compares with the truth, or a measured fact that needs no
truth: that so many of so many trials came out as they would not by chance.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from evaluation.attacks.public_model import PublicModel
from evaluation.attacks.view import Place, View
from evaluation.transcript import Array

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Told:
    """A victim's text, of which the attacker is told each token after his answer: he may use what stands before.

    `candidates` [tokens behind the prefix, n]: what each token is one of, n known and uniformly likely words.
    """

    text: Ints
    candidates: Ints


@dataclass(frozen=True)
class Knowledge:
    """Numbers of prompts are places in the transcript. `rng` is the only source of chance."""

    model: PublicModel  # public weights
    lengths: tuple[int, ...]  # of all prompts, in tokens
    known: dict[int, Ints]  # prompts whose tokens the attacker knows, or chose
    victims: tuple[int, ...]  # those he wants
    prefix: Ints  # how every one of them begins: a system prompt
    told: dict[int, Told] = field(default_factory=dict)  # victims whose text he is told as he goes
    again: tuple[int, ...] = ()  # each is one of `known` over again: which?
    labels: dict[int, int] = field(default_factory=dict)  # of messages that the attacker made himself: 0 or 1
    unlabelled: tuple[int, ...] = ()  # messages of one or the other kind
    metered: dict[int, int] = field(default_factory=dict)  # conversations whose kind he knows: 0 or 1
    unmetered: tuple[int, ...] = ()  # those of which he wants to know it
    repeated: int | None = None  # the prompt that is one token, over and over, which he chose
    clear: Mapping[int, Mapping[Place, Array]] = field(default_factory=dict)  # known prompts, as the program has them
    seed: int = 0

    @property
    def rng(self) -> np.random.Generator:
        """Always the same, and not the one that prompts were drawn from."""
        return np.random.default_rng([self.seed, 1])


@dataclass(frozen=True)
class Answers:
    """What the attacker says, in order, about `of`.

    tokens: of the victims, behind the prefix; told: the same, of the victims that he is told; again; unlabelled;
    linked: of each unlabelled message from the second on, whether it is the one before over again, 1 or 0;
    prompt lengths, answer lengths, kinds.

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
