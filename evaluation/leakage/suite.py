"""The table of attacks, and what must come out: the gate."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evaluation.attacks import (
    block_algebra,
    cached,
    codebook,
    distinguisher,
    embedding,
    invariants,
    metadata,
    procrustes,
    repeated_token,
    rope_crossing,
    sequential,
    weight_matching,
)
from evaluation.attacks.knowledge import Attack, Ints
from evaluation.attacks.view import View
from evaluation.leakage import relative_rotations, relative_scores
from evaluation.leakage.cells import BROKEN, CHANCE, CONTROLLED, Cell, cell, judged, not_run
from evaluation.leakage.prompts import Script

PROTECTED, CONTROL = "secure-infer", "plain"


@dataclass(frozen=True)
class Entry:
    """One attack. `everywhere`: it can be tried on whatever is sent, so the protected scheme must have a cell of it."""

    name: str
    attack: Attack
    knowledge: str
    everywhere: bool = True
    by_design: bool = False


ATTACKS = (
    Entry("embedding", embedding.attack, "public weights"),
    Entry("invariants", invariants.attack, "public weights"),
    Entry("sequential matching", sequential.attack, "public weights, the text so far"),
    Entry("sequential matching, free-running", sequential.free_running, "public weights, how prompts begin"),
    Entry("codebook", codebook.attack, "known prompts"),
    Entry("distinguisher", distinguisher.attack, "chosen messages"),
    Entry("weight matching", weight_matching.attack, "public weights"),
    Entry("rope crossing", rope_crossing.attack, "nothing but the rule of rotation", everywhere=False),
    Entry("repeated token", repeated_token.attack, "a chosen prompt"),
    Entry("procrustes", procrustes.attack, "public weights, known prompts"),
    Entry("block algebra", block_algebra.attack, "public weights, a chosen prompt"),
    Entry("cache", cached.copied, "public weights; the cache alone", everywhere=False),
    Entry("cache, no model", cached.linked, "the cache alone", everywhere=False),
    Entry("cache at rest", cached.at_rest, "public weights; the cache at rest", everywhere=False),
    Entry("metadata", metadata.attack, "nothing", by_design=True),
)


@dataclass(frozen=True)
class Relative:
    """A scheme that is broken on purpose, made of what others recorded. One of `shown_by` must break it."""

    name: str
    made: Callable[[Mapping[str, View], Script], View]
    shown_by: tuple[str, ...]


RELATIVES: tuple[Relative, ...] = (
    Relative("scores on the GPU worker", relative_scores.scores_on_gpu, ("sequential matching",)),
    Relative("probabilities on the GPU worker", relative_scores.probabilities_on_gpu, ("sequential matching",)),
    Relative("static rotation", relative_rotations.static_rotation, ("invariants", "procrustes")),
    Relative("scaled permutation", relative_rotations.scaled_permutation, ("invariants", "procrustes")),
    Relative("mixed blocks", relative_rotations.mixed_blocks, ("block algebra",)),
)

BY_DESIGN = frozenset(entry.name for entry in ATTACKS if entry.by_design)

# What published attacks are worth, and so the least that these must recover: scheme, attack, share.
BARS: tuple[tuple[str, str, float], ...] = (
    ("kv-shield", "invariants", CONTROLLED),
    ("kv-shield", "weight matching", 0.99),
    ("kv-shield", "rope crossing", 0.99),
    ("kv-shield", "cache", CONTROLLED),
    ("kv-shield --rotate-every", "cache", CONTROLLED),
    ("kv-shield --rotate-every", "repeated token", CONTROLLED),
    ("mixed blocks", "block algebra", CONTROLLED),
    ("mixed blocks", "cache, no model", CONTROLLED),
)

# What an option protects: scheme, attack. Every cell must be at chance.
HOLDS: tuple[tuple[str, str], ...] = (("kv-shield --seal-idle", "cache at rest"),)


def attacked(
    views: Mapping[str, View],
    script: Script,
    attacks: Sequence[Entry] = ATTACKS,
    answers: Mapping[str, Ints] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Cell]:
    """Every attack on every scheme, judged. `answers`: how many tokens each answer had, by scheme."""
    cells: list[Cell] = []
    for entry in attacks:
        for scheme, view in views.items():
            truth = script.truth | ({"answer lengths": answers[scheme]} if answers and scheme in answers else {})
            progress(f"{entry.name}: {scheme}")
            started = time.perf_counter()
            findings = entry.attack(view, script.knowledge)
            seconds = (time.perf_counter() - started) / max(len(findings), 1)
            cells += [cell(scheme, entry.name, entry.knowledge, one, truth, seconds) for one in findings]
            if not findings:
                cells.append(not_run(scheme, entry.name, entry.knowledge, "nothing for it is sent or held"))
    return judged(cells, PROTECTED, CONTROL, BY_DESIGN)


def failures(
    cells: Sequence[Cell], attacks: Sequence[Entry] = ATTACKS, relatives: Sequence[Relative] = RELATIVES
) -> list[str]:
    """Why the build must not pass; nothing: it may."""

    def of(scheme: str, attack: str) -> list[Cell]:
        return [one for one in cells if (one.scheme, one.attack) == (scheme, attack)]

    def best(scheme: str, attack: str) -> float:
        return max((one.estimate for one in of(scheme, attack)), default=0.0)

    found = []
    for entry in attacks:
        mine = of(PROTECTED, entry.name)
        found += [f"{PROTECTED} is broken: {one.attack}, {one.target}" for one in mine if one.verdict == BROKEN]
        if entry.by_design:
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
