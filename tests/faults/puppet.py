"""A client process on strings: Cleave's own client code, one step for every line on stdin, one JSON line back."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, TextIO, cast

from client.attestation.policy import Policy
from client.session import Request, Session, TrustedWorker, connect
from client.turn import Pacing, Token
from wire.errors import CleaveError

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0


class Actor:
    """The part that runs in the process of its own."""

    def __init__(self, worker: TrustedWorker) -> None:
        self._worker = worker
        self._session: Session | None = None
        self._tokens: Iterator[Token] = iter(())

    def open(self, **request: Any) -> dict[str, Any]:
        """A session."""
        self._session = self._worker.open(Request(**request))
        return {}

    def say(self, ids: list[int], count: int, credit: int, timeout: float) -> dict[str, Any]:
        """Begin a turn."""
        assert self._session
        self._tokens = iter(self._session.turn(ids, Pacing(credit, count, timeout)))
        return {}

    def next(self) -> dict[str, Any]:
        """The next token."""
        token = next(self._tokens, None)
        return {"token": token.token_id if token else None}

    def rest(self) -> dict[str, Any]:
        """The turn's tokens to its end."""
        return {"tokens": [token.token_id for token in self._tokens]}

    def close(self) -> dict[str, Any]:
        """End the session, as the command line does after every error."""
        if self._session:
            self._session.close()
        return {}


class Puppet:
    """The strings. `folder` marks the process in the list of processes."""

    def __init__(self, target: str, folder: Path, log: TextIO) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.puppet", target, str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self._replies: Queue[str] = Queue()
        self._reader = Thread(target=self._read, name="puppet", daemon=True)
        self._reader.start()

    def tell(self, command: str, **arguments: Any) -> None:
        """Begin a step; `hear` has its end."""
        stdin = cast(TextIO, self.process.stdin)
        stdin.write(json.dumps([command, arguments]) + "\n")
        stdin.flush()

    def hear(self) -> dict[str, Any]:
        """What came of the oldest step: its result, or the status and text of an error."""
        reply: dict[str, Any] = json.loads(self._replies.get(timeout=PATIENCE) or '{"error": "gone"}')
        return reply

    def do(self, command: str, **arguments: Any) -> dict[str, Any]:
        """One whole step."""
        self.tell(command, **arguments)
        return self.hear()

    def end(self) -> None:
        """Kill the process, if it is still there."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._replies.put(line)
        self._replies.put("")


def main() -> None:
    """Obey until stdin ends."""
    with connect(sys.argv[1], Policy()) as worker:
        actor = Actor(worker)
        for line in sys.stdin:
            command, arguments = json.loads(line)
            try:
                reply = getattr(actor, command)(**arguments)
            except CleaveError as error:
                reply = {"error": error.code.name, "text": str(error)}
            print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
