"""Memory and life of adapters: what is taken when, what is refused before it is taken, and that it comes back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.adapter_folders import PLAIN, Tensors, tensors_of, write
from tests.trusted_worker.fakes import CONFIG
from trusted_worker import lora
from trusted_worker.adapters import MAX_ADAPTERS, MAX_HEADER_BYTES, Adapter, Adapters
from trusted_worker.secure_memory import SecureMemory
from wire.errors import ExhaustedError, InvalidArgumentError, PreconditionError
from wire.layout import WORD, blocks

RAW = json.dumps(PLAIN).encode()
LORA = lora.read_config(RAW, CONFIG)
BUDGET = 1 << 16


@dataclass
class Rig:
    """A store of adapters, and one adapter's file."""

    memory: SecureMemory
    adapters: Adapters
    file: bytes

    @property
    def needed(self) -> int:
        """Bytes of one upload."""
        return blocks([WORD * LORA.floats, len(self.file)])

    def upload(self) -> Adapter:
        incoming = self.adapters.begin(RAW, len(self.file))
        incoming.write(self.file)
        return incoming.finish()


@pytest.fixture
def file(tmp_path: Path) -> bytes:
    write(tmp_path / "one", PLAIN, tensors_of(LORA))
    return (tmp_path / "one" / lora.WEIGHTS).read_bytes()


@pytest.fixture
def rig(file: bytes) -> Rig:
    """Memory for three adapters, of which one is being uploaded."""
    memory = SecureMemory(BUDGET)
    capacity = 3 * blocks([WORD * LORA.floats]) + blocks([len(file)])
    return Rig(memory, Adapters(CONFIG, memory, capacity), file)


@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 20])
def test_a_file_comes_in_any_pieces(rig: Rig, piece: int) -> None:
    incoming = rig.adapters.begin(RAW, len(rig.file))
    for first in range(0, len(rig.file), piece):
        incoming.write(rig.file[first : first + piece])
    adapter = incoming.finish()
    assert rig.adapters.find(adapter.name) is adapter
    assert len(adapter.name) == 16
    assert adapter.size == blocks([WORD * LORA.floats])


def test_names_are_random(rig: Rig) -> None:
    assert rig.upload().name != rig.upload().name


def test_all_memory_is_taken_before_the_first_byte_and_the_file_s_comes_back(rig: Rig) -> None:
    incoming = rig.adapters.begin(RAW, len(rig.file))
    assert rig.memory.used == rig.needed == rig.adapters.counters()["adapter_bytes"]
    incoming.write(rig.file)
    assert rig.memory.used == rig.needed
    adapter = incoming.finish()
    assert rig.memory.used == adapter.size == rig.adapters.counters()["adapter_bytes"]
    assert rig.memory.by_owner() == {"adapters": adapter.size}


def test_an_abandoned_upload_gives_everything_back_once(rig: Rig) -> None:
    incoming = rig.adapters.begin(RAW, len(rig.file))
    incoming.write(rig.file[:100])
    incoming.abandon()
    incoming.abandon()
    assert rig.memory.used == rig.adapters.counters()["adapter_bytes"] == 0
    for work in (lambda: incoming.write(b"x"), incoming.finish):
        with pytest.raises(PreconditionError, match="this upload has ended"):
            work()
    adapter = rig.upload()
    assert rig.memory.used == adapter.size


def test_abandoning_after_the_end_does_nothing(rig: Rig) -> None:
    incoming = rig.adapters.begin(RAW, len(rig.file))
    incoming.write(rig.file)
    adapter = incoming.finish()
    incoming.abandon()
    assert rig.adapters.find(adapter.name) is adapter
    assert rig.memory.used == adapter.size


def _header(length: int) -> bytes:
    return length.to_bytes(8, "little")


def _padded(file: bytes, length: int) -> bytes:
    """The same tensors behind a header that spaces make as long as this."""
    size = int.from_bytes(file[:8], "little")
    return _header(length) + file[8 : 8 + size] + b" " * (length - size) + file[8 + size :]


BROKEN: dict[str, tuple[Any, str]] = {
    "too short": (lambda file: file[:-1], "bytes came"),
    "too long": (lambda file: file + b"x", "more bytes came than were announced"),
    "no header": (lambda file: b"\xff" * len(file), "header is larger"),
    "a header beyond the file": (lambda file: _header(len(file)) + file[8:], "header's length does not fit"),
    "junk": (lambda file: file[:8] + b"x" * (len(file) - 8), "header is malformed"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_cannot_be_read_is_refused_and_its_memory_comes_back(rig: Rig, what: str) -> None:
    change, text = BROKEN[what]
    incoming = rig.adapters.begin(RAW, len(rig.file))
    with pytest.raises(InvalidArgumentError, match=text):  # noqa: PT012 (either of the two may find it)
        incoming.write(change(rig.file))
        incoming.finish()
    assert rig.memory.used == 0
    assert rig.adapters.counters()["adapters"] == 0


def test_a_long_header_is_refused_unread(file: bytes) -> None:
    """It would become Python objects."""
    memory = SecureMemory(4 << 20)
    adapters = Adapters(CONFIG, memory, 4 << 20)
    for length, text in ((MAX_HEADER_BYTES, ""), (MAX_HEADER_BYTES + 8, "header is larger than")):
        raw = _padded(file, length)
        incoming = adapters.begin(RAW, len(raw))
        incoming.write(raw)
        if text:
            with pytest.raises(InvalidArgumentError, match=text):
                incoming.finish()
        else:
            incoming.finish()


def test_a_refusal_is_short_whatever_shapes_the_file_has(file: bytes) -> None:
    """A shape may have any numbers if one of them is 0."""
    memory = SecureMemory(BUDGET)
    rig, size = Rig(memory, Adapters(CONFIG, memory, BUDGET), file), int.from_bytes(file[:8], "little")
    header = json.loads(rig.file[8 : 8 + size])
    entry = next(entry for name, entry in header.items() if name.endswith("lora_A.weight"))
    entry["shape"], entry["data_offsets"] = [0, *[10**400] * 5], [0, 0]
    raw = json.dumps(header).encode()
    raw = _header(len(raw)) + raw + rig.file[8 + size :]
    incoming = rig.adapters.begin(RAW, len(raw))
    incoming.write(raw)
    with pytest.raises(InvalidArgumentError, match="has shape") as caught:
        incoming.finish()
    assert len(str(caught.value)) <= 300
    assert rig.memory.used == 0


@pytest.mark.parametrize("size", [0, 7])
def test_a_size_that_no_file_has_is_refused(rig: Rig, size: int) -> None:
    with pytest.raises(InvalidArgumentError, match="not a safetensors file"):
        rig.adapters.begin(RAW, size)
    assert rig.memory.used == 0


@pytest.mark.parametrize("size", [BUDGET, 1 << 40, 1 << 62])
def test_what_cannot_fit_is_refused_with_what_is_needed_and_what_is_free(rig: Rig, size: int) -> None:
    kept = rig.upload()
    kept.hold()
    capacity = rig.adapters.counters()["adapter_capacity"]
    needed = blocks([WORD * LORA.floats, size])
    text = rf"needs {needed} bytes .* {capacity} that are set aside, {capacity - kept.size} are free"
    with pytest.raises(ExhaustedError, match=text):
        rig.adapters.begin(RAW, size)
    assert rig.memory.used == kept.size


def test_what_is_refused_for_its_size_takes_nobody_s_place(rig: Rig) -> None:
    kept = rig.upload()
    with pytest.raises(ExhaustedError):
        rig.adapters.begin(RAW, BUDGET)
    assert rig.adapters.find(kept.name) is kept


def test_uploads_under_way_share_the_memory(rig: Rig) -> None:
    first = rig.adapters.begin(RAW, len(rig.file))
    taken, asked = rig.memory.used, 1
    while taken + rig.needed <= rig.adapters.counters()["adapter_capacity"]:
        rig.adapters.begin(RAW, len(rig.file))
        taken, asked = rig.memory.used, asked + 1
    with pytest.raises(ExhaustedError):
        rig.adapters.begin(RAW, len(rig.file))
    assert rig.memory.used == asked * rig.needed
    first.write(rig.file)
    first.finish()


def test_the_last_used_are_kept_and_those_in_use_in_any_case(rig: Rig) -> None:
    first, second, third = (rig.upload() for _ in range(3))
    first.hold()
    rig.adapters.find(second.name)  # used after the third
    fourth = rig.upload()
    for one in (first, second, fourth):
        assert rig.adapters.find(one.name) is one
    with pytest.raises(PreconditionError, match="no such adapter: upload it again"):
        rig.adapters.find(third.name)
    for one in (second, fourth):
        one.hold()
    with pytest.raises(ExhaustedError):
        rig.upload()
    assert rig.memory.used == 3 * first.size
    second.release()
    rig.upload()
    assert rig.memory.used == 3 * first.size


def test_memory_in_pieces_is_made_whole_by_giving_up_more(file: bytes) -> None:
    """What is free in sum may lie in gaps that are too small for a file."""
    one = blocks([WORD * LORA.floats])
    capacity = blocks([len(file)]) + 4 * one
    memory = SecureMemory(max(-(-capacity // 64) * 64, 4096))
    rig = Rig(memory, Adapters(CONFIG, memory, memory.budget), file)
    kept = []
    while memory.budget - memory.used >= rig.needed:
        kept.append(rig.upload())
    for adapter in kept[::2]:
        adapter.hold()
    used = memory.used
    with pytest.raises(ExhaustedError):
        rig.adapters.begin(RAW, memory.largest_free() + sum(adapter.size for adapter in kept[1::2]) - one)
    assert memory.used < used  # it tried
    for adapter in kept[::2]:
        assert rig.adapters.find(adapter.name) is adapter
        adapter.release()
    rig.upload()


def test_so_many_and_no_more_are_kept(file: bytes) -> None:
    memory = SecureMemory(1 << 20)
    rig = Rig(memory, Adapters(CONFIG, memory, 1 << 20), file)
    kept = [rig.upload() for _ in range(MAX_ADAPTERS)]
    for adapter in kept:
        adapter.hold()
    with pytest.raises(ExhaustedError, match=f"at most {MAX_ADAPTERS} adapters"):
        rig.upload()
    kept[9].release()
    rig.upload()
    assert rig.adapters.counters()["adapters"] == MAX_ADAPTERS


def test_a_worker_without_memory_for_adapters_says_how_to_get_it(memory: SecureMemory) -> None:
    adapters = Adapters(CONFIG, memory, 0)
    for work in (lambda: adapters.begin(RAW, 1000), lambda: adapters.find(b"x" * 16)):
        with pytest.raises(PreconditionError, match="start it with --adapter-memory SIZE"):
            work()


def test_a_configuration_is_refused_before_memory_is_taken(rig: Rig) -> None:
    with pytest.raises(InvalidArgumentError, match="use_dora"):
        rig.adapters.begin(json.dumps(PLAIN | {"use_dora": True}).encode(), len(rig.file))
    assert rig.memory.used == 0


def test_an_operator_s_adapter_has_its_name_and_stays(rig: Rig, tmp_path: Path) -> None:
    rig.adapters.load(f"legal-1.0={tmp_path / 'one'}")
    found = rig.adapters.find(b"legal-1.0")
    for _ in range(4):
        rig.upload()
    assert rig.adapters.find(b"legal-1.0") is found
    assert rig.adapters.counters()["adapters"] == 3


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ü", "x" * 65, "legal"])
def test_an_operator_s_names_are_plain_and_given_once(rig: Rig, tmp_path: Path, name: str) -> None:
    rig.adapters.load(f"legal={tmp_path / 'one'}")
    with pytest.raises(PreconditionError, match="NAME=DIR, every name once"):
        rig.adapters.load(f"{name}={tmp_path / 'one'}")


@pytest.mark.parametrize("missing", [lora.CONFIG, lora.WEIGHTS, "everything"])
def test_an_operator_s_folder_that_is_none_is_named(rig: Rig, tmp_path: Path, missing: str) -> None:
    if missing != "everything":
        (tmp_path / "one" / missing).unlink()
    folder = tmp_path / ("two" if missing == "everything" else "one")
    with pytest.raises(PreconditionError, match=f"{folder} is no adapter"):
        rig.adapters.load(f"legal={folder}")


def test_an_operator_s_adapter_that_is_refused_says_why(rig: Rig, tmp_path: Path) -> None:
    tensors: Tensors = tensors_of(LORA)
    tensors.popitem()
    write(tmp_path / "one", PLAIN, tensors)
    with pytest.raises(InvalidArgumentError, match="is missing"):
        rig.adapters.load(f"legal={tmp_path / 'one'}")
