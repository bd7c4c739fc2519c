"""`cleave up`: both workers until stopped, and the command that talks to them.

Its evidence is simulated, which clients take from their own machine only. So only this machine may reach the trusted
worker's port, unless --insecure-plaintext says otherwise: then there is no evidence at all.
"""

import argparse
import shlex
import sys

from client import flags
from client.report import NO_TEE
from client.talk import settings
from client.terminal import Progress, note, red
from deploy.local.cluster import Cluster
from wire.channel import is_local
from wire.errors import DeniedError, InvalidArgumentError
from wire.model_config import ModelConfig


def run(options: argparse.Namespace) -> int:
    """Run until a signal ends it. Raises UnavailableError when a worker ends by itself."""
    ModelConfig.from_hf(options.model)
    if not (is_local(options.listen) or options.insecure_plaintext):
        raise DeniedError(
            f"--listen {options.listen} can be reached from other machines, whose users could not tell who answers "
            "them and reads their prompts: listen on 127.0.0.1, or add --insecure-plaintext"
        )
    if options.policy_file and not is_local(options.listen):
        raise InvalidArgumentError("--policy-file has no use where other machines connect: they get no evidence")
    progress = Progress(sys.stderr, rewrite=False)  # the workers' logs go there too
    with Cluster(settings(options), progress, log=sys.stderr) as cluster:
        progress.clear()
        print(f"serving {options.scheme} {options.precision} on {cluster.target}; stop with Ctrl-C", flush=True)
        print(f"talk to it with: {_chat_command(options, cluster)}", flush=True)
        if cluster.policy:
            note(red(NO_TEE))
        cluster.wait()
    return 0


def _chat_command(options: argparse.Namespace, cluster: Cluster) -> str:
    """The command line of a chat with this cluster, with every flag that is not the default."""
    parts = ["cleave", "chat", "--connect", cluster.target]
    if cluster.policy:
        parts += ["--policy", str(cluster.policy)]
    if options.model.resolve() != flags.DEMO_MODEL:
        parts += ["--model", str(options.model.resolve())]
    if options.scheme != flags.DEFAULT_SCHEME:
        parts += ["--scheme", options.scheme]
    if options.precision != flags.default_precision(options.scheme):
        parts += ["--precision", options.precision]
    return shlex.join(parts)
