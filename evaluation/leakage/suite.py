"""Every attack of the table on every scheme, and the gate: why a build must not pass."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from evaluation.attacks.knowledge import Fact, Ints, Knowledge
from evaluation.attacks.view import PLACES, View
from evaluation.leakage.cells import BROKEN, CHANCE, CONTROLLED, NOT_RUN, Cell, cell, judged, not_run
from evaluation.leakage.prompts import Script
from evaluation.leakage.table import ATTACKS, BARS, BY_DESIGN, CONTROL, HOLDS, PROTECTED, RELATIVES, Entry, Relative

CLEAR = "split"  # the scheme that shows the integers of secure-infer without masks
NOTHING_TO_TRY = "nothing for it is sent or held"
Measured = Mapping[str, Mapping[str, list[Fact] | str]]  # by attack and scheme: facts, or why there are none


def attacked(
    views: Mapping[str, View],
    script: Script,
    attacks: Sequence[Entry] = ATTACKS,
    measured: Measured | None = None,
    relatives: Sequence[Relative] = RELATIVES,
) -> list[Cell]:
    """All cells, judged."""
    return verdicts(tried(views, script, attacks, measured, None, relatives))


def verdicts(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, judged by the table: what is protected, what is the control, what is shown by design."""
    return judged(list(cells), PROTECTED, CONTROL, BY_DESIGN)


def tried(
    views: Mapping[str, View],
    script: Script,
    attacks: Sequence[Entry],
    measured: Measured | None = None,
    answers: Mapping[str, Ints] | None = None,
    relatives: Sequence[Relative] = RELATIVES,
) -> list[Cell]:
    """All cells, without verdicts.

    `measured` is what no transcript holds; `answers`, how many tokens each answer had, by scheme. Relatives have views
    like the others; only the attacks that are to break them are tried on them.
    """
    shown_by, cells = {one.name: one.shown_by for one in relatives}, list[Cell]()
    known = _informed(script.knowledge, views)
    for entry in attacks:
        if entry.attack is None:
            cells += _told(entry, (measured or {}).get(entry.name, {}), script)
            continue
        for scheme, view in views.items():
            if entry.name not in shown_by.get(scheme, (entry.name,)):
                continue
            truth = script.truth | ({"answer lengths": answers[scheme]} if answers and scheme in answers else {})
            started = time.perf_counter()
            findings = entry.attack(view, known)
            seconds = (time.perf_counter() - started) / max(len(findings), 1)
            cells += [cell(scheme, entry.name, entry.knowledge, one, truth, seconds) for one in findings]
            cells += [] if findings else [not_run(scheme, entry.name, entry.knowledge, NOTHING_TO_TRY)]
    return cells


def failures(
    cells: Sequence[Cell], attacks: Sequence[Entry] = ATTACKS, relatives: Sequence[Relative] = RELATIVES
) -> list[str]:
    """Why the build must not pass; nothing: it may. BARS and HOLDS are of the schemes that were tried."""

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
    for relative in relatives:
        if not any(one.verdict == BROKEN for attack in relative.shown_by for one in of(relative.name, attack)):
            found.append(f"{relative.name} is broken on purpose; not shown by {' or '.join(relative.shown_by)}")
    for scheme, attack, least in BARS:
        if best(scheme, attack) < least:
            found.append(f"{attack} recovers {best(scheme, attack):.3f} of {scheme}, known to give {least}")
    weak = [(scheme, attack) for scheme, attack in HOLDS if {one.verdict for one in of(scheme, attack)} != {CHANCE}]
    return found + [f"{scheme} does not hold against {attack}" for scheme, attack in weak]


def _informed(known: Knowledge, views: Mapping[str, View]) -> Knowledge:
    """With what enters each linear for prompts that the attacker knows: he has the program, and it is deterministic."""
    if CLEAR not in views:
        return known
    shown, inputs = views[CLEAR].prompts, [name for name, _ in PLACES.values()]
    numbers = [*known.known, *([] if known.repeated is None else [known.repeated])]
    return replace(known, clear={n: {at: rows for at, rows in shown[n].items() if at[0] in inputs} for n in numbers})


def _told(entry: Entry, facts: Mapping[str, list[Fact] | str], script: Script) -> list[Cell]:
    cells: list[Cell] = []
    for scheme, found in facts.items():
        if isinstance(found, str):
            cells.append(not_run(scheme, entry.name, entry.knowledge, found))
        else:
            cells += [cell(scheme, entry.name, entry.knowledge, one, script.truth, 0.0) for one in found]
    return cells
