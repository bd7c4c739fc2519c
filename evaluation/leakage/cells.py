"""One cell of the matrix: what an attack found under a scheme, what chance would have found, and the verdict.

Chance is exact, not estimated: answers are compared with uniformly drawn truths, so their hits are binomial. A cell is
broken when so many hits would come by chance with a probability below the family's error, shared out over all cells of
the protected scheme (Bonferroni): with 1e-6 for all of them together a build fails for nothing once in a million.
"""

from dataclasses import dataclass, replace

from evaluation.attacks.knowledge import Answers, Fact, Finding
from evaluation.leakage.prompts import Script

FAMILY_ERROR = 1e-6  # one-sided, over all cells of the protected scheme
CONTROLLED = 0.95  # what an attack must recover where nothing is protected
BROKEN, CHANCE, DESIGN, NOT_RUN = "broken", "chance", "leaks by design", "not run"


@dataclass(frozen=True)
class Cell:
    """`low` and `high`: 95 %, Clopper and Pearson. `p`: of as many hits, or more, by chance."""

    scheme: str
    attack: str
    knowledge: str
    target: str
    metric: str
    trials: int
    hits: int
    estimate: float
    chance: float
    low: float
    high: float
    p: float
    seconds: float
    verdict: str = ""
    reason: str = ""


def cell(scheme: str, attack: str, knowledge: str, finding: Finding, script: Script, seconds: float) -> Cell:
    """A cell without a verdict."""
    from scipy.stats import binomtest

    fact = _compared(finding, script) if isinstance(finding, Answers) else finding
    test = binomtest(fact.hits, fact.trials, fact.chance, "greater")
    interval = binomtest(fact.hits, fact.trials).proportion_ci(0.95, "exact")
    p = test.pvalue if fact.p is None else fact.p
    numbers = fact.trials, fact.hits, fact.hits / fact.trials, fact.chance, interval.low, interval.high, float(p)
    return Cell(scheme, attack, knowledge, fact.target, fact.metric, *numbers, seconds)


def not_run(scheme: str, attack: str, knowledge: str, reason: str) -> Cell:
    """A cell that has nothing to say, and why."""
    return Cell(scheme, attack, knowledge, "", "", 0, 0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, NOT_RUN, reason)


def judged(cells: list[Cell], protected: str, control: str, by_design: frozenset[str]) -> list[Cell]:
    """With verdicts. `by_design`: attacks on what every scheme shows.

    A cell is `chance` only if its attack broke the control: the same target there, or any target, where the control has
    no such one.
    """
    limit = threshold(cells, protected, by_design)
    worked = {(one.attack, one.target) for one in cells if one.scheme == control and one.estimate >= CONTROLLED}
    tried = {(one.attack, one.target) for one in cells if one.scheme == control}

    def verdict(one: Cell) -> Cell:
        if one.verdict == NOT_RUN:
            return one
        if one.attack in by_design:
            return replace(one, verdict=DESIGN)
        if one.p < limit:
            return replace(one, verdict=BROKEN)
        same = (one.attack, one.target)
        if same in worked or (same not in tried and one.attack in {attack for attack, _ in worked}):
            return replace(one, verdict=CHANCE)
        return replace(one, verdict=NOT_RUN, reason=f"the attack did not break {control} in this run")

    return [verdict(one) for one in cells]


def threshold(cells: list[Cell], protected: str, by_design: frozenset[str]) -> float:
    """The p below which a cell is broken."""
    family = [
        one for one in cells if one.scheme == protected and one.verdict != NOT_RUN and one.attack not in by_design
    ]
    return FAMILY_ERROR / max(len(family), 1)


def _compared(answers: Answers, script: Script) -> Fact:
    truth, said = script.truth[answers.of], answers.said
    said = said[:, None] if said.ndim == 1 else said
    if said.ndim != 2 or len(said) != len(truth):
        raise ValueError(f"{answers.target}: {answers.said.shape} answers to {truth.shape} questions")
    hits, guesses = int((said == truth[:, None]).any(axis=1).sum()), said.shape[1]
    return Fact(answers.target, f"{answers.of}, top-{guesses}", hits, len(truth), guesses / answers.pool)
