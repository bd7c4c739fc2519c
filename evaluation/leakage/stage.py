"""Real processes, one scheme after the other: a client says the script, the GPU worker records."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from client.attestation.policy import Policy
from client.costs import Case, cost
from client.session import Request, TrustedWorker, connect
from client.turn import Pacing
from deploy.local.child import Progress
from deploy.local.cluster import Cluster, Settings
from evaluation.leakage.prompts import Script
from evaluation.sizing import LEAST_BYTES

PAD_SECONDS = 60.0
ANSWERS = "answers.json"


@dataclass(frozen=True)
class Staged:
    """One row of the matrix that real processes play."""

    name: str
    scheme: str
    precision: str
    more: tuple[str, ...] = ()  # words of the trusted worker's command line


PLAIN, SPLIT = Staged("plain", "plain", "float32"), Staged("split", "split", "int8", ("--projections", "gpu"))
SECURE = Staged("secure-infer", "secure-infer", "int8", ("--projections", "gpu", "--prefill", "worker"))
SHIELD = Staged("kv-shield", "kv-shield", "float32")
STAGED = (PLAIN, SPLIT, SHIELD, SECURE)


def record(staged: Staged, folder: Path, script: Script, into: Path, progress: Progress) -> None:
    """The script under one scheme, one conversation after the other, into `into`. Raises CleaveError.

    Beside the recording it writes how many tokens each answer had: an end of text may cut one short.
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
    request = Request(folder.name, staged.scheme, staged.precision, max_context=_most(script))
    answers = []
    with Cluster(settings, progress) as cluster, connect(cluster.target, Policy()) as worker:
        started = time.monotonic()
        for prompt, answer in zip(script.prompts, script.answers, strict=True):
            progress(f"recording {staged.name}", time.monotonic() - started)
            if staged.scheme == "secure-infer":
                worker.await_pads(len(prompt) + answer, PAD_SECONDS, progress)
            answers.append(_say(worker, request, [int(token) for token in prompt], answer))
    (into / ANSWERS).write_text(json.dumps(answers), "ascii")


def _say(worker: TrustedWorker, request: Request, prompt: list[int], answer: int) -> int:
    session = worker.open(request)
    try:
        return sum(1 for _ in session.turn(prompt, Pacing(credit=1, max_new_tokens=answer)))
    finally:
        session.close()


def _bank_bytes(staged: Staged, script: Script) -> int:
    """Twice the pads of the longest conversation: half a bank is what can be waited for."""
    pads = cost(staged.scheme, Case(script.knowledge.model.config, staged.precision, 1)).pads
    return max(2 * _most(script) * pads.sealed_bytes if pads else 0, LEAST_BYTES)


def _most(script: Script) -> int:
    return max(len(prompt) + answer for prompt, answer in zip(script.prompts, script.answers, strict=True))
