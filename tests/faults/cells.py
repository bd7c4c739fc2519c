"""One cell of the fault matrix: bring a conversation to a moment, strike, and say what the others made of it."""

import itertools
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tests.faults.fleet import CLIENT, CLIENT_SECONDS, DEADLINES, GPU, TRUSTED, Fleet, until
from tests.faults.puppet import Puppet
from wire.errors import CleaveError

IDLE, PREFILL, DECODE = "idle", "prefill", "decode"
KILL, STOP, CUT = "kill -9", "SIGSTOP", "cut connection"
VICTIMS, MOMENTS, FAULTS = (GPU, TRUSTED, CLIENT), (IDLE, PREFILL, DECODE), (KILL, STOP, CUT)

SHORT = [1, 380, 264, 562, 1660, 407, 1186, 17, 3, 2]  # the demo model says 46 tokens to this
LONG = [5 + 37 * n % 2000 for n in range(150)]  # three steps of prefill
COUNT = 24
IMPATIENT = 1.0  # `--timeout` of a client whose trusted worker is stopped
STOPPED = 1.5 * max(DEADLINES["step"], DEADLINES["session"])
WINDOW = 32


@dataclass(frozen=True)
class Cell:
    """Who, when, what."""

    victim: str
    moment: str
    fault: str

    def __str__(self) -> str:
        return f"{self.victim}, {self.moment}, {self.fault}"


class Trial:
    """A cell on a fleet. `expected` are the answers to LONG and SHORT without any fault."""

    def __init__(self, fleet: Fleet, cell: Cell, expected: dict[str, list[int]]) -> None:
        self._fleet, self._cell, self._expected = fleet, cell, expected
        self._timeout = IMPATIENT if (cell.victim, cell.fault) == (TRUSTED, STOP) else CLIENT_SECONDS
        until(lambda: not fleet.stats().sessions)
        self._before = fleet.stats()
        self._lost = b""

    def run(self) -> str:
        """The sentence of this cell. Raises AssertionError when anything is not as it must be."""
        puppet = self._arrange()
        pids = {role: self._fleet.pid(role) for role in (GPU, TRUSTED)}
        self._strike(puppet)
        sentence = self._witness(puppet)
        self._lost = bytes(self._fleet.back.recorded or b"")
        self._undo(puppet)
        sentence += self._resumed(puppet)
        self._count()
        for role, pid in pids.items():
            restarted = (role, KILL) == (self._cell.victim, self._cell.fault)
            assert (self._fleet.pid(role) == pid) is not restarted, f"{role} was restarted"
        return sentence

    def _arrange(self) -> Puppet:
        """A client in the cell's moment; the words that cross from here on are recorded."""
        fleet = self._fleet
        self._await_pads()
        with suppress(CleaveError):
            fleet.ask(SHORT, 1)  # or the link would be held before there is a connection on it
        self._await_pads()
        puppet = fleet.puppet()
        fleet.back.recorded = bytearray()
        if self._cell.moment == IDLE:
            self._say(puppet, SHORT, 1)
            assert len(puppet.do("rest")["tokens"]) == 1
        elif self._cell.moment == PREFILL:
            fleet.back.hold()
            self._say(puppet, LONG, COUNT)
            puppet.tell("next")
            until(lambda: fleet.back.held > (1 << 12 if fleet.scheme == "secure-infer" else 64))
        else:
            self._say(puppet, SHORT, COUNT)
            assert puppet.do("next")["token"] == self._expected["short"][0]
        return puppet

    def _await_pads(self) -> None:
        until(lambda: self._fleet.scheme != "secure-infer" or self._fleet.stats().pads_in_stock > 16)

    def _say(self, puppet: Puppet, ids: list[int], count: int) -> None:
        assert puppet.do("say", ids=ids, count=count, credit=1, timeout=self._timeout) == {}

    def _strike(self, puppet: Puppet) -> None:
        fleet, cell = self._fleet, self._cell
        if cell.fault == CUT:
            for link in {GPU: [fleet.back], TRUSTED: [fleet.front, fleet.back], CLIENT: [fleet.front]}[cell.victim]:
                link.cut()
            return
        number = signal.SIGKILL if cell.fault == KILL else signal.SIGSTOP
        if cell.victim == CLIENT:
            os.kill(puppet.process.pid, number)
        else:
            fleet.signal(cell.victim, number)

    def _witness(self, puppet: Puppet) -> str:
        """What those who are left see; the back link carries again."""
        fleet, cell = self._fleet, self._cell
        fleet.back.release()
        if cell.victim == CLIENT and cell.fault != CUT:
            return self._bystander()
        began = time.monotonic()
        error = self._error(puppet)
        took = time.monotonic() - began
        limit = {GPU: DEADLINES["step"] + DEADLINES["connect"]}.get(cell.victim, self._timeout)
        assert took < limit + 4, f"reported after {took:.1f} s"
        said = f'the client gets {error["error"]}, "{error["text"]}"'
        if cell.victim == GPU:
            self._freed()
        elif cell.victim == TRUSTED and cell.fault != STOP:
            until(lambda: not fleet.back.connections)
        return said

    def _error(self, puppet: Puppet) -> dict[str, Any]:
        """The puppet goes on until it is told of the fault."""
        if self._cell.moment == PREFILL:
            return self._checked(puppet.hear())
        if self._cell.moment == IDLE:
            self._say(puppet, SHORT, COUNT)
        replies = (puppet.do("next") for _ in range(3))  # one token may have been on its way
        return self._checked(next(itertools.dropwhile(lambda reply: "error" not in reply, replies)))

    def _checked(self, reply: dict[str, Any]) -> dict[str, Any]:
        assert "error" in reply, reply
        return reply

    def _bystander(self) -> str:
        """The client is struck: another one is answered, and what it held is freed; not when it is only stopped."""
        fleet = self._fleet
        began = time.monotonic()
        assert fleet.ask(SHORT, COUNT, aside=True) == self._expected["short"]
        if self._cell.fault == KILL:
            self._freed()
            return "its session is freed, others are answered meanwhile"
        time.sleep(max(STOPPED - (time.monotonic() - began), 0))
        assert fleet.stats().sessions == 1
        return "its session waits, others are answered meanwhile"

    def _undo(self, puppet: Puppet) -> None:
        if (self._cell.victim, self._cell.fault) == (TRUSTED, STOP):
            time.sleep(STOPPED)
        if (self._cell.victim, self._cell.fault) == (CLIENT, CUT):
            self._bystander_and_freed()
        self._fleet.heal()
        if (self._cell.victim, self._cell.fault) == (CLIENT, STOP):
            os.kill(puppet.process.pid, signal.SIGCONT)

    def _bystander_and_freed(self) -> None:
        assert self._fleet.ask(SHORT, COUNT, aside=True) == self._expected["short"]
        self._freed()

    def _resumed(self, puppet: Puppet) -> str:
        """A fresh session, at the first attempt; a client that was only stopped goes on where it was."""
        cell, said = self._cell, ""
        if (cell.victim, cell.fault) == (CLIENT, STOP):
            assert self._rest(puppet) == self._expected[cell.moment]
            said = "; it goes on as if nothing had been"
        else:
            said = "; the next session is answered"
        if cell.fault != KILL or cell.victim != CLIENT:
            puppet.do("close")
        self._fleet.dismiss()
        self._freed()
        self._await_pads()
        self._fleet.back.recorded = bytearray()
        assert self._fleet.ask(LONG, COUNT) == self._expected["prefill"]
        assert self._fleet.ask(SHORT, COUNT) == self._expected["short"]
        return said

    def _rest(self, puppet: Puppet) -> list[int]:
        if self._cell.moment == IDLE:
            self._say(puppet, SHORT, COUNT)
        first = [] if self._cell.moment == IDLE else [self._expected["short"][0]]
        if self._cell.moment == PREFILL:
            first = [puppet.hear()["token"]]
        tokens: list[int] = puppet.do("rest")["tokens"]
        return [*first, *tokens]

    def _freed(self) -> None:
        """No session is left, and no memory of one."""
        used = self._before.memory_used
        until(lambda: (now := self._fleet.stats()).sessions == 0 and now.memory_used == used)

    def _count(self) -> None:
        """No pad twice: by its own count, and no words of the lost calls cross again for the same prompt."""
        now, killed = self._fleet.stats(), (self._cell.victim, self._cell.fault) == (TRUSTED, KILL)
        assert now.pads_reused == 0
        assert now.pads_issued > (0 if killed else self._before.pads_issued) or self._fleet.scheme != "secure-infer"
        if self._fleet.scheme == "secure-infer":
            again = bytes(self._fleet.back.recorded or b"")
            last = self._lost[-WINDOW * 1000 :]
            windows = [last[at : at + WINDOW] for at in range(0, len(last), 10 * WINDOW)]
            words = [window for window in windows if sum(byte > 127 for byte in window) > WINDOW // 4]  # no headers
            assert len(words) > 10
            assert not [window for window in words if window in again]
        self._fleet.back.recorded = None
