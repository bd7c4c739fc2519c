"""Sealed folders against the plain ones: the same tensors, or an error for whatever was changed."""

import hashlib
import hmac
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from Crypto.Cipher import AES
from hypothesis import given, settings
from hypothesis import strategies as st

from trusted_worker import sealed_model
from trusted_worker.sealed_model import (
    CHUNK,
    HEADER,
    TAG_BYTES,
    SealedSource,
    is_sealed,
    read_key,
    run,
    seal,
    write_key,
)
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError, PreconditionError, VerificationError
from wire.measured import MeasuredCheckpoint
from wire.model_config import ModelConfig

CASES = settings(deadline=None, max_examples=100, derandomize=True)
KEY = bytes(range(32))
ONE, SHARDED = "llama", "llama-bf16-tied-sharded"
FILE = "model.safetensors.sealed"
STRIDE = CHUNK + TAG_BYTES
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def sealed_folder(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The sealed copy of a model folder, made once. Tests that change it put it back."""
    root = tmp_path_factory.mktemp("sealed")

    def make(name: str) -> Path:
        if not (root / name).exists():
            seal(model_folder(name), root / name, KEY)
        return root / name

    return make


def open_sealed(folder: Path, key: bytes) -> MeasuredCheckpoint:
    """As the service does it: the configuration first."""
    return sealed_model.open_sealed(folder, key, ModelConfig.from_hf(folder))


def _digest(folder: Path) -> bytes:
    """Of a plain folder."""
    return MeasuredCheckpoint(folder, ModelConfig.from_hf(folder)).model_digest


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    checkpoint = Checkpoint(folder)
    shapes = {name: info.shape for name, info in checkpoint._tensors.items()}
    checkpoint.close()
    return shapes


def _read_all(sealed: Path, shapes: dict[str, tuple[int, ...]], key: bytes = KEY) -> dict[str, bytes]:
    checkpoint = open_sealed(sealed, key)
    try:
        return {name: checkpoint.read(name, shape).tobytes() for name, shape in shapes.items()}
    finally:
        checkpoint.close()


def _source(sealed: Path, name: str = FILE) -> SealedSource:
    return SealedSource(sealed / name, KEY, ModelConfig.from_hf(sealed).digest, set())


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("name", [ONE, SHARDED])
def test_a_sealed_model_is_read_like_the_plain_one(name: str, model_folder: Folder, sealed_folder: Folder) -> None:
    plain, sealed = Checkpoint(model_folder(name)), open_sealed(sealed_folder(name), KEY)
    shapes = _shapes(model_folder(name))
    assert len(shapes) > 20
    for tensor, shape in shapes.items():
        assert sealed.info(tensor).dtype == plain.info(tensor).dtype
        assert sealed.read(tensor, shape).tobytes() == plain.read(tensor, shape).tobytes()
        if len(shape) == 2:
            assert (sealed.read_rows(tensor, shape, 3, 9) == plain.read_rows(tensor, shape, 3, 9)).all()
            assert (sealed.read_columns(tensor, shape, 3, 9) == plain.read_columns(tensor, shape, 3, 9)).all()
    assert sealed.model_digest == _digest(model_folder(name))


def test_any_piece_of_a_file_is_that_of_the_plain_file(model_folder: Folder, sealed_folder: Folder) -> None:
    plain = (model_folder(ONE) / "model.safetensors").read_bytes()
    source = _source(sealed_folder(ONE))
    assert source.size == len(plain) > 2 * CHUNK
    edges = st.sampled_from([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, len(plain) - 1, len(plain)])
    offsets = st.one_of(edges, st.integers(0, len(plain)))

    @CASES
    @given(offsets, offsets)
    def check(one: int, two: int) -> None:
        start, stop = sorted((one, two))
        into = np.empty(stop - start, np.uint8)
        source.read(start, into)
        assert into.tobytes() == plain[start:stop]

    check()
    source.close()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_files_of_any_length(size: int, model_folder: Folder, tmp_path: Path) -> None:
    """Files that the index does not name are sealed too, whatever is in them."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder(ONE), folder)
    content = np.random.default_rng(size).bytes(size)
    (folder / "other.safetensors").write_bytes(content)
    seal(folder, tmp_path / "out", KEY)
    source = _source(tmp_path / "out", "other.safetensors.sealed")
    into = np.empty(size, np.uint8)
    source.read(0, into)
    assert into.tobytes() == content
    with pytest.raises(CheckpointError, match="shorter"):
        source.read(size, np.empty(1, np.uint8))
    source.close()


def test_the_format_is_what_its_description_says(model_folder: Folder, sealed_folder: Folder) -> None:
    plain = (model_folder(ONE) / "model.safetensors").read_bytes()
    sealed = (sealed_folder(ONE) / FILE).read_bytes()
    header, body = sealed[:48], sealed[48:]
    assert header[:16] == b"cleave01" + len(plain).to_bytes(8, "little")
    bound = header + b"".join(
        hashlib.sha256((model_folder(ONE) / name).read_bytes()).digest()
        for name in ("config.json", "generation_config.json")
    )
    extracted = hmac.digest(header[16:], KEY, hashlib.sha256)
    key = hmac.digest(extracted, b"cleave sealed model v1 model.safetensors\x01", hashlib.sha256)
    opened = b""
    for chunk, start in enumerate(range(0, len(body), STRIDE)):
        cipher: Any = AES.new(key, AES.MODE_GCM, nonce=chunk.to_bytes(12, "big"))
        cipher.update(bound)
        piece = body[start : start + STRIDE]
        opened += cipher.decrypt_and_verify(piece[:-16], piece[-16:])
    assert opened == plain


def test_only_the_chunk_in_hand_is_kept(sealed_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(sealed_folder(ONE))
    opened: list[int] = []
    cipher = source._seal.cipher

    def noted(chunk: int) -> Any:
        opened.append(chunk)
        return cipher(chunk)

    monkeypatch.setattr(source._seal, "cipher", noted)
    byte = np.empty(1, np.uint8)
    for chunk in (0, 0, 1, 1, 1, 0, 2):
        source.read(chunk * CHUNK + 5, byte)
    assert opened == [1, 0, 2]
    source.close()
    assert not source._buffer.any()


# What was changed is noticed.


@pytest.fixture
def copies(sealed_folder: Folder, tmp_path: Path) -> Folder:
    """A sealed copy of its own for a test that spoils it."""

    def make(name: str) -> Path:
        shutil.copytree(sealed_folder(name), tmp_path / name)
        return tmp_path / name

    return make


def _refused_on_open(folder: Path, key: bytes = KEY) -> None:
    before = _descriptors()
    with pytest.raises(CheckpointError, match="cannot be opened with this key, or was changed"):
        open_sealed(folder, key)
    assert _descriptors() == before


def _positions(size: int) -> Iterator[int]:
    """Bytes of every kind."""
    yield from range(HEADER.size)
    for start in range(HEADER.size, size, STRIDE):
        end = min(start + STRIDE, size)
        yield from (start, start + 1, (start + end) // 2, end - TAG_BYTES - 1, *range(end - TAG_BYTES, end))


def test_a_flipped_byte_of_any_kind_is_noticed(model_folder: Folder, copies: Folder) -> None:
    folder, shapes = copies(ONE), _shapes(model_folder(ONE))
    content = bytearray((folder / FILE).read_bytes())
    for position in _positions(len(content)):
        content[position] ^= 1
        (folder / FILE).write_bytes(content)
        _refused_on_open(folder)
        content[position] ^= 1
    (folder / FILE).write_bytes(content)
    assert len(_read_all(folder, shapes)) == len(shapes)


def test_what_is_changed_after_it_was_opened_is_noticed(model_folder: Folder, copies: Folder) -> None:
    folder, shapes = copies(ONE), _shapes(model_folder(ONE))
    checkpoint = open_sealed(folder, KEY)
    last = max(shapes, key=lambda name: checkpoint.info(name).offset)
    with (folder / FILE).open("r+b") as file:
        file.seek(-TAG_BYTES - 1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(VerificationError):
        checkpoint.read(last, shapes[last])
    checkpoint.close()


def test_flipped_bits_anywhere_are_noticed(model_folder: Folder, copies: Folder) -> None:
    folder, shapes = copies(ONE), _shapes(model_folder(ONE))
    content = (folder / FILE).read_bytes()

    @CASES
    @given(st.integers(0, len(content) - 1), st.integers(1, 255))
    def check(position: int, flips: int) -> None:
        with (folder / FILE).open("r+b") as file:
            file.seek(position)
            file.write(bytes([content[position] ^ flips]))
        with pytest.raises((CheckpointError, VerificationError)):
            _read_all(folder, shapes)
        (folder / FILE).write_bytes(content)

    check()


def test_nothing_of_a_changed_chunk_comes_out(
    model_folder: Folder, copies: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder, plain = copies(ONE), (model_folder(ONE) / "model.safetensors").read_bytes()
    source = _source(folder)
    with (folder / FILE).open("r+b") as file:
        file.seek(HEADER.size + 2 * STRIDE - 1)
        file.write(b"\x00\x00")
    into = np.full(CHUNK + 20, 0x5A, np.uint8)
    with pytest.raises(VerificationError):
        source.read(CHUNK - 10, into)
    assert (into[10:] == 0x5A).all()  # the first chunk was good
    assert not source._buffer.any()
    assert caplog.messages == ["model.safetensors: chunk 1 was changed, or cannot be read"]
    with pytest.raises(VerificationError):  # also the second time
        source.read(CHUNK, into)
    source.read(0, into[:500])  # what is good can still be read
    assert into[:500].tobytes() == plain[:500]
    source.close()


def test_swapped_chunks_are_noticed(model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_model, "CHUNK", 1 << 12)
    stride, folder, shapes = (1 << 12) + TAG_BYTES, tmp_path / "out", _shapes(model_folder(ONE))
    seal(model_folder(ONE), folder, KEY)
    content = (folder / FILE).read_bytes()
    assert len(_read_all(folder, shapes)) == len(shapes)
    for one, two in ((0, 100), (50, 51), (3, 160)):
        changed = bytearray(content)
        first, second = (slice(HEADER.size + n * stride, HEADER.size + (n + 1) * stride) for n in (one, two))
        changed[first], changed[second] = content[second], content[first]
        assert len(changed) == len(content)
        (folder / FILE).write_bytes(changed)
        with pytest.raises((CheckpointError, VerificationError)):
            _read_all(folder, shapes)


@pytest.mark.parametrize("change", [-STRIDE, -1, 1, STRIDE])
def test_a_file_of_another_length_is_noticed(change: int, copies: Folder) -> None:
    folder = copies(ONE)
    os.truncate(folder / FILE, (folder / FILE).stat().st_size + change)
    _refused_on_open(folder)


@pytest.mark.parametrize("length", [0, 1, HEADER.size - 1, HEADER.size, HEADER.size + TAG_BYTES])
def test_a_stub_is_noticed(length: int, copies: Folder) -> None:
    folder = copies(ONE)
    os.truncate(folder / FILE, length)
    _refused_on_open(folder)


def test_a_header_that_promises_less_is_noticed(copies: Folder) -> None:
    """Cut at a chunk's end, and the header made to fit."""
    folder = copies(ONE)
    content = (folder / FILE).read_bytes()
    magic, _, salt = HEADER.unpack(content[: HEADER.size])
    for chunks in (0, 1, 2):
        header = HEADER.pack(magic, chunks * CHUNK, salt)
        (folder / FILE).write_bytes(header + content[HEADER.size : HEADER.size + max(chunks * STRIDE, TAG_BYTES)])
        _refused_on_open(folder)


def test_a_file_cut_after_it_was_opened_is_noticed(copies: Folder) -> None:
    folder = copies(ONE)
    source = _source(folder)
    os.truncate(folder / FILE, HEADER.size + STRIDE)
    with pytest.raises(VerificationError):
        source.read(CHUNK, np.empty(10, np.uint8))
    source.close()


def test_swapped_files_are_noticed(copies: Folder) -> None:
    folder = copies(SHARDED)
    files = sorted(folder.glob("*.sealed"))
    assert len(files) > 2
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    _refused_on_open(folder)
    files[1].write_bytes(first)
    _refused_on_open(folder)


def test_a_file_of_another_sealing_is_noticed(model_folder: Folder, copies: Folder, tmp_path: Path) -> None:
    """Same key, same configuration, same name: a shard of an older training, say."""
    folder = copies(SHARDED)
    seal(model_folder(SHARDED), tmp_path / "again", KEY)
    files = sorted(path.name for path in folder.glob("*.sealed"))
    shutil.copy(tmp_path / "again" / files[-1], folder)
    _refused_on_open(folder)
    for name in files:
        shutil.copy(tmp_path / "again" / name, folder)
    open_sealed(folder, KEY).close()


def test_a_missing_file_is_noticed(copies: Folder) -> None:
    folder = copies(SHARDED)
    min(folder.glob("*.sealed")).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        open_sealed(folder, KEY)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("model", [ONE, SHARDED])
def test_another_configuration_is_noticed(name: str, model: str, copies: Folder) -> None:
    folder = copies(model)
    raw = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(raw | {"eos_token_id": 7}))
    _refused_on_open(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing|was changed"):
        open_sealed(folder, KEY)


def test_a_configuration_that_changes_after_it_was_read_is_noticed(copies: Folder) -> None:
    folder = copies(ONE)
    config = ModelConfig.from_hf(folder)
    sealed_model.open_sealed(folder, KEY, config).close()
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 0.5}))
    lied_to = ModelConfig.from_hf(folder)
    (folder / "config.json").write_text(json.dumps(raw))  # what a second look would find
    with pytest.raises(CheckpointError, match="was changed"):
        sealed_model.open_sealed(folder, KEY, lied_to)


def test_a_damaged_header_behind_the_first_chunk_is_noticed_on_opening(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed_model, "CHUNK", 64)
    seal(model_folder(ONE), tmp_path / "out", KEY)
    with (tmp_path / "out" / FILE).open("r+b") as file:
        file.seek(HEADER.size + 3 * (64 + TAG_BYTES))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    _refused_on_open(tmp_path / "out")


@pytest.mark.parametrize("key", [bytes(32), KEY[:-1] + b"\x00", KEY[::-1]])
def test_another_key_is_refused(key: bytes, sealed_folder: Folder) -> None:
    _refused_on_open(sealed_folder(ONE), key)
    _refused_on_open(sealed_folder(SHARDED), key)


def test_nothing_of_the_weights_is_in_the_folder(model_folder: Folder, sealed_folder: Folder) -> None:
    plain = (model_folder(ONE) / "model.safetensors").read_bytes()
    content = b"".join(path.read_bytes() for path in sorted(sealed_folder(ONE).iterdir()))
    for start in range(0, len(plain) - 16, 4099):
        assert plain[start : start + 16] not in content
    assert b"q_proj" in plain
    assert b"q_proj" not in content


def test_equal_files_do_not_look_equal(model_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder(ONE), folder)
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    sealed = []
    for out in (tmp_path / "one", tmp_path / "two"):
        seal(folder, out, KEY)
        sealed += [path.read_bytes()[HEADER.size :] for path in sorted(out.glob("*.sealed"))]
    assert len(sealed) == 4
    pieces = [one[start : start + 64] for one in sealed for start in range(0, len(one), STRIDE)]
    assert len(set(pieces)) == len(pieces)


# Making one.


def test_what_is_copied(model_folder: Folder, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model_folder(SHARDED), folder)
    clear = ("tokenizer.json", "merges.txt", "vocab.json", "tokenizer.model", "chat_template.jinja")
    weights = ("pytorch_model.bin", "model.pt", "m.gguf", "m.pth", "m.h5", "m.npz", "consolidated.00", "m.msgpack")
    for name in (*clear, *weights):
        (folder / name).write_text(name)
    (folder / "original.json").mkdir()
    shards = {path.name for path in folder.glob("*.safetensors")}
    kept = {"config.json", "generation_config.json", "model.safetensors.index.json", *clear}
    seal(folder, out, KEY)
    assert {path.name for path in out.iterdir()} == kept | {f"{name}.sealed" for name in shards}
    for name in kept:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert (is_sealed(out), is_sealed(folder), is_sealed(tmp_path / "nowhere")) == (True, False, False)


def test_links_are_followed(model_folder: Folder, tmp_path: Path) -> None:
    """As in the cache of a hub."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_folder(ONE).iterdir():
        (folder / path.name).symlink_to(path)
    seal(folder, tmp_path / "out", KEY)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    open_sealed(tmp_path / "out", KEY).close()


def test_an_empty_folder_may_be_given_and_parents_are_made(model_folder: Folder, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for out in (empty, tmp_path / "a" / "b"):
        seal(model_folder(ONE), out, KEY)
        assert is_sealed(out)
        assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def _none(folder: Path) -> None:
    shutil.rmtree(folder)


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()


def _truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 10_000)


def _sealed_already(folder: Path) -> None:
    (folder / FILE).touch()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_none, "is not a folder"),
        (_no_weights, "model.safetensors is missing"),
        (_no_configuration, "config.json is missing"),
        (_truncated, "is the file truncated"),
        (_sealed_already, "is sealed already"),
    ],
)
def test_what_cannot_be_sealed(
    spoil: Callable[[Path], None], text: str, model_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder(ONE), folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=text):
        seal(folder, tmp_path / "out", KEY)
    assert run(_arguments(folder, tmp_path / "out", tmp_path / "key")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) in (["model"], [])  # neither a folder nor a key


@pytest.mark.parametrize("file", [True, False])
def test_what_is_there_is_not_overwritten(file: bool, model_folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if file:
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        seal(model_folder(ONE), out, KEY)
    assert (out if file else out / "mine").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("step", ["_sealed", "_sync", "open_sealed"])
def test_half_a_model_is_never_left_behind(
    step: str, error: BaseException, model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = sealed_model._sealed

    def broken(*given: Any) -> Iterator[bytes]:
        assert is_sealed(next(tmp_path.glob(".out-*")))  # there is something to clean up
        if step != "_sealed":
            raise error
        return partly(*given)

    def partly(*given: Any) -> Iterator[bytes]:
        for pieces, piece in enumerate(sealed(*given)):
            if pieces == 2:
                raise error
            yield piece

    monkeypatch.setattr(sealed_model, step, broken)
    before = _descriptors()
    with pytest.raises(type(error)):
        seal(model_folder(ONE), tmp_path / "out", KEY)
    assert list(tmp_path.iterdir()) == []
    assert _descriptors() == before


def test_a_file_that_shrinks_meanwhile_is_noticed(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder(ONE), folder)
    check = sealed_model._check

    def shrink(*given: Path) -> None:
        check(*given)
        os.truncate(folder / "model.safetensors", CHUNK)

    monkeypatch.setattr(sealed_model, "_check", shrink)
    with pytest.raises(CheckpointError):
        seal(folder, tmp_path / "out", KEY)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_long_work_shows_progress(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seal(model_folder(ONE), tmp_path / "quiet", KEY)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sealed_model, "PROGRESS", CHUNK)
    seal(model_folder(ONE), tmp_path / "out", KEY)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "model.safetensors: 0.0 of 0.0 GiB"


# Key files.


def test_a_key_file_is_made_for_its_owner(tmp_path: Path) -> None:
    keys = []
    for name in ("one", "two"):
        write_key(tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o7777 == 0o600
        keys.append(read_key(tmp_path / name))
        assert (tmp_path / name).read_text() == keys[-1].hex() + "\n"
    assert len(set(keys)) == 2
    with pytest.raises(FileExistsError):
        write_key(tmp_path / "one")
    assert read_key(tmp_path / "one") == keys[0]


def _key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "a key"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("text", [KEY.hex(), KEY.hex() + "\n", KEY.hex().upper()])
def test_key_files_by_hand(text: str, tmp_path: Path) -> None:
    assert read_key(_key_file(tmp_path, text)) == KEY


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        KEY.hex()[:-1],
        KEY.hex() + "0",
        KEY.hex() + "\n\n",
        " " + KEY.hex(),
        "g" * 64,
        KEY.hex() + "\n" + "x" * 99,
    ],
)
def test_malformed_key_files_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="64 hexadecimal digits") as caught:
        read_key(_key_file(tmp_path, text))
    assert KEY.hex()[:8] not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o777])
def test_key_files_open_to_others_are_refused(mode: int, tmp_path: Path) -> None:
    path = _key_file(tmp_path, KEY.hex(), mode)
    with pytest.raises(PreconditionError, match="open to others") as caught:
        read_key(path)
    assert f"chmod 600 '{path}'" in str(caught.value)
    path.chmod(0o400)
    assert read_key(path) == KEY


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(PreconditionError, match="missing or cannot be read"):
            read_key(path)


# The command.


def _arguments(model: Path, out: Path, key_file: Path) -> list[str]:
    return ["--model", str(model), "--out", str(out), "--key-file", str(key_file)]


def test_the_command_makes_a_key_and_says_how_to_serve(
    model_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, key_file = model_folder(ONE), tmp_path / "the key"
    for out in (tmp_path / "one", tmp_path / "two"):
        assert run(_arguments(folder, out, key_file)) == 0
        said, err = capsys.readouterr()
        assert err == ""
        assert ("made a new key" in said) == (out.name == "one")  # the second time it is used again
        serve = f"cleave up --model {out} --model-key-file '{key_file}' --scheme kv-shield"
        assert said.splitlines()[-1].strip() == serve
        assert read_key(key_file).hex() not in said
        assert open_sealed(out, read_key(key_file)).model_digest == _digest(folder)


@pytest.mark.parametrize("where", ["model/key", "out/key", "model", "out", "model/../out/a/../key"])
def test_the_key_lies_outside_both_folders(
    where: str, model_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder(ONE), tmp_path / "model")
    assert run(_arguments(tmp_path / "model", tmp_path / "out", tmp_path / where)) == 2
    assert "the key file must lie outside" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "key").exists()


def test_a_link_to_a_key_inside_is_refused(
    model_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder(ONE), tmp_path / "model")
    write_key(tmp_path / "model" / "key")
    (tmp_path / "link").symlink_to(tmp_path / "model" / "key")
    assert run(_arguments(tmp_path / "model", tmp_path / "out", tmp_path / "link")) == 2
    assert "must lie outside" in capsys.readouterr().err


def test_the_command_says_what_is_wrong_in_one_line(
    model_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    bad = _key_file(tmp_path, KEY.hex(), 0o644)
    for out, key_file, text in (
        (full, tmp_path / "key", "not an empty folder"),
        (tmp_path / "out", bad, "open to others"),
        (tmp_path / "out", tmp_path / "none" / "key", "No such file"),
        (bad / "out", tmp_path / "key", "Not a directory"),
    ):
        assert run(_arguments(model_folder(ONE), out, key_file)) == 2
        said = capsys.readouterr().err
        assert said.startswith("cleave-trusted-worker seal-model: ")
        assert text in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("missing", range(3))
def test_every_flag_is_needed(missing: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = _arguments(tmp_path, tmp_path, tmp_path)
    del arguments[2 * missing : 2 * missing + 2]
    with pytest.raises(SystemExit) as caught:
        run(arguments)
    assert caught.value.code == 2
    assert "required" in capsys.readouterr().err
