"""`cleave chat`: from flags to a conversation or a one-shot answer, over a cluster of its own or another's worker."""

import argparse
import contextlib
import sys
from pathlib import Path

from client.adapter import Adapter
from client.attestation import policy_file
from client.attestation.policy import Policy
from client.chat import Chat
from client.conversation import Conversation
from client.one_shot import answer_once
from client.session import Request, TrustedWorker, connect
from client.terminal import Progress, quiet
from client.tokenizer import Tokenizer
from client.turn import Pacing
from deploy.local.cluster import Cluster, Settings
from wire.channel import is_local
from wire.errors import CleaveError, InvalidArgumentError
from wire.model_config import ModelConfig

ADAPTER_MARGIN = 1 << 18  # bytes
PADS_SECONDS = 30.0  # longest wait of a chat for the pads of its first answer


def run(options: argparse.Namespace) -> int:
    """Chat until the user leaves, or answer once. What can be wrong with the flags is found before anything starts."""
    config = ModelConfig.from_hf(options.model)
    tokenizer = _tokenizer(options)
    token_ids = _prompt(options, tokenizer, config)
    if options.adapter:
        Adapter.read(options.adapter)
    with contextlib.ExitStack() as stack:
        cluster, worker = _worker(options, stack)
        try:
            _talk(worker, options, _request(options, config.name), tokenizer, token_ids)
        except CleaveError:
            if cluster:
                cluster.check()  # a worker that died explains itself better
            raise
    return 0


def settings(options: argparse.Namespace) -> Settings:
    """The cluster that the flags describe; only `up` says where it listens, and where its policy goes.

    Of `more`, a worker takes the last word on each thing.
    """
    listen = getattr(options, "listen", None)
    return Settings(
        model=options.model,
        scheme=options.scheme,
        precision=options.precision,
        memory_budget=options.memory_budget,
        pad_bank=options.pad_bank,
        device=options.device,
        listen=listen,
        insecure_plaintext=getattr(options, "insecure_plaintext", False),
        simulated=listen is None or is_local(listen),  # clients take such evidence from their own machine only
        policy_file=getattr(options, "policy_file", None),
        more=("--data-plane", "stream", *_adapter_memory(options), *options.more),
    )


def _adapter_memory(options: argparse.Namespace) -> list[str]:
    """What a chat's own adapter takes while it is uploaded: its file, and at most twice as much as float32."""
    folder = getattr(options, "adapter", None)
    return ["--adapter-memory", str(3 * Adapter.read(folder).size + ADAPTER_MARGIN)] if folder else []


def _talk(
    worker: TrustedWorker,
    options: argparse.Namespace,
    request: Request,
    tokenizer: Tokenizer | None,
    token_ids: list[int] | None,
) -> None:
    pacing = Pacing(options.credit, options.max_new_tokens, options.timeout)
    if token_ids is not None:
        answer_once(worker, request, token_ids, tokenizer, pacing, stops=options.stop, as_json=options.json)
    elif tokenizer is not None:
        conversation = Conversation(worker, request, tokenizer, pacing, options.stop)
        try:
            Chat(conversation).run()
        finally:
            conversation.reset()


def _worker(options: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Cluster | None, TrustedWorker]:
    """The trusted worker to talk to, and the cluster that was started for it."""
    if options.connect:
        policy = _policy(options.policy, options.insecure_unattested)
        return None, stack.enter_context(connect(options.connect, policy))
    line = Progress(sys.stderr)
    stack.callback(line.clear)
    progress = quiet if options.json else line
    cluster = stack.enter_context(Cluster(settings(options), progress))
    worker = stack.enter_context(connect(cluster.target, _policy(cluster.policy)))
    worker.await_pads(options.max_new_tokens, PADS_SECONDS, progress)
    line.clear()
    return cluster, worker


def _policy(file: Path | None, allow_unattested: bool = False) -> Policy:
    """Raises PolicyError for a file that is not accepted."""
    return Policy(allow_unattested, policy_file.load(file) if file else None)


def _request(options: argparse.Namespace, model: str) -> Request:
    return Request(
        model=model,
        scheme=options.scheme,
        precision=options.precision,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        logprobs=options.logprobs,
        max_context=options.max_context,
        perturbation=options.perturbation,
        model_folder=options.model,
        adapter=(options.served_adapter or "").encode(),
        adapter_folder=options.adapter,
    )


def _tokenizer(options: argparse.Namespace) -> Tokenizer | None:
    """The folder's tokenizer; only a prompt of token ids does without one."""
    if options.token_ids is not None and not (options.model / "tokenizer.json").is_file():
        return None
    return Tokenizer(options.model)


def _prompt(options: argparse.Namespace, tokenizer: Tokenizer | None, config: ModelConfig) -> list[int] | None:
    """The ids of a one-shot prompt; None for a conversation."""
    ids: list[int] | None = options.token_ids
    if options.prompt is not None and tokenizer:
        ids = tokenizer.chat([{"role": "user", "content": options.prompt}])
    if ids is not None and not all(token_id < config.vocabulary for token_id in ids):
        raise InvalidArgumentError(f"a token id is out of range: this model's ids are 0 to {config.vocabulary - 1}")
    return ids
