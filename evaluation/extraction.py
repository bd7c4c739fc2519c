"""How much of an adapted model an attacker reproduces: `cleave-bench --extraction`, on the demo model and its adapter.

Clients hold conversations with the adapted model, and everything that passes between the two workers is recorded: under
secure-infer, and under split, where nothing is masked. From each transcript a student is distilled (eavesdrop.py,
student.py), by the same code with the same settings; split is the control that shows that the attack works.

The score is the share of tokens, over the adapted model's own answers to questions that no attacker has seen, that the
attacker's model would have said as well. Beside the two stand who has the base only, and who has the adapter. An
attacker with a transcript may keep the base instead of his student: the better of both, by the true score, is what is
reported, and so an upper bound. Intervals are over questions: the tokens of one answer are not independent.
"""

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.attestation.policy import Policy
from client.session import Request, TrustedWorker, connect
from client.tokenizer import Tokenizer
from client.turn import Pacing
from deploy.local.child import Progress
from deploy.local.cluster import Cluster, Settings
from evaluation import eavesdrop, student
from evaluation.transcript import Exchange, Transcript
from wire.model_config import ModelConfig

ADAPTER = "captain"
PRECISION = "int8"
SCHEMES = ("secure-infer", "split")
TESTED = 60  # questions that decide the score
STEPS = 100  # of a student's training
RESAMPLES = 2000
PAD_BANK, PADS, PAD_SECONDS = "64MiB", 128, 30.0  # pads in stock before a conversation begins
MOST_CONTEXT = 256


@dataclass(frozen=True)
class Score:
    """Of one attacker. `match` and the interval are of the best that he has; `student` is what he distilled alone."""

    attacker: str
    rows: int  # recorded, over all products
    conversations: int  # read from them
    match: float
    low: float
    high: float
    student: float | None = None


def measure(folder: Path, prompts: int, progress: Progress) -> list[Score]:
    """Record, attack and score. Raises PreconditionError without peft, and CleaveError for what goes wrong."""
    student.require()
    adapter = folder / "adapters" / ADAPTER
    asked = questions(folder, prompts)
    transcripts = {scheme: record(folder, adapter, scheme, asked, progress) for scheme in SCHEMES}
    progress("asking the adapted model", 0)
    return compare(folder, adapter, transcripts, held_out(folder, TESTED), STEPS, progress)


def compare(
    folder: Path,
    adapter: Path,
    transcripts: dict[str, list[Exchange]],
    tested: Sequence[list[int]],
    steps: int,
    progress: Progress,
) -> list[Score]:
    """One row for each attacker. `tested` are prompts."""
    end, public = ModelConfig.from_hf(folder).eos, eavesdrop.PublicModel.read(folder)
    owner = student.load(folder, adapter)
    pairs = student.answer(owner, tested, end)
    base = student.hits(student.load(folder), pairs)
    scores = [_score("base only", base)]
    for scheme, exchanges in transcripts.items():
        progress(f"distilling from {scheme}", 0)
        read = eavesdrop.read(exchanges, public)
        own = student.hits(student.distil(folder, read, steps), pairs) if read else base
        best = max(own, base, key=_share)
        name = f"base and the transcript of {scheme}"
        scores.append(_score(name, best, eavesdrop.rows(exchanges), len(read), _share(own)))
    return [*scores, _score("has the adapter", student.hits(owner, pairs))]


def record(
    folder: Path, adapter: Path, scheme: str, prompts: Sequence[list[int]], progress: Progress
) -> list[Exchange]:
    """What the GPU worker sees of one conversation after the other, each with the adapter. Raises CleaveError."""
    with tempfile.TemporaryDirectory(prefix="cleave-") as private:
        kept, more = Path(private), ("--adapter-memory", "8MiB", "--prefill", "worker")
        settings = Settings(folder, scheme, PRECISION, pad_bank=PAD_BANK, device="cpu", record=kept, more=more)
        with Cluster(settings, progress) as cluster, connect(cluster.target, Policy()) as worker:
            request = Request(folder.name, scheme, PRECISION, max_context=MOST_CONTEXT, adapter=worker.upload(adapter))
            for done, prompt in enumerate(prompts):
                progress(f"recording {scheme}, conversation {done + 1} of {len(prompts)}", 0)
                if scheme == "secure-infer":
                    worker.await_pads(PADS, PAD_SECONDS, progress)
                _converse(worker, request, prompt)
        return Transcript.read(kept).exchanges


def questions(folder: Path, count: int) -> list[list[int]]:
    """Prompts of clients: first questions of exchanges of the model's and of the adapter's text; always the same."""
    files = [*sorted((folder / "text").glob("*.txt")), folder / "adapters" / f"{ADAPTER}.txt"]
    blocks = [block.splitlines() for path in files for block in path.read_text("ascii").split("\n\n")]
    asked = [block[0][2:] for block in blocks if block and block[0].startswith("? ")]
    return _prompts(folder, random.Random(0).sample(asked, min(count, len(asked))))  # noqa: S311


def held_out(folder: Path, count: int) -> list[list[int]]:
    """Prompts that decide the score: worded differently from every question in the text."""
    files = folder / "heldout.jsonl", folder / "adapters" / f"{ADAPTER}_heldout.jsonl"
    asked = [json.loads(line)["question"] for path in files for line in path.read_text("ascii").splitlines()]
    return _prompts(folder, random.Random(1).sample(asked, min(count, len(asked))))  # noqa: S311


def interval(hits: Sequence[tuple[int, int]], seed: int = 0) -> tuple[float, float]:
    """95 % of the share over resampled questions (bootstrap, percentiles)."""
    counts = np.array(hits, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(counts), (RESAMPLES, len(counts)))
    said, of = counts[picks].sum(axis=1).T
    low, high = np.percentile(said / of, [2.5, 97.5])
    return float(low), float(high)


def as_dicts(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """As they are printed with --json."""
    return [asdict(score) for score in scores]


def _converse(worker: TrustedWorker, request: Request, prompt: list[int]) -> None:
    session = worker.open(request)
    try:
        for _ in session.turn(prompt, Pacing(max_new_tokens=student.MOST_TOKENS)):
            pass
    finally:
        session.close()


def _prompts(folder: Path, asked: Sequence[str]) -> list[list[int]]:
    tokenizer = Tokenizer(folder)
    return [tokenizer.chat([{"role": "user", "content": question}]) for question in asked]


def _share(hits: Sequence[tuple[int, int]]) -> float:
    return sum(said for said, _ in hits) / sum(of for _, of in hits)


def _score(
    name: str, hits: Sequence[tuple[int, int]], rows: int = 0, conversations: int = 0, own: float | None = None
) -> Score:
    low, high = interval(hits)
    return Score(name, rows, conversations, _share(hits), low, high, own)
