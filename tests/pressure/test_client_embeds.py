"""--embed client on a budget without room for the table: hostile rows are refused, floods are bounded."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import grpc
import numpy as np

from client.embedding import EmbeddingTable
from tests.faults.fleet import DEMO
from tests.pressure.budgets import flags_for
from tests.pressure.conftest import Answer
from tests.pressure.processes import trusted_worker
from tests.sealed import Opened, RawClient, status
from trusted_worker.server import MAX_BACKLOG
from trusted_worker.session import EMBEDDING_LIMIT
from wire.v1 import trusted_worker_pb2 as pb

PROMPT = [5 + 37 * n % 2000 for n in range(70)]
COUNT, WIDTH = 6, 1024  # bytes of a row
ROOM = 3 << 20  # of resident bytes: what a first prefill of some length leaves behind
FEW = PROMPT[:3]
SOME = 60  # rows of a frame: with their ids they fit the size below 64 KiB; 64 would be padded to a MiB
FLOOD, TRANSPORT = 32 << 20, 12 << 20  # bytes offered; and what gRPC may take before a stream stands still


def rows_of(ids: list[int]) -> bytes:
    table = EmbeddingTable(DEMO, "int8")
    try:
        return table.rows(ids)
    finally:
        table.close()


def with_element(value: float) -> bytes:
    """Rows of FEW, with one element changed."""
    values = np.frombuffer(rows_of(FEW), "<f4").copy()
    values[300] = value
    return values.tobytes()


HOSTILE = {
    "NaN": lambda: (FEW, with_element(np.nan)),
    "infinity": lambda: (FEW, with_element(np.inf)),
    "minus infinity": lambda: (FEW, with_element(-np.inf)),
    "too large": lambda: (FEW, with_element(1e6)),
    "a little too large": lambda: (FEW, with_element(np.nextafter(np.float32(EMBEDDING_LIMIT), np.float32(np.inf)))),
    "none": lambda: (FEW, b""),
    "one too few": lambda: (FEW, rows_of(FEW[1:])),
    "one too many": lambda: (FEW, rows_of(PROMPT[:4])),
    "half a row": lambda: (FEW, rows_of(FEW)[: -WIDTH // 2]),
    "not even a float": lambda: (FEW, rows_of(FEW)[:-1]),
    "where none are due": lambda: ([], rows_of(FEW)),
}


def say(raw: RawClient, session: Opened, count: int) -> list[int]:
    """An honest turn of a session in raw frames: FEW, and a row for each token that comes."""
    frames: SimpleQueue[pb.DecodeRequest | None] = SimpleQueue()
    frames.put(pb.DecodeRequest(token_ids=FEW, credit=count, embeddings=rows_of(FEW)))
    said: list[int] = []
    for response in raw.stream(session, iter(frames.get, None)):
        said.append(response.token.token_id)
        if len(said) == count:
            break
        frames.put(pb.DecodeRequest(embeddings=rows_of(said[-1:])))
    frames.put(None)
    return said


def test_hostile_rows_are_refused_and_the_session_lives(tmp_path: Path, gpu: str, answer: Answer) -> None:
    flags = flags_for(DEMO, "secure-infer", "float32", 2, "client")
    with trusted_worker(tmp_path, "secure-infer", *flags, gpu=gpu) as trusted:
        before = trusted.stats()
        assert before.embedding == "client"
        assert trusted.say(PROMPT, COUNT) == answer(PROMPT, COUNT)
        raw = RawClient(trusted.stub)
        session = raw.open(trusted.request.message())
        for name, make in HOSTILE.items():
            ids, rows = make()
            error = status(raw.stream(session, [pb.DecodeRequest(token_ids=ids, credit=1, embeddings=rows)]))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, name
            assert "embed" in error.details(), name
        assert say(raw, session, COUNT) == answer(FEW, COUNT)
        raw.close(session)
        assert trusted.serving()
        trusted.settled(before)
        assert not trusted.stats().table_scans


def test_rows_for_a_worker_that_embeds_itself_are_refused(tmp_path: Path, answer: Answer) -> None:
    with trusted_worker(tmp_path, "tee-only", *flags_for(DEMO, "tee-only", "int8", 2)) as trusted:
        before, raw = trusted.stats(), RawClient(trusted.stub)
        session = raw.open(trusted.request.message())
        for ids, rows in ((FEW, rows_of(FEW)), ([], rows_of(FEW)), (FEW, b"x")):
            frame = pb.DecodeRequest(token_ids=ids, credit=1, embeddings=rows)
            assert status(raw.stream(session, [frame])).code() is grpc.StatusCode.INVALID_ARGUMENT
        raw.close(session)
        assert trusted.say(FEW, COUNT) == answer(FEW, COUNT, "int8")
        trusted.settled(before)


def test_a_flood_of_rows_waits_outside(tmp_path: Path, long: Path) -> None:
    """Thirty-two MiB are offered to a worker that computes slowly: it takes what it computes, and little more."""
    flags = flags_for(long, "tee-only", "int8", 2, "client")
    with trusted_worker(tmp_path, "tee-only", *flags, model=long) as trusted:
        expected, before = trusted.say(FEW, COUNT), trusted.stats()
        raw, sent, enough = RawClient(trusted.stub), [0], threading.Event()
        session = raw.open(trusted.request.message())

        def frames() -> Iterator[pb.DecodeRequest]:
            some = rows_of([7] * SOME)
            while sent[0] < FLOOD and not enough.is_set():
                sent[0] += len(some)
                yield pb.DecodeRequest(token_ids=[7] * SOME, embeddings=some)

        stream = raw.stream(session, frames())
        time.sleep(1)
        assert trusted.say(FEW, COUNT) == expected
        after = trusted.stats()
        assert sent[0] <= WIDTH * (after.tokens - before.tokens) + MAX_BACKLOG + TRANSPORT
        assert after.rss <= before.rss + after.memory_budget + MAX_BACKLOG + TRANSPORT + ROOM
        enough.set()
        stream.call.cancel()
        raw.close(session)
        trusted.settled(before)
