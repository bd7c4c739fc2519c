"""An adapter's folder becomes an upload: whole, in bounded messages, and never one that was not read before."""

from pathlib import Path

import pytest

from client.adapter import CONFIG, MESSAGE_BYTES, PIECE_BYTES, WEIGHTS, Adapter
from trusted_worker import lora
from wire.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / CONFIG).write_bytes(b'{"r": 2}')
    (tmp_path / WEIGHTS).write_bytes(bytes(range(251)) * 10_000)
    return tmp_path


def test_both_sides_mean_the_same_files() -> None:
    assert (CONFIG, WEIGHTS) == (lora.CONFIG, lora.WEIGHTS)
    assert lora.MAX_CONFIG_BYTES <= PIECE_BYTES


def test_the_first_message_has_the_configuration_and_the_others_the_weights(folder: Path) -> None:
    first, *others = Adapter.read(folder).requests()
    assert (first.config, first.weights_size, first.weights) == (b'{"r": 2}', 2_510_000, b"")
    assert b"".join(one.weights for one in others) == (folder / WEIGHTS).read_bytes()
    assert len(others) == 3
    assert not any(one.config or one.weights_size for one in others)


@pytest.mark.parametrize("size", [PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1])
def test_no_message_is_larger_than_a_frame_takes(folder: Path, size: int) -> None:
    (folder / CONFIG).write_bytes(b" " * PIECE_BYTES)
    (folder / WEIGHTS).write_bytes(b"x" * size)
    messages = list(Adapter.read(folder).requests())
    assert len(messages) == 2 + (size > PIECE_BYTES)
    assert max(one.ByteSize() for one in messages) <= MESSAGE_BYTES


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing: give a folder that PEFT saved$"):
        Adapter.read(folder)
    with pytest.raises(CheckpointError, match="is missing"):
        Adapter.read(folder / "elsewhere")


def test_pickled_weights_are_no_substitute(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is no substitute"):
        Adapter.read(folder)


@pytest.mark.parametrize(("name", "size", "what"), [(CONFIG, 0, "empty"), (WEIGHTS, 0, "empty"), (CONFIG, 1, "larger")])
def test_sizes_that_cannot_be_are_refused_before_anything_is_sent(
    folder: Path, name: str, size: int, what: str
) -> None:
    (folder / name).write_bytes(b"x" * size * (PIECE_BYTES + 1))
    with pytest.raises(CheckpointError, match=f"{name} is {what}"):
        Adapter.read(folder)


def test_a_file_that_changes_meanwhile(folder: Path) -> None:
    adapter = Adapter.read(folder)
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    assert sum(len(one.weights) for one in adapter.requests()) == adapter.size
    (folder / WEIGHTS).write_bytes(b"less")
    with pytest.raises(CheckpointError, match="became shorter"):
        list(adapter.requests())
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(adapter.requests())
