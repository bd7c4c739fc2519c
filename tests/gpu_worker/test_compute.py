"""The compute thread: one thing at a time, in order, sockets between commands, and an end."""

import socket
import threading
import time
from concurrent.futures import CancelledError
from selectors import EVENT_READ
from typing import Any

import pytest

from gpu_worker.compute import Compute


def make_nothing() -> Any:
    raise AssertionError


class Echo:
    """A talker that counts."""

    def __init__(self, own: socket.socket, deadline: float | None = None) -> None:
        self.own, self.deadline, self.turns, self.late, self.closed = own, deadline, 0, False, threading.Event()

    def fileno(self) -> int:
        return self.own.fileno()

    def go_on(self) -> int:
        self.turns += 1
        data = self.own.recv(1)
        if not data:
            return 0
        self.own.sendall(data)
        return EVENT_READ

    def give_up(self) -> None:
        self.late = True

    def close(self) -> None:
        self.own.close()
        self.closed.set()


def test_commands_run_in_order_in_one_thread() -> None:
    compute = Compute(make_nothing)
    seen: list[int] = []
    threads = []
    for number in range(20):
        compute.submit(seen.append, number)
        threads.append(compute.submit(threading.get_ident))
    assert len({one.result(10) for one in threads}) == 1
    assert seen == list(range(20))
    compute.stop()


def test_what_a_command_raises_is_its_own() -> None:
    compute = Compute(make_nothing)
    with pytest.raises(ZeroDivisionError):
        compute.submit(lambda: 1 // 0).result(10)
    assert compute.submit(lambda: 4).result(10) == 4
    compute.stop()


def test_commands_and_sockets_take_turns() -> None:
    compute = Compute(make_nothing)
    own, peer = socket.socketpair()
    talker = Echo(own)
    compute.submit(compute.attend, talker).result(10)
    with peer:
        go = threading.Event()
        compute.submit(go.wait, 10)  # until everything is there that wants a turn
        peer.sendall(b"x" * 50)
        turns = [compute.submit(lambda: talker.turns) for _ in range(5)]
        go.set()
        assert [turn.result(10) for turn in turns] in ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])
        got = b""
        while len(got) < 50:
            got += peer.recv(50)
    assert talker.closed.wait(10)
    assert not talker.late
    compute.stop()


def test_a_talker_over_its_deadline_is_given_up() -> None:
    compute = Compute(make_nothing)
    own, peer = socket.socketpair()
    talker = Echo(own, time.monotonic() + 0.1)
    with peer:
        compute.submit(compute.attend, talker).result(10)
        assert talker.closed.wait(10)
    assert talker.late
    compute.stop()


def test_a_thread_that_had_no_time_does_not_blame_the_talker() -> None:
    compute = Compute(make_nothing)
    own, peer = socket.socketpair()
    talker = Echo(own, time.monotonic() + 0.2)
    with peer:
        compute.submit(compute.attend, talker)
        begun, heard = threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            heard.wait(10)
            time.sleep(0.3)

        busy = compute.submit(work)
        assert begun.wait(10)
        peer.sendall(b"xy")
        heard.set()
        busy.result(10)
        assert [peer.recv(1), peer.recv(1)] == [b"x", b"y"]
    assert talker.closed.wait(10)
    compute.stop()


def test_stop_cancels_what_waits_and_closes_what_is_open() -> None:
    compute = Compute(make_nothing)
    own, peer = socket.socketpair()
    talker, going, go = Echo(own), threading.Event(), threading.Event()
    compute.submit(compute.attend, talker).result(10)

    def work() -> bool:
        going.set()
        return go.wait(10)

    running = compute.submit(work)
    waiting = compute.submit(lambda: 1)
    going.wait(10)
    compute.stop()
    compute.stop()
    go.set()
    assert running.result(10)
    with pytest.raises(CancelledError):
        waiting.result(10)
    with peer:
        assert talker.closed.wait(10)
    with pytest.raises(CancelledError):
        compute.submit(lambda: 1).result(10)


def test_at_once_is_in_the_thread_that_asks() -> None:
    compute = Compute(make_nothing)
    assert compute.at_once(threading.get_ident) == threading.get_ident()
    assert compute.submit(threading.get_ident).result(10) != threading.get_ident()
    while (seen := compute.at_once(threading.get_ident)) is None:  # it has told its result and still winds up
        time.sleep(0.001)
    assert seen == threading.get_ident()
    compute.stop()


def test_nothing_is_done_at_once_while_the_compute_thread_is_at_work_or_after_the_end() -> None:
    compute = Compute(make_nothing)
    begun, go, seen = threading.Event(), threading.Event(), list[int]()

    def work() -> bool:
        begun.set()
        return go.wait(10)

    running = compute.submit(work)
    assert begun.wait(10)
    assert compute.at_once(seen.append, 1) is None
    go.set()
    assert running.result(10)
    compute.stop()
    assert compute.at_once(seen.append, 2) is None
    assert not seen


def test_the_compute_thread_waits_for_what_is_done_at_once() -> None:
    compute = Compute(make_nothing)
    compute.submit(lambda: None).result(10)
    seen: list[str] = []

    def work() -> bool:
        compute.submit(seen.append, "then")
        time.sleep(0.1)
        seen.append("first")
        return True

    while not compute.at_once(work):
        time.sleep(0.001)
    compute.submit(lambda: None).result(10)
    assert seen == ["first", "then"]
    compute.stop()


def test_what_is_done_at_once_may_fail_and_the_thread_goes_on() -> None:
    compute = Compute(make_nothing)
    with pytest.raises(ZeroDivisionError):
        compute.at_once(lambda: 1 // 0)
    assert compute.submit(lambda: 4).result(10) == 4
    compute.stop()
