"""The terminal chat: a line in, an answer streamed out, a status line under it.

Answers go to stdout, everything else to stderr. Ctrl-C stops an answer; a second one, Ctrl-D or /quit leaves.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

from client import report
from client.conversation import Conversation
from client.session import Request
from client.terminal import first_interrupt, harmless, note, one_line
from wire.errors import CleaveError, ContextError, UnavailableError

HELP = """\
  /stats   what the trusted worker has done since it started
  /scheme  how this conversation is protected
  /reset   forget the conversation
  /help    this list
  /quit    leave (Ctrl-D too); Ctrl-C stops an answer, twice leaves"""

_SCHEMES = {
    "secure-infer": "The GPU worker sees one-time-padded integers only; every product is verified before it is used.",
    "split": "The GPU worker multiplies in the clear: it can read the conversation. A baseline, not a protection.",
    "plain": "The whole model runs on the GPU worker, which reads the conversation. A baseline, not a protection.",
    "kv-shield": "The GPU worker can read the conversation. Only its KV cache, read alone, is hidden.",
    "tee-only": "Everything runs in the trusted worker; the GPU worker gets nothing, and no work either.",
}
_EXPOSED = "It always sees: prompt and answer lengths, when steps happen, and the shapes of the tensors."


class Chat:
    """The loop around a conversation."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._commands: dict[str, Callable[[], str]] = {
            "/stats": lambda: report.table(conversation.worker.counters()),
            "/scheme": self._scheme,
            "/reset": self._reset,
            "/help": lambda: HELP,
        }

    def run(self) -> None:
        """Talk until the user leaves. Raises UnavailableError when the trusted worker is gone."""
        note(self._banner())
        for line in _lines():
            if line == "/quit":
                return
            if line.startswith("/"):
                note(self._command(line))
            elif line:
                self._turn(line)

    def _turn(self, prompt: str) -> None:
        try:
            self._print_answer(prompt)
        except UnavailableError:
            print()
            raise
        except CleaveError as error:
            print()
            hint = "; /reset starts over" if isinstance(error, ContextError) else ""
            note(f"{one_line(str(error))} (your last message was not kept{hint})")

    def _print_answer(self, prompt: str) -> None:
        conversation = self._conversation
        with first_interrupt(lambda: conversation.answer.interrupt() if conversation.answer else None):
            for piece in conversation.ask(prompt):
                print(harmless(piece), end="", flush=True)
        print()
        if conversation.answer:
            note(report.status_line(conversation.answer, conversation.request, conversation.worker.peer))

    def _command(self, line: str) -> str:
        word = line.split(maxsplit=1)[0]
        command = self._commands.get(word)
        return command() if command else f"there is no {one_line(word)}\n{HELP}"

    def _reset(self) -> str:
        self._conversation.reset()
        return "  a new conversation"

    def _scheme(self) -> str:
        request, peer = self._conversation.request, self._conversation.worker.peer
        head = f"  {request.scheme}, {request.precision}; {report.attestation(peer)}"
        return f"{head}\n  {_SCHEMES[request.scheme]}\n  {_EXPOSED}"

    def _banner(self) -> str:
        request, peer = self._conversation.request, self._conversation.worker.peer
        return (
            f"Cleave: you are talking to {request.model}{_adapted(request)}.\n"
            f"{request.scheme} {request.precision}; {report.attestation(peer)}\n"
            f"{_SCHEMES[request.scheme]}\n"
            "/help lists the commands. Ctrl-C stops an answer, twice leaves."
        )


def _adapted(request: Request) -> str:
    name = request.adapter_folder.name if request.adapter_folder else request.adapter.decode(errors="replace")
    return f" with the adapter {one_line(name)}, which only the trusted worker sees" if name else ""


def _lines() -> Iterator[str]:
    """Lines of the user, until the end of the input or two interrupts in a row."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input)
    interrupted = False
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted or not interactive:
                return
            interrupted = True
            note("\nCtrl-C again, or Ctrl-D, leaves")
            continue
        interrupted = False
        yield line
