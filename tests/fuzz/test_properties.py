"""What holds for every input of the codec, the seal and the reader: a value of the right form, or our error."""

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.calls import Call, CallReader
from tests.fuzz.sealed_frames import PADDED, seal
from tests.fuzz.tiny import CONFIGS
from wire.codec import MAX_RANK, MAX_TENSOR_BYTES, Assembler, byte_length, header_of
from wire.errors import CleaveError, InvalidArgumentError, SealError, UnauthenticatedError
from wire.model_config import ModelConfig
from wire.sealing import ClientCall, Receiver
from wire.v1 import gpu_worker_pb2 as pb
from wire.v1 import tensor_pb2
from wire.v1 import trusted_worker_pb2 as trusted

UINT32 = st.integers(0, (1 << 32) - 1)
MODEL: Any = SimpleNamespace(config=ModelConfig.from_dict("llama", CONFIGS["llama"], {}))
RECEIVER = Receiver()
CALL = ClientCall(RECEIVER.public_key, "Open")
quick = settings(max_examples=200, deadline=None, derandomize=True)


@quick
@given(st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=50), st.lists(st.integers(1, 60)))
def test_a_tensor_survives_any_cut(numbers: list[int], cuts: list[int]) -> None:
    array = np.array(numbers, np.int32)
    assembler, data = Assembler(header_of(array)), array.tobytes()
    for cut in cuts:
        if len(data) > cut:
            assembler.add(data[:cut])
            data = data[cut:]
    assembler.add(data)
    assert assembler.array().tobytes() == array.tobytes()
    for extra in (b"", b"1"):
        with pytest.raises(InvalidArgumentError):
            assembler.add(extra)


@quick
@given(st.integers(-5, 5), st.lists(st.one_of(st.integers(0, 300), UINT32), max_size=6))
def test_a_header_is_bounded_or_refused(dtype: int, shape: list[int]) -> None:
    header = tensor_pb2.TensorHeader(shape=shape)
    header.dtype = dtype  # type: ignore[assignment]
    fits = dtype in (1, 2) and 1 <= len(shape) <= MAX_RANK
    fits = fits and 4 * math.prod(max(extent, 1) for extent in shape) <= MAX_TENSOR_BYTES
    if fits:
        assert byte_length(header) == 4 * math.prod(shape)
    else:
        with pytest.raises(InvalidArgumentError):
            byte_length(header)


@quick
@given(
    st.one_of(st.binary(max_size=200), st.builds(lambda body: len(body).to_bytes(4, "big") + body, st.binary())),
    st.sampled_from([trusted.OpenRequest, trusted.DecodeRequest, trusted.UploadRequest]),
)
def test_whatever_a_client_seals_is_a_message_or_refused(plain: bytes, kind: Any) -> None:
    frame = trusted.Sealed.FromString(seal(ClientCall(RECEIVER.public_key, "Open"), PADDED + plain))
    with contextlib.suppress(InvalidArgumentError):
        assert isinstance(RECEIVER.accept(frame, "Open", kind)[1], kind)


@quick
@given(st.binary(max_size=600), st.binary(min_size=30, max_size=33), st.sampled_from([b"", b"1", bytes(16)]))
def test_what_nobody_sealed_does_not_open(body: bytes, number: bytes, session: bytes) -> None:
    with pytest.raises((UnauthenticatedError, InvalidArgumentError)):
        RECEIVER.accept(trusted.Sealed(body=body, enc=number, session=session), "Open", trusted.OpenRequest)
    with pytest.raises(SealError):
        CALL.open(trusted.Sealed(body=body, nonce=number), trusted.OpenResponse)


@quick
@given(st.lists(st.binary(max_size=60), max_size=4), st.booleans())
def test_a_reader_makes_calls_or_refuses(frames: list[bytes], ring_only: bool) -> None:
    reader = CallReader(ring_only)
    for data in frames:
        try:
            made = reader.add(pb.ExecuteRequest.FromString(data), MODEL)
        except (CleaveError, DecodeError):
            return
        assert made is None or isinstance(made, Call)
