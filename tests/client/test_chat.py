import io
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.attestation.policy import Policy
from client.chat import Chat
from client.conversation import Conversation
from client.session import Request, connect
from client.terminal import first_interrupt
from client.tokenizer import Tokenizer
from client.turn import Pacing
from tests.client.fake_worker import EOS, FakeWorker, Script
from wire.errors import UnavailableError

Serve = Callable[[Script], FakeWorker]
Output = pytest.CaptureFixture[str]


def converse(worker: FakeWorker, folder: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    with connect(worker.target, Policy()) as trusted:
        request = Request("tiny", "secure-infer", "int8")
        conversation = Conversation(trusted, request, Tokenizer(folder), Pacing(), [])
        try:
            Chat(conversation).run()
        finally:
            conversation.reset()


def spell(folder: Path, text: str) -> list[int]:
    return Tokenizer(folder).chat([{"role": "user", "content": text}])[1:-2]


def test_a_whole_chat(serve: Serve, folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = serve(Script(answers=[[*spell(folder, "hello"), EOS], [*spell(folder, "bye"), EOS]]))
    converse(worker, folder, "hi\n\n/stats\n/scheme\n/reset\n/nothing\nagain\n", monkeypatch)
    captured = capsys.readouterr()
    assert captured.out == "hello\nbye\n"
    assert "\x1b" not in captured.err
    for part in ("Cleave", "attestation: none (emulation)", "pads in stock", "one-time-padded", "there is no /nothing"):
        assert part in captured.err
    assert len(worker.opened) == 2  # /reset


def stats(serve: Serve, folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, **fields: object) -> str:
    """What /stats shows of such a worker."""
    converse(serve(Script(stats=fields)), folder, "/stats\n", monkeypatch)
    return capsys.readouterr().err


def test_stats_show_where_the_memory_is(
    serve: Serve, folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {
        "tee_profile": "optee\x1b[2J", "memory_locked": True, "memory_wiped_on_fork": True, "rss": 100 << 20,
        "process_limit": "rlimit-data", "process_limit_bytes": 600 << 20, "kv_pages_used": 1234,
        "kv_pages_capacity": 5678, "pages_sealed": 90, "pages_restored": 80, "spill_bytes": 3 << 20,
        "embedding": "scan", "table_scans": 17, "tiles_read": 4321, "switch_us": 25,
    }  # fmt: skip
    shown = stats(serve, folder, capsys, monkeypatch, **fields)
    for part in (
        "64.0 MiB (profile optee[2J)", "1.0 MiB / 2.0 MiB", "yes / NO", "1,234 of 5,678", "90 / 80", "3.0 MiB",
        "scan, 17 scans", "from disk, 4,321 tiles read", "25 us, as a world switch", "rlimit-data, 600.0 MiB",
        "100.0 MiB; interpreter and libraries: beside the arena, not inside it",
    ):  # fmt: skip
        assert part in shown
    assert "\x1b" not in shown


def test_stats_are_loud_about_what_is_not_done(
    serve: Serve, folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = stats(serve, folder, capsys, monkeypatch, weights_resident=True, tiles_unchecked=True)
    assert "in the budget; DIGESTS ARE NOT CHECKED" in shown
    assert "not enforced" in shown
    assert "charged" not in shown


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"projections": "gpu"}, "on the GPU worker"),
        (
            {"projections": "trusted", "projections_outside_seconds": 2e-3, "projections_inside_seconds": 5e-4},
            "in the trusted worker; a layer's take 2,000 us there and 500 us inside",
        ),
    ],
)
def test_stats_say_where_projections_are_multiplied(
    serve: Serve, folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], line: str
) -> None:
    shown = stats(serve, folder, capsys, monkeypatch, **fields).splitlines()
    assert [one.split("multiplied")[1].strip() for one in shown if "qkv and o" in one] == [line]
    assert "qkv and o" not in stats(serve, folder, capsys, monkeypatch)


def test_quit_leaves(serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = serve(Script())
    converse(worker, folder, "/quit\nhi\n", monkeypatch)
    assert not worker.opened


def test_an_error_is_told_and_the_chat_goes_on(
    serve: Serve, folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = serve(Script(answers=[[5, 5], [*spell(folder, "ok"), EOS]], fail_after=1))
    converse(worker, folder, "hi\nhi\n", monkeypatch)
    captured = capsys.readouterr()
    assert "verification failed" in captured.err
    assert captured.out.strip() == "ok"


def test_a_lost_worker_ends_the_chat(serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = serve(Script())
    monkeypatch.setattr("client.chat.note", lambda text: worker.stop())  # it goes while the banner is shown
    with pytest.raises(UnavailableError):
        converse(worker, folder, "hi\nhi\n", monkeypatch)


class _Interrupting(io.StringIO):
    """A terminal whose user presses Ctrl-C when the first letter appears."""

    pressed = False

    def write(self, text: str) -> int:
        if text.strip() and not self.pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(
    serve: Serve, folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = serve(Script(answers=[spell(folder, "x" * 100), [*spell(folder, "ok"), EOS]]))
    terminal = _Interrupting()
    monkeypatch.setattr("sys.stdout", terminal)
    converse(worker, folder, "hi\nagain\n", monkeypatch)
    first, second = terminal.getvalue().split()
    assert first.strip("x") == ""
    assert len(first) < 100
    assert second == "ok"
    assert "ended: interrupted" in capsys.readouterr().err


def test_the_second_interrupt_raises() -> None:
    calls: list[int] = []

    def presses() -> Iterator[None]:
        signal.raise_signal(signal.SIGINT)
        yield
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), first_interrupt(lambda: calls.append(1)):
        list(presses())
    assert calls == [1]
