"""What clients say while the GPU worker records, and the truth that answers are compared with.

Victims' tokens are drawn uniformly from the whole vocabulary: whoever knows nothing is right once in its size, exactly,
whatever rule he guesses by, so what chance can do is known and not estimated. A natural text would be easier to guess
and no harder to protect.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from evaluation.attacks.knowledge import Knowledge, Told
from evaluation.attacks.public_model import PublicModel

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sizes:
    """How many prompts of each kind, and of how many tokens."""

    known: int
    victims: int
    again: int
    told: int  # of the victims
    labelled: int  # messages of two classes
    unlabelled: int
    known_tokens: int
    victim_tokens: int
    repeated_tokens: int
    metered: int  # conversations of two kinds, of random lengths; half of them labelled
    prefix: int = 2
    candidates: int = 0  # what each told token is one of; 0: the whole vocabulary


QUICK = Sizes(
    known=48,
    victims=24,
    again=24,
    told=4,
    labelled=12,
    unlabelled=108,
    known_tokens=8,
    victim_tokens=16,
    repeated_tokens=160,
    metered=32,
)
FULL = replace(QUICK, known=16, victims=8, again=8, told=2, labelled=6, unlabelled=64, metered=8, candidates=256)
KINDS = ((2, 9), (4, 8)), ((7, 17), (1, 5))  # least and most tokens of prompt and answer: a chat; a text to sum up


@dataclass(frozen=True)
class Script:
    """All prompts in their order, how many tokens each asks for, and the truth by the name that Answers.of gives."""

    prompts: tuple[Ints, ...]
    answers: tuple[int, ...]
    truth: dict[str, Ints]
    knowledge: Knowledge


def script(model: PublicModel, sizes: Sizes, seed: int) -> Script:
    """Always the same for the same arguments."""
    rng, vocabulary = np.random.default_rng(seed), model.config.vocabulary

    def some(tokens: int) -> Ints:
        return rng.integers(0, vocabulary, tokens)

    prefix = some(sizes.prefix)
    known = [some(sizes.known_tokens) for _ in range(sizes.known)]
    victims = [np.concatenate([prefix, some(sizes.victim_tokens - sizes.prefix)]) for _ in range(sizes.victims)]
    again = rng.integers(0, sizes.known, sizes.again)
    repeated = np.full(sizes.repeated_tokens, some(1)[0])
    messages = some(sizes.known_tokens), some(sizes.known_tokens)
    secret = rng.integers(0, 2, sizes.unlabelled)
    classes = np.concatenate([np.arange(sizes.labelled) % 2, secret])
    kinds = rng.integers(0, 2, sizes.metered)
    lengths = np.array([[rng.integers(least, most + 1) for least, most in KINDS[kind]] for kind in kinds])
    metered = [some(prompt) for prompt, _ in lengths]
    parts = [known, victims, [known[one] for one in again], [repeated], [messages[one] for one in classes], metered]
    starts = np.cumsum([0, *map(len, parts)])
    places = [tuple(range(start, end)) for start, end in pairwise(starts)]
    said = dict(zip(places[4], classes, strict=True))
    labelled, unlabelled = places[4][: sizes.labelled], places[4][sizes.labelled :]
    pools = np.random.default_rng([seed, 2])
    told = {places[1][one]: _told(victims[one], sizes, vocabulary, pools) for one in range(sizes.told)}
    prompts = tuple(prompt for part in parts for prompt in part)
    answers = [1] * (len(prompts) - sizes.metered) + [int(answer) for _, answer in lengths]
    knowledge = Knowledge(
        model=model,
        lengths=tuple(map(len, prompts)),
        known=dict(zip(places[0], known, strict=True)),
        victims=places[1],
        prefix=prefix,
        told=told,
        again=places[2],
        labels={place: int(said[place]) for place in labelled},
        unlabelled=unlabelled,
        repeated=places[3][0],
        metered=dict(zip(places[5][: sizes.metered // 2], map(int, kinds), strict=False)),
        unmetered=places[5][sizes.metered // 2 :],
        seed=seed,
    )
    truth = {
        "tokens": np.concatenate([prompt[sizes.prefix :] for prompt in victims]),
        "again": again,
        "told": np.concatenate([one.text[sizes.prefix :] for one in told.values()]),
        "unlabelled": secret,
        "linked": (secret[1:] == secret[:-1]).astype(np.int64),
        "prompt lengths": np.array([len(prompt) for prompt in prompts]),
        "answer lengths": np.array(answers),
        "kinds": kinds[sizes.metered // 2 :],
    }
    return Script(prompts, tuple(answers), truth, knowledge)


def _told(text: Ints, sizes: Sizes, vocabulary: int, rng: np.random.Generator) -> Told:
    """Each token among words drawn beside it, in order: which of them it is, nothing tells."""
    pools = []
    for token in text[sizes.prefix :]:
        others = rng.choice(vocabulary - 1, (sizes.candidates or vocabulary) - 1, replace=False)
        pools.append(np.sort(np.append(others + (others >= token), token)))
    return Told(text, np.stack(pools))
