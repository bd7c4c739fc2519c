"""The table of attacks, of schemes that are broken on purpose, and of what must come out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from evaluation.attacks import (
    block_algebra,
    cached,
    codebook,
    distinguisher,
    embedding,
    invariants,
    metadata,
    pad_algebra,
    pad_reuse,
    procrustes,
    repeated_token,
    rope_crossing,
    row_space,
    sequential,
    uniformity,
    weight_matching,
)
from evaluation.attacks.knowledge import Attack
from evaluation.attacks.view import View
from evaluation.leakage import relative_pads, relative_rotations, relative_scores
from evaluation.leakage.cells import CONTROLLED
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


@dataclass(frozen=True)
class Relative:
    """A scheme broken on purpose, made of what others recorded, and attacked by `shown_by`: one must break it."""

    name: str
    made: Callable[[Mapping[str, View], Script], View]
    shown_by: tuple[str, ...]


ATTACKS = (
    Entry("embedding", embedding.attack, "public weights"),
    Entry("invariants", invariants.attack, "public weights"),
    Entry("sequential matching", sequential.attack, "public weights, the text so far"),
    Entry("the same, free-running", sequential.free_running, "public weights, how prompts begin"),
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
    Entry("row space", row_space.attack, "public weights"),
    Entry("pad algebra", pad_algebra.attack, "public weights, known prompts"),
    Entry("pad reuse", pad_reuse.attack, "nothing"),
    Entry("uniformity", uniformity.attack, "nothing"),
    Entry("tampering", None, "wrong answers"),
    Entry("residue", None, "the worker's memory and files", optional=True),
    Entry("metadata", metadata.attack, "nothing", by_design=True),
)
BY_DESIGN = frozenset(entry.name for entry in ATTACKS if entry.by_design)

RELATIVES = (
    Relative("scores on the GPU worker", relative_scores.scores_on_gpu, ("sequential matching", "codebook")),
    Relative(
        "probabilities on the GPU worker", relative_scores.probabilities_on_gpu, ("sequential matching", "codebook")
    ),
    Relative("static rotation", relative_rotations.static_rotation, ("invariants", "procrustes", "codebook")),
    Relative("scaled permutation", relative_rotations.scaled_permutation, ("invariants", "procrustes", "codebook")),
    Relative("mixed blocks", relative_rotations.mixed_blocks, ("block algebra", "cache, no model", "codebook")),
    Relative("rows mixed, orthogonal", relative_pads.turned_rows, ("row space",)),
    Relative("rows mixed", relative_pads.mixed_rows, ("row space",)),
    Relative("pads from a real pool", relative_pads.real_pool, ("pad algebra",)),
    Relative("pads from a pool in the ring", relative_pads.ring_pool, ("pad algebra",)),
    Relative("a pad reused once", relative_pads.reused_once, ("pad reuse",)),
)

# What published attacks are worth, and so the least that these must recover: scheme, attack, share.
BARS = (
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
HOLDS = (("kv-shield --seal-idle", "cache at rest"),)
