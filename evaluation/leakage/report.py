"""The report in Markdown, from what --json prints: what is exposed by design, then the matrix, then every cell."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.leakage.cells import BROKEN, CHANCE, DESIGN, NOT_RUN
from evaluation.leakage.table import ATTACKS, PROTECTED, RELATIVES, Entry
from evaluation.tables import table

EXPOSED = (
    "rows of each call, and so the length of every prompt, the size of every batch, and drafted rows",
    "number and time of passes, and so the length of every answer and the speed of its making",
    "shapes of tensors, and so the architecture; which public weights are multiplied",
    "how many pads and sealed pages there are, and how large they are",
    "which rank an adapter has, through time",
)
SHORT = {BROKEN: "**broken**", CHANCE: "chance", DESIGN: "by design", NOT_RUN: "-"}
HOW_TO_READ = """\
A client says a script of random prompts under every scheme, to real workers in real processes. The GPU worker records
every call with its tensors, and what it holds (`cleave-gpu-worker --record DIR`). Each attack is given such a recording
and the knowledge that its column names, and nothing else: an import contract keeps it from the workers' code.

- A cell shows the best that an attack recovers over its targets, and the verdict. Every target has a line further down.
- **broken**: more was recovered than chance gives. Victims' tokens are drawn uniformly, so chance is known exactly; all
  cells of `{protected}` together call a sound build broken once in a million runs (one-sided, Bonferroni).
- **chance**: no more than chance, by an attack that broke `plain` in the same run. Where it did not, it is not run.
  A leak that is small for the number of trials is not seen. `{protected}` is broken by
  {seen}.
- **by design**: what every scheme shows; see the list above.
- **-**: not run: nothing is sent or held that the attack could be tried on (the reasons are in the JSON); or, below the
  line, an attack that is not meant for the scheme.
- Below the line stand schemes that are broken on purpose, some of them shaped after published ones. If one of them came
  out whole the attacks would be at fault, and the run would fail.
- Sequential matching is told each token after its answer: this bounds from above what is read in one go; free-running
  shows that nothing is lost without it. In the full tier each token is one of 256 words that the attacker is given.
- A mask's scale is no secret to whoever knows the token: the rule is public, so known text gives masks exactly.

A clean row is evidence of sound plumbing, not a proof. The proof is the pad's: uniform words, used once. What no row
here shows: microarchitectural leaks of a TEE, a second colluding worker, traffic on real networks, what the model's own
answers give away. The script is said one conversation at a time, to a trusted worker whose embedding table fits its
budget and which has pads for every row: masked lookups, batches, adapters and refused calls have tests of their own."""
SMALLEST = ("distinguisher", "codebook", "embedding")  # of which the text above says what they see


def document(result: dict[str, Any], picture: Path | None = None) -> str:
    """The whole report."""
    gate = result["gate"]
    passed = (
        "The gate is passed." if not gate["failures"] else "**The gate fails:** " + "; ".join(gate["failures"]) + "."
    )
    lines = [
        "# What the GPU worker learns",
        "",
        f"Printed by `cleave-leakage{' --quick' if result['tier'] == 'quick' else ''}`: {result['model']}, seed "
        f"{result['seed']}, {result['prompts']} prompts of {result['tokens']} tokens; {result['machine']}. {passed}",
        "",
        "## Exposed by design, under every scheme that has a GPU worker",
        "",
        *(f"- {one}" for one in result["exposed_by_design"]),
        "",
        "## The matrix",
        "",
        *([f"![The matrix as a picture]({picture.name})", ""] if picture else []),
        *matrix(result),
        "",
        "## How to read it",
        "",
        HOW_TO_READ.format(protected=PROTECTED, seen=_seen(result)),
        "",
        "## The attacks",
        "",
        *_attacks(),
        "",
        "## Every cell",
        "",
        *_every_cell(result),
    ]
    return "\n".join(lines)


def matrix(result: dict[str, Any]) -> list[str]:
    """A row for each scheme, a column for each attack."""
    attacks = ordered(result, "attack")

    def row(name: str, scheme: str) -> list[str]:
        return [name, *(_short(best(result, scheme, attack)) for attack in attacks)]

    offered, broken = schemes(result)
    rows = [row(f"`{scheme}`", scheme) for scheme in offered]
    rows += [["*broken on purpose*", *("" for _ in attacks)]] if broken else []
    return table(["scheme", *attacks], [*rows, *(row(scheme, scheme) for scheme in broken)])


def summary(result: dict[str, Any]) -> list[str]:
    """For each scheme that is offered, how many attacks broke it: the lines that the README shows."""
    rows = []
    for scheme in schemes(result)[0]:
        found = [best(result, scheme, attack) for attack in ordered(result, "attack")]
        verdicts = [one["verdict"] for one in found if one]
        counts = [str(verdicts.count(verdict)) for verdict in (BROKEN, CHANCE, NOT_RUN, DESIGN)]
        rows.append([f"`{scheme}`", *counts])
    return table(["scheme", "broken by", "no more than chance", "nothing to try it on", "shown by design"], rows)


def schemes(result: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Those that are offered, and those that are broken on purpose."""
    found, relatives = ordered(result, "scheme"), [one.name for one in RELATIVES]
    return [one for one in found if one not in relatives], [one for one in relatives if one in found]


def best(result: dict[str, Any], scheme: str, attack: str) -> dict[str, Any] | None:
    """The cell with the most above chance: a broken one, if there is one."""
    cells = [one for one in result["cells"] if (one["scheme"], one["attack"]) == (scheme, attack)]
    rank = {BROKEN: 3, DESIGN: 2, CHANCE: 1, NOT_RUN: 0}
    return max(cells, key=lambda one: (rank[one["verdict"]], one["estimate"] - one["chance"]), default=None)


def ordered(result: dict[str, Any], field: str) -> list[str]:
    """The values of a field of the cells, in the order in which they come first."""
    return list(dict.fromkeys(one[field] for one in result["cells"]))


def _seen(result: dict[str, Any]) -> str:
    """From how many hits on an attack calls the protected scheme broken."""
    said = []
    for attack in SMALLEST:
        one = best(result, PROTECTED, attack)
        if one and one["verdict"] != NOT_RUN:
            least = least_hits(one["trials"], one["chance"], result["gate"]["p_below"])
            said.append(f"{attack} from {least} hits of {one['trials']} on")
    return ", ".join(said) or "none of those that were run"


def least_hits(trials: int, chance: float, limit: float) -> int:
    """The fewest hits that chance has with a probability below the limit; more than there are trials: none do."""
    from scipy.stats import binom

    return next((hits for hits in range(trials + 1) if binom.sf(hits - 1, trials, chance) < limit), trials + 1)


def _short(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["verdict"] == NOT_RUN:
        return SHORT[NOT_RUN]
    return f"{_share(cell['estimate'])} {SHORT[cell['verdict']]}"


def _attacks() -> list[str]:
    rows = [[one.name, one.knowledge, _file(one)] for one in ATTACKS]
    return table(["attack", "what the attacker knows", "file, with source and steps"], rows)


def _file(one: Entry) -> str:
    module = one.attack.__module__ if one.attack else f"evaluation.leakage.{one.name}"
    return module.replace(".", "/") + ".py"


def _every_cell(result: dict[str, Any]) -> list[str]:
    columns = ["scheme", "attack", "target", "metric", "hits of trials", "share", "95 %", "chance", "p", "verdict"]
    return table(columns, [_line(one) for one in result["cells"] if one["verdict"] != NOT_RUN])


def _line(one: dict[str, Any]) -> Sequence[str]:
    interval = f"{_share(one['low'])} to {_share(one['high'])}"
    counts = f"{one['hits']} of {one['trials']}"
    numbers = [counts, _share(one["estimate"]), interval, f"{one['chance']:.2g}", f"{one['p']:.1g}"]
    return [one["scheme"], one["attack"], one["target"], one["metric"], *numbers, one["verdict"]]


def _share(value: float) -> str:
    if not 0 < value < 1:
        return f"{value:.0f}"
    return f"{value:.3f}".rstrip("0").rstrip(".") if 0.0005 < value < 0.9995 else "<0.001" if value < 0.5 else ">0.999"
