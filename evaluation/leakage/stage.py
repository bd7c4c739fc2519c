"""Real processes, one scheme after the other: a client says the script, the GPU worker records."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client.attestation.policy import Policy
from client.costs import Case, cost
from client.session import Request, TrustedWorker, connect
from client.turn import Pacing
from deploy.local.child import Progress
from deploy.local.cluster import GPU_WORKER, Cluster, Settings
from evaluation.leakage import residue
from evaluation.leakage.prompts import Script
from evaluation.sizing import LEAST_BYTES
from wire.errors import UnavailableError

PAD_SECONDS = 60.0
REST_SECONDS = 10.0  # from the end of a turn until its cache is wiped
ANSWERS = "answers.json"


@dataclass(frozen=True)
class Staged:
    """One row of the matrix that real processes play."""

    name: str
    scheme: str
    precision: str
    more: tuple[str, ...] = ()  # words of the trusted worker's command line
    least: int = 1  # tokens of an answer; only with two is a cache renewed between them
    rests: bool = False  # caches are wiped when a turn is over


PLAIN, SPLIT = Staged("plain", "plain", "float32"), Staged("split", "split", "int8", ("--projections", "gpu"))
SECURE = Staged("secure-infer", "secure-infer", "int8", ("--projections", "gpu", "--prefill", "worker"))
SHIELD = Staged("kv-shield", "kv-shield", "float32")
RENEWED = Staged("kv-shield --rotate-every", "kv-shield", "float32", ("--rotate-every", "8"), least=2)
AT_REST = Staged("kv-shield --seal-idle", "kv-shield", "float32", ("--seal-idle",), rests=True)
STAGED = (PLAIN, SPLIT, SHIELD, RENEWED, AT_REST, SECURE)


def record(staged: Staged, folder: Path, script: Script, into: Path, progress: Progress) -> None:
    """The script under one scheme, one conversation after the other, into `into`. Raises CleaveError.

    Beside the recording it writes how many tokens each answer had, as an end of text may cut one short, and what is
    left of the script in the GPU worker when all of it is over.
    """
    settings = Settings(
        folder,
        staged.scheme,
        staged.precision,
        pad_bank=str(_bank_bytes(staged, script)),
        device="cpu",
        record=into,
        more=staged.more,
    )
    request = Request(folder.name, staged.scheme, staged.precision, max_context=_most(staged, script))
    answers = list[int]()

    def rest() -> None:
        if staged.rests:
            _await_wiped(into, len(answers) + 1)

    with Cluster(settings, progress) as cluster, connect(cluster.target, Policy()) as worker:
        started = time.monotonic()
        for prompt, answer in zip(script.prompts, script.answers, strict=True):
            progress(f"recording {staged.name}", time.monotonic() - started)
            if staged.scheme == "secure-infer":
                worker.await_pads(len(prompt) + answer, PAD_SECONDS, progress)
            tokens = [int(token) for token in prompt]
            answers.append(_say(worker, request, tokens, max(answer, staged.least), rest))
        residue.search(cluster.pids[GPU_WORKER], into, script)
    (into / ANSWERS).write_text(json.dumps(answers), "ascii")


def _say(worker: TrustedWorker, request: Request, prompt: list[int], answer: int, rest: Callable[[], None]) -> int:
    session = worker.open(request)
    try:
        said = sum(1 for _ in session.turn(prompt, Pacing(credit=1, max_new_tokens=answer)))
        rest()
        return said
    finally:
        session.close()


def _await_wiped(recording: Path, caches: int) -> None:
    """Until the GPU worker has noted that it wiped so many. Raises UnavailableError."""
    deadline = time.monotonic() + REST_SECONDS
    while sum(index.read_bytes().count(b'"event": "wipe"') for index in recording.glob("*.jsonl")) < caches:
        if time.monotonic() > deadline:
            raise UnavailableError("a conversation rests, and its cache on the GPU worker was not wiped")
        time.sleep(0.01)


def _bank_bytes(staged: Staged, script: Script) -> int:
    """Twice the pads of the longest conversation: half a bank is what can be waited for."""
    pads = cost(staged.scheme, Case(script.knowledge.model.config, staged.precision, 1)).pads
    return max(2 * _most(staged, script) * pads.sealed_bytes if pads else 0, LEAST_BYTES)


def _most(staged: Staged, script: Script) -> int:
    answers = (max(answer, staged.least) for answer in script.answers)
    return max(len(prompt) + answer for prompt, answer in zip(script.prompts, answers, strict=True))
