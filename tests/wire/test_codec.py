"""Tensors in frames: what goes in comes out, and nothing is allocated for a header that lies."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wire.codec import FRAME_BYTES, MAX_RANK, MAX_TENSOR_BYTES, Array, Assembler, byte_length, header_of, split
from wire.errors import CleaveError, InvalidArgumentError
from wire.v1 import tensor_pb2

CASES = settings(deadline=None, max_examples=100, derandomize=True)
INT32, FLOAT32 = tensor_pb2.DTYPE_INT32, tensor_pb2.DTYPE_FLOAT32

arrays = hnp.arrays(
    st.sampled_from([np.dtype("<f4"), np.dtype("<i4")]),
    hnp.array_shapes(min_dims=1, max_dims=MAX_RANK, min_side=0, max_side=6),
)


def _header(dtype: int, *shape: int) -> tensor_pb2.TensorHeader:
    return tensor_pb2.TensorHeader(dtype=dtype, shape=shape)  # type: ignore[arg-type]


def _through(array: Array) -> Array:
    wire = tensor_pb2.TensorHeader.FromString(header_of(array).SerializeToString())
    assembler = Assembler(wire)
    for frame in split(array):
        assert len(frame) <= FRAME_BYTES
        assembler.add(frame)
    assert assembler.done
    return assembler.array()


@given(arrays)
@CASES
def test_a_tensor_comes_out_as_it_went_in(array: Array) -> None:
    result = _through(array)
    assert (result.dtype, result.shape) == (array.dtype, array.shape)
    assert result.tobytes() == array.tobytes()  # bit for bit: NaNs and negative zeros too


@pytest.mark.parametrize("extra", [-1, 0, 1, FRAME_BYTES // 4 + 7])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_tensors_larger_than_a_frame(extra: int, dtype: Any) -> None:
    array = np.arange(FRAME_BYTES // 4 + extra).astype(dtype)
    frames = list(split(array))
    assert len(frames) == -(-array.nbytes // FRAME_BYTES)
    assert all(len(frame) == FRAME_BYTES for frame in frames[:-1])
    assert (_through(array) == array).all()


def test_views_travel_as_what_they_show() -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    assert (_through(array[::2, 1:4]) == array[::2, 1:4]).all()
    assert (_through(array.T) == array.T).all()


def test_an_empty_tensor_is_one_empty_frame() -> None:
    assert list(split(np.empty((3, 0), np.float32))) == [b""]


def test_the_assembled_array_is_owned_and_writable() -> None:
    source = np.arange(6, dtype=np.int32)
    frame = bytearray(source.tobytes())
    assembler = Assembler(header_of(source))
    assembler.add(frame)  # type: ignore[arg-type]
    result = assembler.array()
    frame[:] = bytes(len(frame))  # the peer's buffer changes: what was assembled does not
    assert (result == source).all()
    assert result.flags.writeable
    assert result.flags.c_contiguous
    assert result.flags.aligned
    result += 1
    assert source[0] == 0


@given(arrays)
@CASES
def test_a_tensor_fills_the_array_that_was_given(array: Array) -> None:
    memory: Any = np.full((array.size + 2,), -7, array.dtype)
    into = memory[1:-1].reshape(array.shape)
    assembler = Assembler(header_of(array), into)
    for frame in split(array):
        assembler.add(frame)
    assert into.tobytes() == array.tobytes()
    assert np.shares_memory(assembler.array(), into) or not array.size
    assert memory[0] == memory[-1] == -7


@pytest.mark.parametrize(
    "into",
    [
        np.zeros((3, 2), np.int32),
        np.zeros(6, np.int32),
        np.zeros((1, 2, 3), np.int32),
        np.zeros((2, 4), np.int32),
        np.zeros((2, 3), np.float32),
        np.zeros((2, 3), np.uint32),
        np.zeros((2, 3), ">i4"),
    ],
    ids=lambda into: f"{into.dtype.str} {into.shape}",
)
def test_a_tensor_that_was_not_asked_for_is_refused(into: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="not asked for"):
        Assembler(_header(INT32, 2, 3), into)


def test_a_large_tensor_is_copied_straight_into_its_array() -> None:
    array, into = np.ones((3, 400_000), np.int32), np.empty((3, 400_000), np.int32)
    frames = list(split(array))
    tracemalloc.start()
    try:
        assembler = Assembler(header_of(array), into)
        for frame in frames:
            assembler.add(frame)
        assert tracemalloc.get_traced_memory()[1] < 1 << 14
    finally:
        tracemalloc.stop()
    assert (into == array).all()


def test_an_array_with_gaps_cannot_be_filled() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        Assembler(_header(INT32, 2, 3), np.empty((2, 4), np.int32)[:, :3])


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint32, np.int8, np.bool_, ">f4", ">i4", np.float16])
def test_other_dtypes_do_not_travel(dtype: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="float32 and int32"):
        header_of(np.zeros(3, dtype))


BIG = 2**32 - 1
LIES = {
    "rank 0": _header(INT32),
    "rank 5": _header(INT32, 1, 1, 1, 1, 1),
    "rank 1000": _header(INT32, *[1] * 1000),
    "unspecified dtype": _header(0, 2),
    "unknown dtype": _header(3, 2),
    "negative dtype": _header(-1, 2),
    "one element too many": _header(FLOAT32, MAX_TENSOR_BYTES // 4 + 1),
    "the largest extent": _header(INT32, BIG),
    "a product beyond 32 bits": _header(INT32, 1 << 16, 1 << 16),
    "a product that is 0 modulo 2^64": _header(INT32, 1 << 31, 1 << 31, 1 << 2),
    "a product that is small modulo 2^64": _header(FLOAT32, BIG, BIG, BIG, BIG),
    "empty, but too large for an index": _header(INT32, 0, BIG, BIG, BIG),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_malformed_header_is_refused_before_anything_is_allocated(lie: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgumentError):
            Assembler(LIES[lie]).array()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_largest_tensor_is_announced() -> None:
    assert byte_length(_header(FLOAT32, MAX_TENSOR_BYTES // 4)) == MAX_TENSOR_BYTES
    assert byte_length(_header(INT32, 1 << 13, 1 << 13, 1, 1)) == MAX_TENSOR_BYTES


@given(st.lists(st.integers(0, BIG), max_size=6), st.integers(-3, 6))
@CASES
def test_any_header_has_a_length_within_bounds_or_an_error(shape: list[int], dtype: int) -> None:
    header = _header(dtype, *shape)
    size = 4
    for extent in shape:
        size *= extent
    fits = dtype in (INT32, FLOAT32) and 1 <= len(shape) <= MAX_RANK and size <= MAX_TENSOR_BYTES
    try:
        assert byte_length(header) == size
    except InvalidArgumentError:
        assert not fits or size == 0
    else:
        assert fits


SIX = _header(INT32, 2, 3)


FRAMES: dict[str, tuple[list[bytes], bytes]] = {  # frames that are right so far, and one that is not
    "a byte more": ([], bytes(25)),
    "a word more": ([], bytes(28)),
    "too long at last": ([bytes(23)], bytes(2)),
    "empty at first": ([], b""),
    "empty within": ([bytes(12)], b""),
    "superfluous": ([bytes(24)], bytes(1)),
    "superfluous and empty": ([bytes(24)], b""),
    "over the limit": ([], bytes(FRAME_BYTES + 1)),
}


@pytest.mark.parametrize("frames", FRAMES)
def test_frames_that_do_not_match_are_refused(frames: str) -> None:
    assembler = Assembler(SIX)
    right, wrong = FRAMES[frames]
    for frame in right:
        assembler.add(frame)
    with pytest.raises(InvalidArgumentError):
        assembler.add(wrong)


def test_a_frame_over_the_limit_is_refused_even_if_it_fits_the_tensor() -> None:
    with pytest.raises(InvalidArgumentError):
        Assembler(_header(INT32, FRAME_BYTES)).add(bytes(FRAME_BYTES + 4))


@pytest.mark.parametrize("arrived", [[], [bytes(1)], [bytes(12)], [bytes(20), bytes(3)]])
def test_an_incomplete_tensor_is_not_given_out(arrived: list[bytes]) -> None:
    assembler = Assembler(SIX)
    for frame in arrived:
        assembler.add(frame)
    assert not assembler.done
    with pytest.raises(InvalidArgumentError, match="incomplete"):
        assembler.array()


def test_a_refused_frame_changes_nothing() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    data, assembler = array.tobytes(), Assembler(SIX)
    assembler.add(data[:10])
    for wrong in (b"", bytes(15), bytes(FRAME_BYTES + 1)):
        with pytest.raises(InvalidArgumentError):
            assembler.add(wrong)
    assembler.add(data[10:])
    assert (assembler.array() == array).all()


@given(st.lists(st.integers(0, 40), max_size=6), st.lists(st.integers(0, 8), max_size=5), st.integers(-1, 4))
@CASES
def test_any_frames_give_a_tensor_or_an_error_of_our_tree(lengths: list[int], shape: list[int], dtype: int) -> None:
    try:
        assembler = Assembler(_header(dtype, *shape))
        for length in lengths:
            assembler.add(bytes(length))
        result = assembler.array()
    except CleaveError:
        return
    assert result.shape == tuple(shape)
    assert result.nbytes == sum(lengths)
