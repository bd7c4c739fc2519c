"""What is shown of a recording, and that it is what crossed: under split, what was recorded is what is computed."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import flags
from client.flags import DEMO_MODEL
from client.gateway import exposure
from client.gateway.errors import ApiError
from client.gateway.exposure import Exposure
from client.gateway.generation import End, Model, Piece
from client.gateway.layer_zero import LayerZero
from client.gateway.requests import Order, chat
from client.session import Request
from client.tokenizer import Tokenizer
from client.turn import Token
from tests.client.gateway.stand import LONG, Running, asked, gateway
from tests.client.gateway.test_recording import HEAD, QKV, Writer
from tests.faults.fleet import until

BASE = Request("demo", "secure-infer", "int8", model_folder=DEMO_MODEL)
MODEL = Model(BASE, 1024, Tokenizer(DEMO_MODEL), 8, 60.0)
ANSWER = [40, 41, 42]


def order() -> Order:
    return chat({"messages": asked(LONG)}, BASE)


def end(reason: str, *token_ids: int) -> End:
    return End(tuple(map(token, token_ids)), reason, 1, 1, 0, 1.0, 1.0, None)  # type: ignore[arg-type]


def token(token_id: int) -> Token:
    return Token(token_id, 0.0, ())


def read(folder: Path, answer: list[int], reason: str = "eos", base: Request = BASE) -> dict[str, Any]:
    """What is shown after an answer, if there was one."""
    shown = Exposure(dataclasses.replace(MODEL, base=base), folder)
    if answer:
        trail = shown.begin(order())
        trail.add(Piece("x", (token(answer[0]),)))
        trail.add(end(reason, *answer[1:]))
    return shown.read()


def recorder(running: Running) -> list[str]:
    """The command line of the GPU worker of a gateway's own cluster."""
    pids = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
    words = [Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0") for pid in pids]
    (found,) = [line for line in words if "--record" in line]
    return found


def segments(running: Running) -> list[Path]:
    """The tensors that it has recorded."""
    words = recorder(running)
    return sorted(Path(words[words.index("--record") + 1]).glob("*.bin"))


@pytest.mark.parametrize(
    ("answer", "reason", "fed", "rows"),
    [
        (ANSWER, "eos", ANSWER, 14),
        (ANSWER, "length", ANSWER[:-1], 13),
        (ANSWER * 9, "eos", ANSWER * 9, exposure.ROWS),
    ],
)
def test_the_last_rows_stand_beside_those_of_split(
    tmp_path: Path, answer: list[int], reason: str, fed: list[int], rows: int
) -> None:
    writer, words = Writer(tmp_path), np.random.default_rng(5).integers(-(1 << 31), 1 << 31, (40, 256), np.int64)
    for row in words.astype(np.int32):
        writer.call(QKV, row[None])
    writer.call(HEAD, words[:1].astype(np.int32), np.zeros((1, 2048), np.int32))
    shown = read(tmp_path, answer, reason)
    recorded, computed = shown["recorded"], shown["computed"]
    ids = [*MODEL.tokenizer.chat(asked(LONG)), *fed][-exposure.ROWS :]
    assert recorded["rows"] == computed["rows"] == len(ids) == rows
    assert recorded["first"] == [f"{word & 0xFFFFFFFF:08x}" for word in words[-1, : exposure.WORDS].tolist()]
    assert recorded["top_bytes"] == np.bincount((words[-rows:] >> 24 & 255).ravel(), minlength=256).tolist()
    assert computed["reading"] == [MODEL.tokenizer.spelling(one) for one in ids]
    assert sum(computed["top_bytes"]) == 256 * len(ids) == computed["top_bytes"][0] + computed["top_bytes"][255]
    right = LayerZero(DEMO_MODEL, "int8").sent(ids)[-1, : exposure.WORDS].tolist()
    assert computed["first"] == [f"{word & 0xFFFFFFFF:08x}" for word in right]
    assert recorded["reading"] != computed["reading"]
    assert [one["product"] for one in shown["exchanges"]] == ["layer 0, qkv"] * 7 + ["lm_head"]
    assert shown["exchanges"][-1]["bytes_down"] == 4 * 2048


def test_before_the_first_answer_there_is_nothing_to_compare(tmp_path: Path) -> None:
    assert read(tmp_path / "none", [])["recorded"] is None
    Writer(tmp_path).call(QKV, np.ones((2, 256), np.int32))
    shown = read(tmp_path, [])
    assert (shown["recorded"]["rows"], shown["computed"], shown["why"]) == (2, None, None)


def test_without_a_recording_it_says_how_to_get_one() -> None:
    shown = Exposure(MODEL)
    shown.begin(order()).add(end("eos", *ANSWER))
    with pytest.raises(ApiError, match="make gateway") as error:
        shown.read()
    assert error.value.status == 404
    assert shown._trail.last(9, MODEL) == []  # and it keeps nothing


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    Writer(tmp_path).call(HEAD, np.ones((1, 256), np.int32))
    for base, why in (
        (dataclasses.replace(BASE, scheme="plain", precision="float32"), "the tokens themselves"),
        (dataclasses.replace(BASE, scheme="tee-only"), "no GPU worker"),
        (dataclasses.replace(BASE, model_folder=tmp_path), "not compared"),
    ):
        shown = read(tmp_path, ANSWER, base=base)
        assert shown["recorded"] is None
        assert why in shown["why"]
        assert len(shown["exchanges"]) == 1


def test_under_split_what_was_recorded_is_what_is_computed(tmp_path: Path) -> None:
    with gateway(tmp_path, "--record", "--scheme", "split") as running:
        until(running.ready)
        assert running.get("/v1/exposure")["recorded"] is None
        for most in (1000, 7):  # an answer that ends, and one that is cut off
            running.chat(max_tokens=most)
            shown = running.get("/v1/exposure")
            for field in ("rows", "first", "top_bytes", "reading"):
                assert shown["recorded"][field] == shown["computed"][field]
        assert "onion" in "".join(shown["computed"]["reading"])
        assert shown["computed"]["rows"] == 6 + len(MODEL.tokenizer.chat(asked(LONG)))
        (folder,) = {path.parent for path in segments(running)}
        assert folder.stat().st_mode & 0o777 == 0o700
        assert "--record-keep" in recorder(running)  # it does not fill the disk
        running.end()
        assert not folder.exists()


def test_the_gpu_worker_of_another_cannot_be_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flags.parse(["gateway", "--record", "--connect", "127.0.0.1:1", "--policy", "x"])
    assert "cluster of its own" in capsys.readouterr().err
