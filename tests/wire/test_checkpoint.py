"""The safetensors reader against safetensors' own writer, and against files that lie."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.model_folders import reference_model
from wire.checkpoint import Checkpoint, to_float32
from wire.errors import CheckpointError

CASES = settings(deadline=None, max_examples=150, derandomize=True)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _raw(folder: Path, header: Any, data: bytes = b"", length: int | None = None, name: str = FILE) -> Path:
    """A file by hand: `header` is JSON, or bytes as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (folder / name).write_bytes(size.to_bytes(8, "little") + text + data)
    return folder


def _entry(start: int = 0, stop: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_read_as_safetensors_wrote_them(tmp_path: Path, dtype: str) -> None:
    torch.manual_seed(1)
    tensors = {
        "vector": torch.randn(7),
        "matrix": torch.randn(33, 17) * 1000,
        "cube": torch.randn(2, 3, 4),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 5),
        "edges": torch.tensor([0.0, -0.0, 1e-7, -6e-8, 65504.0, 1.0]),
    }
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        assert name in checkpoint
        assert (checkpoint.info(name).dtype, checkpoint.info(name).shape) == (dtype, shape)
        read = checkpoint.read(name, shape)
        assert read.dtype == np.float32
        assert read.shape == shape
        assert read.tobytes() == tensor.float().numpy().tobytes()  # bit for bit
    assert "other" not in checkpoint
    assert "__metadata__" not in checkpoint


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_of_a_word_is_widened_exactly(dtype: str) -> None:
    if dtype == "F32":
        words = torch.arange(-(2**31), 2**31, 65_521, dtype=torch.int64).to(torch.int32)
    else:
        words = torch.arange(-(2**15), 2**15, dtype=torch.int64).to(torch.int16)
    widened = to_float32(words.numpy().view(np.uint8), dtype)
    expected = words.view(DTYPES[dtype]).float().numpy()
    numbers = ~np.isnan(expected)
    assert (np.isnan(widened) == ~numbers).all()
    assert (widened.view(np.int32)[numbers] == expected.view(np.int32)[numbers]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_the_name_of_their_tensor(
    tmp_path: Path, dtype: str, value: float
) -> None:
    tensor = torch.ones(5, 4)
    tensor[3, 1] = value
    save_file({"good": torch.ones(5, 4), "bad": tensor.to(DTYPES[dtype])}, tmp_path / FILE)
    checkpoint, shape = Checkpoint(tmp_path), (5, 4)
    assert (checkpoint.read("good", shape) == 1).all()
    assert (checkpoint.read_rows("bad", shape, 0, 3) == 1).all()  # where all is well
    assert (checkpoint.read_columns("bad", shape, 2, 4) == 1).all()
    for read in (
        lambda: checkpoint.read("bad", shape),
        lambda: checkpoint.read_rows("bad", shape, 3, 4),
        lambda: checkpoint.read_columns("bad", shape, 0, 2),
    ):
        with pytest.raises(CheckpointError, match="tensor bad holds values that are not finite"):
            read()


def test_the_largest_finite_values_are_read(tmp_path: Path) -> None:
    large = torch.tensor([[torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]])
    save_file({"one": large}, tmp_path / FILE)
    assert (Checkpoint(tmp_path).read("one", (1, 2)) == large.numpy()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_slices_of_the_whole_and_columns_of_its_transpose(tmp_path: Path, dtype: str) -> None:
    tensor = torch.randn(19, 23).to(DTYPES[dtype])
    save_file({"before": torch.randn(3), "matrix": tensor}, tmp_path / FILE)
    checkpoint, shape = Checkpoint(tmp_path), (19, 23)
    whole = checkpoint.read("matrix", shape)
    for start, stop in [(0, 19), (0, 1), (18, 19), (5, 11), (7, 7)]:
        rows = checkpoint.read_rows("matrix", shape, start, stop)
        assert rows.shape == (stop - start, 23)
        assert (rows == whole[start:stop]).all()
    for start, stop in [(0, 23), (0, 1), (22, 23), (5, 11), (7, 7)]:
        columns = checkpoint.read_columns("matrix", shape, start, stop)
        assert columns.shape == (stop - start, 19)
        assert columns.flags.c_contiguous
        assert (columns == whole[:, start:stop].T).all()


def test_what_was_read_is_ours_to_change(tmp_path: Path) -> None:
    save_file({"matrix": torch.ones(2, 2)}, tmp_path / FILE)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read("matrix", (2, 2))[...] = 5
    assert (checkpoint.read("matrix", (2, 2)) == 1).all()


def test_shards_are_found_through_the_index(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama-bf16-tied-sharded")
    names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    assert len(names) > 2
    checkpoint = Checkpoint(folder)
    state = reference_model(folder).state_dict()
    for name, tensor in state.items():
        if name in checkpoint:
            assert (checkpoint.read(name, tuple(tensor.shape)) == tensor.numpy()).all()
    assert {name for name in state if name not in checkpoint} <= {"lm_head.weight"}  # tied


def test_a_name_without_its_first_part_is_found_too(tmp_path: Path) -> None:
    save_file({"wte.weight": torch.ones(2), "transformer.wte.bias": torch.zeros(2)}, tmp_path / FILE)
    checkpoint = Checkpoint(tmp_path)
    assert (checkpoint.read("transformer.wte.weight", (2,)) == 1).all()
    assert (checkpoint.read("transformer.wte.bias", (2,)) == 0).all()
    for name in ("wte.bias", "transformer.transformer.wte.weight", "weight", "transformer.wpe.weight"):
        assert name not in checkpoint


def test_the_whole_name_goes_before_the_shortened_one(tmp_path: Path) -> None:
    save_file({"a.b": torch.ones(2), "x.a.b": torch.zeros(2)}, tmp_path / FILE)
    assert (Checkpoint(tmp_path).read("x.a.b", (2,)) == 0).all()


def test_a_closed_checkpoint_reads_nothing(tmp_path: Path) -> None:
    save_file({"one": torch.ones(4)}, tmp_path / FILE)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises((OSError, CheckpointError)):
        checkpoint.read("one", (4,))


def test_a_hub_name_is_not_a_folder() -> None:
    with pytest.raises(CheckpointError, match=r"org/model is not a folder.*not downloaded"):
        Checkpoint(Path("org/model"))


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a folder"):
        Checkpoint(tmp_path / FILE)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        Checkpoint(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_file({"one": torch.ones(4)}, tmp_path / FILE)
    checkpoint = Checkpoint(tmp_path)
    for read in (lambda: checkpoint.info("two"), lambda: checkpoint.read("two", (4,))):
        with pytest.raises(CheckpointError, match="tensor two is missing"):
            read()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool])
def test_other_dtypes_are_refused_when_they_are_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"one": torch.ones(4), "ids": torch.ones(4).to(dtype)}, tmp_path / FILE)
    checkpoint = Checkpoint(tmp_path)
    assert (checkpoint.read("one", (4,)) == 1).all()
    with pytest.raises(CheckpointError, match="F32, F16 and BF16"):
        checkpoint.read("ids", (4,))


@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 4, 1), (), (3, 5)])
def test_another_shape_than_the_configuration_asks_for(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file({"one": torch.ones(3, 4)}, tmp_path / FILE)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor one has shape \(3, 4\)"):
        checkpoint.read("one", shape)
    for read in (checkpoint.read_rows, checkpoint.read_columns):
        with pytest.raises(CheckpointError, match=r"tensor one has shape \(3, 4\)"):
            read("one", (4, 3), 0, 1)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 60, -1, -16])
def test_a_truncated_file_is_refused_at_once(tmp_path: Path, keep: int) -> None:
    save_file({"one": torch.ones(4), "two": torch.ones(4)}, tmp_path / FILE)
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated\?"):
        Checkpoint(tmp_path)


def test_a_file_that_shrinks_later_is_noticed(tmp_path: Path) -> None:
    save_file({"one": torch.ones(1000)}, tmp_path / FILE)
    checkpoint = Checkpoint(tmp_path)
    with (tmp_path / FILE).open("r+b") as file:
        file.truncate(500)
    with pytest.raises(CheckpointError, match="shorter"):
        checkpoint.read("one", (1000,))


@pytest.mark.parametrize("length", [0, 1, 1000, 2**31, 2**32, 2**63, 2**64 - 1])
def test_a_header_length_that_does_not_fit_the_file(tmp_path: Path, length: int) -> None:
    _raw(tmp_path, {"one": _entry()}, bytes(8), length)
    with pytest.raises(CheckpointError, match="length"):
        Checkpoint(tmp_path)


HUGE = 1 << 62
HEADERS: dict[str, Any] = {
    "not JSON": b"not JSON at all",
    "half JSON": b'{"one": {"dtype": "F32", "sha',
    "not UTF-8": b'{"\xff\xfe\xfd": 1}',
    "a list": [],
    "a number": b"5.0",
    "null": b"null",
    "a text": b'"abc"',
    "an entry that is a list": {"one": []},
    "an entry that is null": {"one": None},
    "an entry that is a text": {"one": "F32"},
    "an empty entry": {"one": {}},
    "no dtype": {"one": {"shape": [2], "data_offsets": [0, 8]}},
    "no shape": {"one": {"dtype": "F32", "data_offsets": [0, 8]}},
    "no offsets": {"one": {"dtype": "F32", "shape": [2]}},
    "an unknown dtype": {"one": _entry(dtype="F31")},
    "a dtype that is a list": {"one": _entry(dtype=["F32"])},
    "a dtype that is null": {"one": _entry(dtype=None)},
    "a shape that is null": {"one": {**_entry(), "shape": None}},
    "a shape that is a number": {"one": {**_entry(), "shape": 2}},
    "a shape of texts": {"one": _entry(shape=["2"])},
    "a shape of lists": {"one": _entry(shape=[[2]])},
    "a negative extent": {"one": _entry(shape=[-2])},
    "two negative extents": {"one": _entry(shape=[-2, -1])},
    "a fractional extent": {"one": _entry(shape=[2.0])},
    "an extent that is true": {"one": _entry(0, 4, shape=[True])},
    "an extent that is not a number": b'{"one": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
    "an infinite extent": b'{"one": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}',
    "a huge extent": {"one": _entry(shape=[HUGE])},
    "extents whose product wraps": {"one": _entry(shape=[HUGE, 4, 2])},
    "extents beyond any memory": {"one": _entry(0, 8 * HUGE**2, shape=[2 * HUGE, HUGE])},
    "a number of 5000 digits": b'{"one": {"dtype": "F32", "shape": [2], "data_offsets": [0, ' + b"9" * 5000 + b"]}}",
    "one offset": {"one": {**_entry(), "data_offsets": [0]}},
    "three offsets": {"one": {**_entry(), "data_offsets": [0, 8, 8]}},
    "offsets as a text": {"one": {**_entry(), "data_offsets": "08"}},
    "offsets as an object": {"one": {**_entry(), "data_offsets": {"0": 1, "8": 2}}},
    "offsets that are null": {"one": {**_entry(), "data_offsets": None}},
    "fractional offsets": {"one": {**_entry(), "data_offsets": [0.0, 8.0]}},
    "offsets that are booleans": {"one": {**_entry(shape=[0]), "data_offsets": [False, False]}},
    "a negative offset": {"one": _entry(-8, 0)},
    "offsets backwards": {"one": _entry(8, 0)},
    "a length that is not the shape's": {"one": _entry(0, 4)},
    "past the end": {"one": _entry(8, 16)},
    "far past the end": {"one": _entry(HUGE, HUGE + 8)},
    "the same bytes twice": {"one": _entry(), "two": _entry()},
    "overlapping by a byte": {"one": _entry(0, 4, [1]), "two": _entry(3, 7, [1])},
    "one within another": {"one": _entry(), "two": _entry(4, 8, [1])},
    "nested without end": b'{"one": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "nested in its metadata": b'{"__metadata__": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_lies_is_refused_with_the_name_of_its_file(tmp_path: Path, header: str) -> None:
    _raw(tmp_path, HEADERS[header], bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


def test_padding_metadata_and_gaps_are_fine(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "one": _entry(8, 16), "none": _entry(8, 8, [0])})
    _raw(tmp_path, header.encode() + b"   ", np.arange(4, dtype=np.float32).tobytes())
    assert Checkpoint(tmp_path).read("one", (2,)).tolist() == [2.0, 3.0]


ORIGINAL = json.dumps({"__metadata__": {"a": "b"}, "one": _entry(), "two": _entry(8, 14, (3, 1), "BF16")}).encode()


@given(st.lists(st.tuples(st.integers(0, len(ORIGINAL) + 7), st.integers(1, 255)), min_size=1, max_size=6))
@CASES
def test_flipped_bytes_of_a_header_give_a_checkpoint_or_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(len(ORIGINAL).to_bytes(8, "little") + ORIGINAL + bytes(14))
    for position, mask in flips:
        content[position] ^= mask
    _open_and_read(tmp_path_factory, bytes(content))


def test_edited_headers_give_a_checkpoint_or_a_checkpoint_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Edits that keep more of the JSON alive than flips do: digits, brackets and quotes, moved about."""
    draw = random.Random(11)
    for _ in range(400):
        text = bytearray(ORIGINAL)
        for _ in range(draw.randint(1, 4)):
            position = draw.randrange(len(text))
            replacement = draw.choice(
                [b"-", b"9", b"0", b"1e9", b"null", b"[", b"]", b"{", b"}", b'"', b",", b".5", b""]
            )
            text[position : position + draw.randint(0, 3)] = replacement
        _open_and_read(tmp_path_factory, len(text).to_bytes(8, "little") + bytes(text) + bytes(14))


def _open_and_read(factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = factory.getbasetemp() / "flipped"
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(content)
    try:
        checkpoint = Checkpoint(folder)
    except CheckpointError:
        return
    for name in ("one", "two"):
        if name in checkpoint:
            try:
                shape = checkpoint.info(name).shape
                assert checkpoint.read(name, shape).shape == shape
            except CheckpointError:
                pass
    checkpoint.close()


INDICES: dict[str, Any] = {
    "not JSON": b"not JSON",
    "not UTF-8": b"\xff\xfe\xfd",
    "a list": [],
    "no map": {},
    "a map that is a list": {"weight_map": ["a"]},
    "a map that is null": {"weight_map": None},
    "file names that are numbers": {"weight_map": {"one": 5}},
    "file names that are null": {"weight_map": {"one": None}},
    "file names that are lists": {"weight_map": {"one": ["a"]}},
    "file names of two kinds": {"weight_map": {"one": 5, "two": "a"}},
    "a missing shard": {"weight_map": {"one": "model-00001-of-00002.safetensors"}},
    "an empty file name": {"weight_map": {"one": ""}},
    "the folder itself": {"weight_map": {"one": "."}},
    "the folder above": {"weight_map": {"one": ".."}},
    "a zero byte": {"weight_map": {"one": "a\u0000b"}},
    "a name too long for a file": {"weight_map": {"one": "a" * 5000}},
    "nested without end": b"[" * 200_000,
}


@pytest.mark.parametrize("index", INDICES)
def test_an_index_that_lies_is_refused(tmp_path: Path, index: str) -> None:
    content = INDICES[index]
    (tmp_path / INDEX).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path)


def test_an_index_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).mkdir()
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "../../outside.safetensors", "a/../../outside.safetensors"])
@pytest.mark.parametrize("absolute", [False, True])
def test_shard_names_do_not_leave_the_folder(tmp_path: Path, name: str, absolute: bool) -> None:
    folder = tmp_path / "deep" / "model"
    outside = tmp_path / "deep" / "outside.safetensors"
    folder.mkdir(parents=True)
    for path in (outside, tmp_path / "outside.safetensors"):
        save_file({"one": torch.ones(2)}, path)
    asked = str(outside) if absolute else name
    (folder / INDEX).write_text(json.dumps({"weight_map": {"one": asked}}))
    with pytest.raises(CheckpointError):
        Checkpoint(folder)


def test_a_lying_shard_is_named(tmp_path: Path) -> None:
    save_file({"one": torch.ones(2)}, tmp_path / "a.safetensors")
    _raw(tmp_path, {"two": _entry(0, 80)}, bytes(8), name="b.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        Checkpoint(tmp_path)
