"""The table of attacks, and what must come out: the gate."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.attacks import embedding, invariants, pad_algebra, pad_reuse, row_space, uniformity
from evaluation.attacks.knowledge import Attack, Fact
from evaluation.attacks.view import View
from evaluation.leakage.cells import BROKEN, CHANCE, CONTROLLED, NOT_RUN, Cell, cell, judged, not_run
from evaluation.leakage.prompts import Script

PROTECTED, CONTROL = "secure-infer", "plain"


@dataclass(frozen=True)
class Entry:
    """One attack; None: one that is no function of a transcript, whose facts come from elsewhere.

    `everywhere`: it can be tried on whatever is sent, so the protected scheme must have a cell of it. `optional`: some
    machines do not allow it, and then no cell of it is asked for.
    """

    name: str
    attack: Attack | None
    knowledge: str
    everywhere: bool = True
    by_design: bool = False
    optional: bool = False


ATTACKS = (
    Entry("embedding", embedding.attack, "public weights"),
    Entry("invariants", invariants.attack, "public weights"),
    Entry("uniformity", uniformity.attack, "nothing"),
    Entry("pad reuse", pad_reuse.attack, "nothing"),
    Entry("pad algebra", pad_algebra.attack, "public weights, known prompts"),
    Entry("row space", row_space.attack, "public weights"),
    Entry("tampering", None, "wrong answers"),
    Entry("residue", None, "the worker's memory and files", optional=True),
)
Measured = Mapping[str, Mapping[str, list[Fact] | str]]  # by attack and scheme: facts, or why there are none
BY_DESIGN = frozenset(entry.name for entry in ATTACKS if entry.by_design)

# What published attacks are worth, and so the least that these must recover: scheme, attack, share.
BARS: tuple[tuple[str, str, float], ...] = (("kv-shield", "invariants", CONTROLLED),)


def attacked(
    views: dict[str, View], script: Script, attacks: Sequence[Entry] = ATTACKS, measured: Measured | None = None
) -> list[Cell]:
    """Every attack on every scheme, and what was measured otherwise, judged."""
    cells: list[Cell] = []
    for entry in attacks:
        if entry.attack is None:
            cells += _told(entry, (measured or {}).get(entry.name, {}), script)
            continue
        for scheme, view in views.items():
            started = time.perf_counter()
            findings = entry.attack(view, script.knowledge)
            seconds = (time.perf_counter() - started) / max(len(findings), 1)
            cells += [cell(scheme, entry.name, entry.knowledge, one, script, seconds) for one in findings]
            if not findings:
                cells.append(not_run(scheme, entry.name, entry.knowledge, "nothing for it is sent or held"))
    return judged(cells, PROTECTED, CONTROL, BY_DESIGN)


def _told(entry: Entry, facts: Mapping[str, list[Fact] | str], script: Script) -> list[Cell]:
    cells: list[Cell] = []
    for scheme, found in facts.items():
        if isinstance(found, str):
            cells.append(not_run(scheme, entry.name, entry.knowledge, found))
        else:
            cells += [cell(scheme, entry.name, entry.knowledge, one, script, 0.0) for one in found]
    return cells


def failures(
    cells: Sequence[Cell], relatives: dict[str, tuple[str, ...]], attacks: Sequence[Entry] = ATTACKS
) -> list[str]:
    """Why the build must not pass. `relatives`: schemes broken on purpose, and the attacks that must show it."""

    def of(scheme: str, attack: str) -> list[Cell]:
        return [one for one in cells if (one.scheme, one.attack) == (scheme, attack)]

    def best(scheme: str, attack: str) -> float:
        return max((one.estimate for one in of(scheme, attack)), default=0.0)

    found = []
    for entry in attacks:
        mine = of(PROTECTED, entry.name)
        found += [f"{PROTECTED} is broken: {one.attack}, {one.target}" for one in mine if one.verdict == BROKEN]
        if entry.by_design or (entry.optional and all(one.verdict == NOT_RUN for one in of(CONTROL, entry.name))):
            continue
        if best(CONTROL, entry.name) < CONTROLLED:
            found.append(f"{entry.name} recovers {best(CONTROL, entry.name):.3f} of {CONTROL}: it proves nothing")
        if entry.everywhere and not any(one.verdict == CHANCE for one in mine):
            found.append(f"{entry.name} says nothing of {PROTECTED}")
    for scheme, shown_by in relatives.items():
        if not any(one.verdict == BROKEN for attack in shown_by for one in of(scheme, attack)):
            found.append(f"{scheme} is broken on purpose, and {' and '.join(shown_by)} did not show it")
    for scheme, attack, least in BARS:
        if best(scheme, attack) < least:
            found.append(f"{attack} recovers {best(scheme, attack):.3f} of {scheme}, known to give {least}")
    return found
