"""Real processes, one scheme after the other: a client says the script, the GPU worker records."""

from dataclasses import dataclass
from pathlib import Path

from client.attestation.policy import Policy
from client.session import Request, TrustedWorker, connect
from client.turn import Pacing
from deploy.local.child import Progress
from deploy.local.cluster import GPU_WORKER, Cluster, Settings
from evaluation.leakage import residue
from evaluation.leakage.prompts import Script

PAD_SECONDS = 60.0


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
    """The script under one scheme, one conversation after the other, into `into`; then what is left of it in the GPU
    worker. Raises CleaveError.
    """
    settings = Settings(
        folder,
        staged.scheme,
        staged.precision,
        pad_bank="256MiB" if staged.scheme == "secure-infer" else "64MiB",
        device="cpu",
        record=into,
        more=staged.more,
    )
    request = Request(folder.name, staged.scheme, staged.precision, max_context=max(map(len, script.prompts)) + 1)
    with Cluster(settings, progress) as cluster, connect(cluster.target, Policy()) as worker:
        for number, prompt in enumerate(script.prompts):
            progress(f"recording {staged.name}, prompt {number + 1} of {len(script.prompts)}", 0)
            if staged.scheme == "secure-infer":
                worker.await_pads(len(prompt) + 1, PAD_SECONDS, progress)
            _say(worker, request, [int(token) for token in prompt])
        residue.search(cluster.pids[GPU_WORKER], into, script)


def _say(worker: TrustedWorker, request: Request, prompt: list[int]) -> None:
    session = worker.open(request)
    try:
        for _ in session.turn(prompt, Pacing(max_new_tokens=1)):
            pass
    finally:
        session.close()
