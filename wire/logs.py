"""Logs of the workers: to stderr, as text or JSON lines, and only what is on a list.

A message is a template and its arguments. Templates that are not in ALLOWED are not written, whoever logs them: gRPC,
asyncio and numpy included; what is written instead names the logger and the level. So no prompt, token, activation or
key reaches a log because somebody forgot, and a new message is a change of this file. Arguments are sizes, counts,
seconds, names of models, files and schemes.
"""

import json
import logging
import os
import sys
import time

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core writes to stderr by itself; it reads this when imported

FORMATS = ("text", "json")
ALLOWED = frozenset(
    {
        "%d adapters lie on this disk in the clear",
        "%d us are charged for each exchange, as a world switch",
        "%s: chunk %d was changed, or cannot be read",
        "a call was refused: %s",
        "collateral could not be renewed: %s",
        "draining: %d answers are under way",
        "draining: %d streams are open",
        "evidence is simulated: it proves nothing, and whoever runs this machine reads prompts",
        "internal error in a step: %s",
        "internal error in a stream: %s",
        "internal error: %s",
        "internal error: %s at %s",
        "kv-shield does not protect the conversation from the GPU worker, which sees every activation: it "
        "hides the KV cache from somebody who reads nothing but the cache and does not know the model",
        "loaded %s on %s in %.1f s",
        "memory plan: %s",
        "model digest: %s",
        "process memory: %s, %d bytes",
        "projections: %s; a layer takes %d us outside, %d us inside",
        "projections: gpu; the budget holds too little beside their weights",
        "ready on %s",
        "secure memory: %d bytes, %s",
        "step failed: %s",
        "streamed weights are used without comparing their digests",
        "the kernel refused: %s",
        "the recording ends: %s",
        "what the worker may know could not be renewed: %s",
    }
)


class ListFormatter(logging.Formatter):
    """One line a record: the message of an allowed template, nothing of any other."""

    def __init__(self, role: str, form: str) -> None:
        super().__init__()
        self._role, self._json = role, form == "json"

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter. Tracebacks are left out: they quote what a library said."""
        allowed = isinstance(record.msg, str) and record.msg in ALLOWED
        message = record.getMessage() if allowed else "a message that is not on the list of what may be logged"
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        if not self._json:
            return " ".join(f"{stamp} {self._role} {record.levelname} {record.name} {message}".splitlines())
        fields = {"time": stamp, "role": self._role, "level": record.levelname, "logger": record.name}
        return json.dumps({**fields, "message": message})


def setup(role: str, form: str) -> None:
    """Everything that is logged or warned of in this process goes through the list."""
    logging.raiseExceptions = False  # a template with the wrong arguments would be shown with them
    logging.captureWarnings(True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ListFormatter(role, form))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
