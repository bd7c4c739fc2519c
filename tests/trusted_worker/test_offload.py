"""GpuWorker against servers that misbehave in every way: bounded, one error each, and the next call starts afresh."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.trusted_worker.fake_gpu_worker import PRIVATE, Behaviour, Frames, Server, answer, ask, doubled
from trusted_worker.offload import GpuWorker
from wire import channel, codec, stream_socket
from wire.errors import (
    CleaveError,
    ContextError,
    DeadlineError,
    ExhaustedError,
    UnavailableError,
    VerificationError,
)
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import tensor_pb2

RING = pb.Operation(ring_matmul=pb.RingMatmul(layer=0, linear=pb.LINEAR_QKV))
FORWARD = pb.Operation(forward=pb.Forward())
CACHE = pb.Operation(cache=pb.Cache(sequence=1, reserve=pb.Reserve(tokens=4, type=pb.KV_TYPE_FLOAT32)))
X = np.arange(12, dtype=np.int32).reshape(3, 4)
INT32, FLOAT32 = tensor_pb2.DTYPE_INT32, tensor_pb2.DTYPE_FLOAT32


REFUSALS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExhaustedError,
    grpc.StatusCode.OUT_OF_RANGE: ContextError,
    grpc.StatusCode.INVALID_ARGUMENT: UnavailableError,
}


@pytest.fixture(params=["grpc", "stream"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path, request.param)
    yield one
    one.released.set()
    one.stop()


@pytest.fixture
def worker(server: Server) -> Iterator[GpuWorker]:
    one = server.client(seconds=30.0)
    yield one
    one.close()


def test_an_answer_fills_the_array_that_was_given_and_nothing_else(worker: GpuWorker, server: Server) -> None:
    memory = np.full((5, 4), -7, np.int32)
    worker.call(RING, X, memory[1:4])
    assert (memory[1:4] == 2 * X).all()
    assert (memory[[0, 4]] == -7).all()
    memory += 1
    worker.call(RING, X, memory[1:4])
    assert (memory[1:4] == 2 * X).all()
    assert (server.loads, server.streams) == (["tiny"], 1)


def test_tensors_of_any_number_of_frames(worker: GpuWorker) -> None:
    for columns in (0, 1, codec.FRAME_BYTES // 4 - 1, codec.FRAME_BYTES // 4, codec.FRAME_BYTES // 4 + 1, 700_000):
        x = np.arange(columns, dtype=np.int32).reshape(1, columns)
        assert (ask(worker, RING, x, (1, columns)) == 2 * x).all()


@pytest.mark.parametrize("microseconds", [300, 5000])
def test_a_world_switch_is_charged_to_each_exchange(server: Server, microseconds: int) -> None:
    worker = server.client(switch_us=microseconds)
    for _ in range(3):
        assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    assert worker.traffic.seconds >= 3 * microseconds / 1e6
    assert worker.traffic.exchanges == 3
    worker.close()


def test_what_either_worker_computes_in_is_no_transport(worker: GpuWorker, server: Server) -> None:
    y = np.empty((3, 4), np.int32)
    worker.call(RING, X, y, lambda: time.sleep(0.02))
    assert worker.traffic.seconds - worker.traffic.transport.sum >= 0.02
    before = worker.traffic.transport.sum
    server.behaviour = claiming
    worker.call(RING, X, y)
    assert worker.traffic.transport.sum == before  # a claim that is too long is no credit
    server.behaviour = refusing
    with pytest.raises(ContextError):
        worker.call(RING, X, y)
    assert (sum(worker.traffic.transport.counts), worker.traffic.exchanges) == (2, 2)


def claiming(number: int, array: codec.Array | None) -> Frames:
    """More time than there was."""
    first, *rest = doubled(number, array)
    first.compute_us = (1 << 32) - 1
    return [first, *rest]


def refusing(number: int, array: codec.Array | None) -> Frames:
    return [pb.ExecuteResponse(id=number, refused=grpc.StatusCode.OUT_OF_RANGE.value[0])]


def test_traffic_is_counted_in_serialised_bytes(worker: GpuWorker, server: Server) -> None:
    for count in (1, 2):
        ask(worker, RING, X, (3, 4))
        assert worker.traffic.exchanges == count
    request = pb.ExecuteRequest(id=1, operation=RING, header=codec.header_of(X), data=X.tobytes())
    assert worker.traffic.bytes_up == 2 * _bytes(server, request)
    assert worker.traffic.bytes_down == 2 * _bytes(server, doubled(1, X)[0])


def _bytes(server: Server, frame: pb.ExecuteRequest | pb.ExecuteResponse) -> int:
    """On the socket, data follow a message that has none: their tag and length are replaced by the prefix."""
    if server.stream is None:
        return frame.ByteSize()
    data = len(frame.data)
    frame.ClearField("data")
    return stream_socket.PREFIX_BYTES + frame.ByteSize() + data


def test_a_call_without_tensors(worker: GpuWorker) -> None:
    worker.call(CACHE, None, None)
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()


def test_forward_answers_in_float32(worker: GpuWorker, server: Server) -> None:
    ids = np.array([1, 2], np.int32)
    logits = np.ones((1, 5), np.float32)
    server.behaviour = lambda number, array: answer(number, logits)
    assert (ask(worker, FORWARD, ids, (1, 5)) == logits).all()
    server.behaviour = lambda number, array: answer(number, logits.astype(np.int32))
    with pytest.raises(VerificationError):
        ask(worker, FORWARD, ids, (1, 5))


def _header(dtype: int, *shape: int) -> tensor_pb2.TensorHeader:
    return tensor_pb2.TensorHeader(dtype=dtype, shape=shape)  # type: ignore[arg-type]


def _raw(number: int, header: tensor_pb2.TensorHeader | None, *data: bytes) -> Frames:
    frames = [pb.ExecuteResponse(id=number, data=piece) for piece in data]
    if header is not None:
        frames[0].header.CopyFrom(header)
    return frames


Y = (2 * X).tobytes()
HEADER = _header(INT32, 3, 4)
LIES: dict[str, Behaviour] = {
    "an id of the future": lambda n, a: answer(n + 1, X),
    "an id of the past": lambda n, a: answer(n - 1, X),
    "rows missing": lambda n, a: answer(n, X[:2]),
    "transposed": lambda n, a: answer(n, np.ascontiguousarray(X.T)),
    "rank 3": lambda n, a: answer(n, X.reshape(1, 3, 4)),
    "float32": lambda n, a: answer(n, X.astype(np.float32)),
    "no header": lambda n, a: _raw(n, None, Y),
    "unknown dtype": lambda n, a: _raw(n, _header(99, 3, 4), Y),
    "a huge shape": lambda n, a: _raw(n, _header(INT32, 2**32 - 1, 2**32 - 1), Y),
    "one byte more": lambda n, a: _raw(n, HEADER, Y + b"x"),
    "short, then too long": lambda n, a: _raw(n, HEADER, Y[:40], Y[:40]),
    "an empty first frame": lambda n, a: _raw(n, HEADER, b"", Y),
    "an empty second frame": lambda n, a: _raw(n, HEADER, Y[:40], b"", Y[40:]),
    "another id within": lambda n, a: [*_raw(n, HEADER, Y[:40]), *_raw(n + 1, None, Y[40:])],
    "empty frames without end": lambda n, a: [pb.ExecuteResponse(id=n) for _ in range(50)],
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_of_the_wrong_form_is_one_error(worker: GpuWorker, server: Server, lie: str) -> None:
    server.behaviour = LIES[lie]
    with pytest.raises(VerificationError) as caught:
        ask(worker, RING, X, (3, 4))
    assert str(caught.value) == str(VerificationError())
    assert caught.value.__cause__ is None
    assert worker.traffic.exchanges == 0


def test_after_a_rejected_answer_the_next_call_starts_afresh(worker: GpuWorker, server: Server) -> None:
    ask(worker, RING, X, (3, 4))
    server.behaviour = LIES["rows missing"]
    with pytest.raises(VerificationError):
        ask(worker, RING, X, (3, 4))
    server.behaviour = doubled
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    assert (server.streams, len(server.loads), worker.traffic.exchanges) == (2, 2, 2)


def test_a_frame_over_the_limit_is_refused(worker: GpuWorker, server: Server) -> None:
    x = np.zeros((1, 600_000), np.int32)
    first, rest = x.tobytes()[: codec.FRAME_BYTES + 1], x.tobytes()[codec.FRAME_BYTES + 1 :]
    server.behaviour = lambda n, a: _raw(n, codec.header_of(x), first, rest)
    with pytest.raises(VerificationError):
        ask(worker, RING, x, (1, 600_000))


def test_a_message_over_the_limit_never_arrives(worker: GpuWorker, server: Server) -> None:
    server.behaviour = lambda n, a: _raw(n, HEADER, bytes(channel.MAX_MESSAGE_BYTES + 1))
    with pytest.raises(CleaveError):
        ask(worker, RING, X, (3, 4))
    server.behaviour = doubled
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()


@pytest.mark.parametrize(
    "extra",
    [lambda n: doubled(n, X), lambda n: _raw(n, None, b""), lambda n: _raw(n, HEADER, Y[:40])],
    ids=["the answer again", "an empty frame", "half an answer"],
)
def test_frames_behind_an_answer_do_not_answer_the_next_call(
    worker: GpuWorker, server: Server, extra: Callable[[int], Frames]
) -> None:
    server.behaviour = lambda n, a: doubled(n, a) + extra(n)
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    with pytest.raises(VerificationError):
        ask(worker, RING, X + 1, (3, 4))


def test_an_earlier_answer_does_not_answer_a_later_call(worker: GpuWorker, server: Server) -> None:
    """A replay carries the old id; after a reconnect ids go on, so that an old stream's answer is stale too."""
    ids: list[int] = []

    def note(number: int, array: codec.Array | None) -> Frames:
        ids.append(number)
        return doubled(number if len(ids) != 2 else ids[0], array)

    server.behaviour = note
    ask(worker, RING, X, (3, 4))
    with pytest.raises(VerificationError):
        ask(worker, RING, X, (3, 4))
    ask(worker, RING, X, (3, 4))
    assert ids == sorted(set(ids))


@pytest.mark.parametrize("behaviour", [doubled, lambda n, a: _raw(n, HEADER, Y[:40])], ids=["at once", "within"])
def test_a_closed_stream_is_unavailable(worker: GpuWorker, server: Server, behaviour: Behaviour) -> None:
    server.behaviour, server.leave_after, server.leave = behaviour, True, behaviour is doubled
    with pytest.raises(UnavailableError):
        ask(worker, RING, X, (3, 4))
    server.leave = server.leave_after = False
    server.behaviour = doubled
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNKNOWN])
def test_the_workers_status_text_goes_nowhere(worker: GpuWorker, server: Server, code: grpc.StatusCode) -> None:
    server.abort = code
    with pytest.raises(UnavailableError) as caught:
        ask(worker, RING, X, (3, 4))
    assert PRIVATE not in str(caught.value)
    assert caught.value.__cause__ is None
    server.abort = None
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()


def test_a_refused_load_is_unavailable_without_its_text(worker: GpuWorker, server: Server) -> None:
    server.refuse_load = True
    for attempt in (worker.connect, lambda: ask(worker, RING, X, (3, 4))):
        with pytest.raises(UnavailableError) as caught:
            attempt()
        assert PRIVATE not in str(caught.value)
    server.refuse_load = False
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()


@pytest.mark.parametrize("patient", [False, True])
def test_nobody_listening_is_unavailable(tmp_path: Path, patient: bool) -> None:
    worker = GpuWorker(f"unix:{tmp_path}/nobody", "tiny", pb.PRECISION_INT8, connect_seconds=0.3)
    with pytest.raises(UnavailableError, match="not available"):
        worker.connect(patient)
    with pytest.raises(UnavailableError, match="not available"):
        ask(worker, RING, X, (3, 4))
    worker.expire()
    worker.close()


class Watch:
    """Calls `expire` all the time, as the asyncio thread of the trusted worker does."""

    def __init__(self, worker: GpuWorker) -> None:
        self._worker, self._stop = worker, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self._worker.expire()


@pytest.mark.parametrize("after", [0, 1], ids=["before the answer", "within the answer"])
def test_a_worker_that_hangs_misses_its_deadline(server: Server, after: int) -> None:
    worker = server.client(seconds=0.3)
    x = np.zeros((1, 600_000), np.int32)
    server.hang, server.hang_after = True, after
    started = time.monotonic()
    with Watch(worker), pytest.raises(DeadlineError, match="in time"):
        ask(worker, RING, x, (1, 600_000))
    assert time.monotonic() - started >= 0.3
    server.hang = False
    server.released.set()
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    worker.close()


def test_expire_leaves_calls_within_their_deadline_alone(worker: GpuWorker, server: Server) -> None:
    def slowly(number: int, array: codec.Array | None) -> Frames:
        time.sleep(0.05)
        return doubled(number, array)

    server.behaviour = slowly
    worker.expire()
    with Watch(worker):
        for _ in range(3):
            assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    assert server.streams == 1


def test_expire_of_an_idle_connection_does_nothing(server: Server) -> None:
    worker = server.client(seconds=0.05)
    worker.connect()
    time.sleep(0.1)
    worker.expire()
    server.behaviour = doubled
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    assert server.streams == 1
    worker.close()


def test_a_restarted_worker_is_loaded_and_used_again(worker: GpuWorker, server: Server) -> None:
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    server.stop()
    with pytest.raises(UnavailableError):
        ask(worker, RING, X, (3, 4))
    server.start()
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    assert server.loads == ["tiny", "tiny"]


def test_close_may_be_called_at_any_time(worker: GpuWorker) -> None:
    worker.close()
    worker.close()
    worker.expire()
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    worker.close()
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()


def test_a_tensor_that_cannot_travel_leaves_the_connection_usable(worker: GpuWorker) -> None:
    with pytest.raises(CleaveError):
        ask(worker, RING, X.astype(np.float64), (3, 4))
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refused_call_leaves_the_stream_as_it_is(server: Server, worker: GpuWorker, code: grpc.StatusCode) -> None:
    worker.call(CACHE, None, None)
    stream = worker.stream
    server.behaviour = lambda number, array: [pb.ExecuteResponse(id=number, refused=code.value[0])]
    with pytest.raises(REFUSALS[code]):
        worker.call(CACHE, None, None)
    server.behaviour = doubled
    worker.call(CACHE, None, None)
    assert (worker.stream, server.streams) == (stream, 1)


def test_a_stream_that_ended_between_two_calls_is_replaced_without_an_error(server: Server, worker: GpuWorker) -> None:
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    before = worker.stream
    server.stop()
    server.start()
    deadline = time.monotonic() + 10
    while worker.stream == before:
        assert time.monotonic() < deadline
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    assert server.streams == 2


@pytest.fixture
def on_socket(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path, "stream")
    yield one
    one.released.set()
    one.stop()


def test_a_worker_that_does_not_read_misses_its_deadline(on_socket: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call waits in the kernel until expire shuts the socket."""
    worker = on_socket.client(seconds=0.3)
    worker.connect()
    x = np.zeros((256, 100_000), np.int32)

    def stall(first: pb.ExecuteRequest, rest: Iterator[pb.ExecuteRequest]) -> None:
        on_socket.released.wait(20)

    monkeypatch.setattr(on_socket, "_tensor", stall)
    with Watch(worker), pytest.raises(DeadlineError, match="in time"):
        ask(worker, RING, x, (1, 4))
    worker.close()


def test_a_refused_ticket_is_unavailable_and_the_next_one_is_new(on_socket: Server) -> None:
    worker = on_socket.client()
    on_socket.refuse_ticket = True
    with pytest.raises(UnavailableError, match="refused the stream"):
        worker.connect()
    on_socket.refuse_ticket = False
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    assert len(on_socket.tickets) == 2
    worker.close()


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_ticket_of_another_length_is_not_sent(on_socket: Server, length: int) -> None:
    on_socket.ticket_bytes = length
    with pytest.raises(VerificationError):
        on_socket.client().connect()
    assert on_socket.peers == []


def test_a_socket_that_is_not_there_is_named(on_socket: Server, tmp_path: Path) -> None:
    on_socket.stream = f"unix:{tmp_path}/nothing"
    with pytest.raises(UnavailableError, match=f"{tmp_path}/nothing"):
        on_socket.client().connect()


JUNK = {
    "no message": b"\x03\0\0\0\0\0\0\0\xff\xff\xff",
    "a message over the limit": b"\xff\xff\xff\xff\0\0\0\0",
    "data over the limit": b"\0\0\0\0\xff\xff\xff\xff",
    "data in the message": stream_socket.pack(answer(1, 2 * X)[0]),
    "a refusal with data": stream_socket.pack(pb.ExecuteResponse(id=1, refused=3), 4) + b"1234",
}


@pytest.mark.parametrize("junk", JUNK)
def test_junk_on_the_socket_is_one_error(on_socket: Server, junk: str) -> None:
    worker = on_socket.client()
    worker.connect()

    def babble(number: int, array: codec.Array | None) -> Frames:
        on_socket.peers[-1].sendall(JUNK[junk])
        return []

    on_socket.behaviour = babble
    with pytest.raises(VerificationError):
        ask(worker, RING, X, (3, 4))
    on_socket.behaviour = doubled
    assert (ask(worker, RING, X, (3, 4)) == 2 * X).all()
    worker.close()


def test_a_status_that_does_not_exist_is_unavailable(on_socket: Server) -> None:
    worker = on_socket.client()
    on_socket.behaviour = lambda number, array: [pb.ExecuteResponse(ended=4_000_000_000)]
    with pytest.raises(UnavailableError, match="UNKNOWN"):
        ask(worker, RING, X, (3, 4))
    worker.close()
