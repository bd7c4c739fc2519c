"""The confidential channel: what goes in comes out, once, in order, in frames of four sizes; all else is refused."""

from collections.abc import Callable
from typing import Any

import pytest
from Crypto.Cipher import AES
from hypothesis import given, settings
from hypothesis import strategies as st

from wire import sealing
from wire.errors import CleaveError, InvalidArgumentError, SealError, UnauthenticatedError
from wire.sealing import MAX_SEEN, SIZES, ClientCall, Receiver, WorkerCall
from wire.v1 import trusted_worker_pb2 as pb

CASES = settings(deadline=None, max_examples=60, derandomize=True)
NAME, SECRET = b"n" * 16, b"s" * 32
FRAME = pb.DecodeRequest(token_ids=[1, 2, 3], credit=4)


def pair(receiver: Receiver, session: bool = True) -> tuple[ClientCall, WorkerCall]:
    """Both halves of a call whose first frame has arrived."""
    call = ClientCall(receiver.public_key, "Decode", *((NAME, SECRET) if session else ()))
    worker, message = receiver.accept(
        copied(call.wrap(FRAME)), "Decode", pb.DecodeRequest, (lambda _: SECRET) if session else None
    )
    assert message == FRAME
    return call, worker


def copied(frame: pb.Sealed) -> pb.Sealed:
    """As it comes out of the network."""
    return pb.Sealed.FromString(frame.SerializeToString())


def token(number: int) -> pb.DecodeResponse:
    return pb.DecodeResponse(token=pb.Token(token_id=number))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=5000), st.integers(0, 2**32 - 1), st.binary(max_size=5000))
@CASES
def test_messages_come_out_as_they_went_in(ids: list[int], credit: int, embeddings: bytes) -> None:
    client, worker = pair(Receiver())
    message = pb.DecodeRequest(token_ids=ids, credit=credit, end_turn=bool(credit % 2), embeddings=embeddings)
    assert worker.open(copied(client.wrap(message)), pb.DecodeRequest) == message
    for number in range(3):
        assert client.open(copied(worker.wrap(token(number))), pb.DecodeResponse) == token(number)


@given(st.integers(0, 70_000), st.booleans(), st.booleans())
@CASES
def test_frames_have_one_of_four_sizes(length: int, session: bool, embedded: bool) -> None:
    client, worker = pair(Receiver(), session)
    large = pb.DecodeRequest(embeddings=bytes(length + embedded * (1 << 20)))
    for one in (large, pb.DecodeRequest()):
        try:
            size = len(client.wrap(one).SerializeToString())
        except InvalidArgumentError:
            assert length > SIZES[-1] - (1 << 20) - 200
            continue
        assert size == min(limit for limit in SIZES if limit >= size) in SIZES
    answers = [worker.wrap(pb.UploadResponse(adapter=bytes(length))), worker.wrap(pb.CloseResponse())]
    assert {len(frame.SerializeToString()) for frame in answers} <= set(SIZES)


def test_all_frames_of_short_messages_look_alike() -> None:
    receiver = Receiver()
    client, worker = pair(receiver)
    frames = [ClientCall(receiver.public_key, "Open").wrap(pb.OpenRequest(model="m" * 90))]
    frames += [client.wrap(pb.DecodeRequest(token_ids=range(count))) for count in range(100)]
    frames += [worker.wrap(token(number)) for number in range(100)]
    frames += [worker.wrap(pb.DecodeResponse(final=pb.Final(context_tokens=7)))]
    assert {len(frame.SerializeToString()) for frame in frames} == {SIZES[0]}


def test_nothing_of_a_message_lies_in_its_frame() -> None:
    text = b"attack at dawn, attack at dawn"
    client, worker = pair(Receiver())
    assert text[:8] not in client.wrap(pb.DecodeRequest(embeddings=text)).SerializeToString()
    assert text[:8] not in worker.wrap(pb.UploadResponse(adapter=text)).SerializeToString()


def test_equal_messages_are_different_frames_in_every_call() -> None:
    receiver = Receiver()
    bodies = [worker.wrap(token(1)).body for _ in range(5) for worker in [pair(receiver)[1]]]
    client, _ = pair(receiver)
    bodies += [client.wrap(FRAME).body for _ in range(5)]
    assert len(set(bodies)) == 10


@pytest.mark.parametrize("change", ["body", "truncated", "extended", "empty", "enc", "session", "nonce"])
def test_a_changed_frame_in_a_stream_is_refused(change: str) -> None:
    client, worker = pair(Receiver())
    frame = client.wrap(FRAME)
    if change == "body":
        frame.body = bytes([frame.body[0] ^ 1]) + frame.body[1:]
    elif change == "enc":
        frame.enc = bytes(32)
    elif change == "session":
        frame.session = NAME
    elif change == "nonce":
        frame.nonce = bytes(32)
    else:
        frame.body = {"truncated": frame.body[:-1], "extended": frame.body + b"\0", "empty": b""}[change]
    with pytest.raises(SealError) as caught:
        worker.open(frame, pb.DecodeRequest)
    assert str(caught.value) == SealError.TEXT


@pytest.mark.parametrize(
    "change", ["body", "truncated", "extended", "empty", "nonce", "no nonce", "second nonce", "enc"]
)
def test_a_changed_answer_is_refused(change: str) -> None:
    client, worker = pair(Receiver())
    frame = worker.wrap(token(1))
    if change == "second nonce":
        client.open(frame, pb.DecodeResponse)
        frame = worker.wrap(token(2))
        frame.nonce = bytes(32)
    elif change == "body":
        frame.body = frame.body[:-1] + bytes([frame.body[-1] ^ 128])
    elif change == "nonce":
        frame.nonce = bytes(32)
    elif change == "no nonce":
        frame.nonce = b""
    elif change == "enc":
        frame.enc = bytes(32)
    else:
        frame.body = {"truncated": frame.body[:-1], "extended": frame.body + b"\0", "empty": b""}[change]
    with pytest.raises(SealError):
        client.open(frame, pb.DecodeResponse)


@pytest.mark.parametrize("order", [[1], [0, 0], [0, 2], [0, 2, 1], [2, 1, 0]], ids=str)
def test_dropped_repeated_and_reordered_frames_are_refused(order: list[int]) -> None:
    client, worker = pair(Receiver())
    up = [client.wrap(FRAME) for _ in range(3)]
    down = [worker.wrap(token(number)) for number in range(3)]
    down[order[0]].nonce = down[0].nonce  # the best that somebody on the way can do
    with pytest.raises(SealError):
        _ = [worker.open(up[number], pb.DecodeRequest) for number in order]
    with pytest.raises(SealError):
        _ = [client.open(down[number], pb.DecodeResponse) for number in order]


def test_directions_methods_and_sessions_do_not_mix() -> None:
    receiver = Receiver()
    _, worker = pair(receiver)
    frame = ClientCall(receiver.public_key, "Close", NAME, SECRET).wrap(pb.CloseRequest())
    with pytest.raises(UnauthenticatedError):
        receiver.accept(frame, "Decode", pb.DecodeRequest, lambda _: SECRET)
    with pytest.raises(SealError):
        worker.open(pb.Sealed(body=worker.wrap(token(1)).body), pb.DecodeRequest)
    other = worker.wrap(token(1))
    with pytest.raises(SealError):
        pair(receiver)[0].open(other, pb.DecodeResponse)
    frame = ClientCall(receiver.public_key, "Decode", NAME, SECRET).wrap(FRAME)
    frame.session = b"m" * 16
    with pytest.raises(UnauthenticatedError):
        receiver.accept(frame, "Decode", pb.DecodeRequest, lambda _: SECRET)


@pytest.mark.parametrize("secret", [b"t" * 32, b"s" * 31 + b"t"])
def test_a_session_belongs_to_who_knows_its_secret(secret: bytes) -> None:
    receiver = Receiver()
    frame = ClientCall(receiver.public_key, "Decode", NAME, secret).wrap(FRAME)
    with pytest.raises(UnauthenticatedError):
        receiver.accept(frame, "Decode", pb.DecodeRequest, lambda _: SECRET)
    plain = ClientCall(receiver.public_key, "Decode").wrap(FRAME)  # without any secret, under the session's name
    plain.session = NAME
    with pytest.raises(UnauthenticatedError):
        receiver.accept(plain, "Decode", pb.DecodeRequest, lambda _: SECRET)


def test_both_sides_know_a_secret_that_was_not_sent() -> None:
    receiver = Receiver()
    secrets = set()
    for _ in range(3):
        client, worker = pair(receiver, session=False)
        assert client.secret == worker.secret
        secrets.add(client.secret)
    assert len(secrets) == 3


def test_a_first_frame_opens_once() -> None:
    receiver = Receiver()
    frame = ClientCall(receiver.public_key, "Open").wrap(pb.OpenRequest(model="m"))
    receiver.accept(copied(frame), "Open", pb.OpenRequest)
    with pytest.raises(UnauthenticatedError, match="repeated"):
        receiver.accept(copied(frame), "Open", pb.OpenRequest)


def test_frames_for_another_key_do_not_open() -> None:
    frame = ClientCall(Receiver().public_key, "Open").wrap(pb.OpenRequest(model="m"))
    with pytest.raises(UnauthenticatedError, match="evidence"):
        Receiver().accept(frame, "Open", pb.OpenRequest)


def test_a_full_memory_of_exchanges_takes_a_new_key_and_keeps_calls_that_are_under_way() -> None:
    receiver = Receiver(most=3)
    first = receiver.public_key
    frame = ClientCall(first, "Open").wrap(pb.OpenRequest(model="m"))
    receiver.accept(frame, "Open", pb.OpenRequest)
    client, worker = pair(receiver)
    assert receiver.public_key == first
    pair(receiver)
    assert receiver.public_key != first
    with pytest.raises(UnauthenticatedError, match="evidence"):  # also what it has forgotten
        receiver.accept(frame, "Open", pb.OpenRequest)
    assert worker.open(client.wrap(FRAME), pb.DecodeRequest) == FRAME
    assert client.open(worker.wrap(token(1)), pb.DecodeResponse) == token(1)
    pair(receiver)
    assert MAX_SEEN > 1000


def test_junk_fills_no_memory() -> None:
    receiver = Receiver(most=2)
    key = receiver.public_key
    for number in range(5):
        with pytest.raises(UnauthenticatedError):
            receiver.accept(pb.Sealed(enc=bytes([number + 1]) * 32, body=bytes(99)), "Open", pb.OpenRequest)
    assert receiver.public_key == key


@pytest.mark.parametrize("enc", [b"", bytes(31), bytes(32), bytes(33), b"\1" + bytes(31)])
def test_keys_that_are_none_are_refused_on_both_sides(enc: bytes) -> None:
    with pytest.raises(UnauthenticatedError):
        Receiver().accept(pb.Sealed(enc=enc, body=bytes(99)), "Open", pb.OpenRequest)
    with pytest.raises(CleaveError):  # all zeros and one are points of low order: anybody would know the secret
        ClientCall(enc, "Open").wrap(pb.OpenRequest())


def test_a_message_that_is_none_is_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = Receiver()
    client, worker = pair(receiver)
    lies: list[Callable[[pb.DecodeRequest], bytes]] = [
        lambda _: b"\0\0\0\2\xff\xff" + bytes(50),
        lambda _: b"\xff\xff\xff\xff" + bytes(50),
        lambda _: b"\1",
    ]
    for lie in lies:
        monkeypatch.setattr(sealing, "_pad", lambda message, frame, lie=lie: lie(message))
        with pytest.raises(InvalidArgumentError) as caught:
            worker.open(client.wrap(FRAME), pb.DecodeRequest)
        assert str(caught.value) == "malformed message"


def test_no_nonce_comes_twice_under_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cipher that either side makes, over calls, repeats, refusals and a change of the key."""
    used: list[tuple[bytes, bytes]] = []
    new: Any = AES.new

    def spy(key: bytes, mode: int, **more: bytes) -> Any:
        if mode == AES.MODE_GCM and recording:
            used.append((key, more["nonce"]))
        return new(key, mode, **more)

    recording, receiver = True, Receiver(most=6)
    monkeypatch.setattr(AES, "new", spy)
    for _ in range(5):
        call = ClientCall(receiver.public_key, "Open")
        frames = [call.wrap(pb.OpenRequest(model="m")) for _ in range(3)]
        recording = False  # opening uses the sealer's nonces, as it must
        worker, _ = receiver.accept(frames[0], "Open", pb.OpenRequest)
        with pytest.raises(UnauthenticatedError):
            receiver.accept(frames[0], "Open", pb.OpenRequest)
        with pytest.raises(SealError):
            worker.open(frames[2], pb.OpenRequest)
        worker.open(frames[1], pb.OpenRequest)
        recording = True
        for number in range(3):
            worker.wrap(token(number))
    assert len(used) == len(set(used)) == 30
