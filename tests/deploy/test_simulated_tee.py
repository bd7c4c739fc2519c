"""The folder of the simulated TEE, with a signer that needs no keys; what is odd in it is left alone."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local.simulated_tee import MAX_REQUESTS, TsmFolder, measure
from wire.errors import InvalidArgumentError

DATA = bytes(range(64))
Asked = list[bytes]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tsm"
    path.mkdir(0o700)
    return path


@pytest.fixture
def asked() -> Asked:
    return []


@pytest.fixture
def served(folder: Path, asked: Asked) -> TsmFolder:
    def answer(report_data: bytes) -> tuple[bytes, bytes]:
        asked.append(report_data)
        return b"table", b"report over " + report_data

    return TsmFolder(folder, answer)


def attributes(request: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in request.iterdir()}


def names_in(request: Path) -> set[str]:
    return {path.name for path in request.iterdir()}


def test_a_request_goes_through_its_steps(folder: Path, served: TsmFolder, asked: Asked) -> None:
    request = folder / "request_1.A-b"
    request.mkdir()
    served.serve_once()
    assert attributes(request) == {"provider": b"simulated\n", "generation": b"0\n", "inblob": b""}
    served.serve_once()
    (request / "inblob").write_bytes(DATA)
    served.serve_once()
    assert attributes(request) == {
        "provider": b"simulated\n", "generation": b"1\n", "inblob": DATA,
        "auxblob": b"table", "outblob": b"report over " + DATA,
    }  # fmt: skip
    served.serve_once()
    assert asked == [DATA]
    assert [path.name for path in folder.iterdir()] == ["request_1.A-b"]


def test_provider_and_outblob_appear_after_everything_else(
    folder: Path, served: TsmFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    rename = os.rename

    def record(before: str, after: str, src_dir_fd: int, dst_dir_fd: int) -> None:
        names.append(after)
        rename(before, after, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", record)
    (folder / "request").mkdir()
    served.serve_once()
    (folder / "request" / "inblob").write_bytes(DATA)
    served.serve_once()
    assert names == ["generation", "inblob", "provider", "generation", "auxblob", "outblob"]


def test_a_part_of_the_report_data_is_waited_for(folder: Path, served: TsmFolder, asked: Asked) -> None:
    request = folder / "request"
    request.mkdir()
    for size in (0, 1, 63):
        served.serve_once()
        (request / "inblob").write_bytes(DATA[:size])
    served.serve_once()
    assert not asked
    (request / "inblob").write_bytes(DATA)
    served.serve_once()
    assert asked == [DATA]


def test_report_data_waits_for_the_keys(folder: Path) -> None:
    answers: list[tuple[bytes, bytes] | None] = [None, None, (b"table", b"report")]
    waiting = TsmFolder(folder, lambda data: answers.pop(0))
    (folder / "request").mkdir()
    waiting.serve_once()
    (folder / "request" / "inblob").write_bytes(DATA)
    for _ in range(2):
        waiting.serve_once()
        assert attributes(folder / "request") == {"provider": b"simulated\n", "generation": b"0\n", "inblob": DATA}
    waiting.serve_once()
    assert (folder / "request" / "outblob").read_bytes() == b"report"


def test_a_name_can_be_used_again(folder: Path, served: TsmFolder, asked: Asked) -> None:
    for _ in range(2):
        request = folder / "request"
        request.mkdir()
        served.serve_once()
        (request / "inblob").write_bytes(DATA)
        served.serve_once()
        for path in request.iterdir():
            path.unlink()
        request.rmdir()
        served.serve_once()
    assert asked == [DATA, DATA]


@pytest.mark.parametrize("name", [".hidden", "two words", "-flag", "ü", "line\nbreak", "a;b", "x" * 65])
def test_odd_names_are_left_alone(folder: Path, served: TsmFolder, name: str) -> None:
    (folder / name).mkdir()
    served.serve_once()
    assert not attributes(folder / name)


def test_files_and_links_are_left_alone(folder: Path, served: TsmFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "file").write_bytes(DATA)
    os.mkfifo(folder / "pipe")
    served.serve_once()
    assert not attributes(tmp_path / "elsewhere")
    assert (folder / "file").read_bytes() == DATA


def _too_long(request: Path, secret: Path) -> None:
    (request / "inblob").write_bytes(DATA + b"x")


def _link(request: Path, secret: Path) -> None:
    (request / "inblob").unlink()
    (request / "inblob").symlink_to(secret)


def _pipe(request: Path, secret: Path) -> None:
    (request / "inblob").unlink()
    os.mkfifo(request / "inblob")


def _directory(request: Path, secret: Path) -> None:
    (request / "inblob").unlink()
    (request / "inblob").mkdir()


def _gone(request: Path, secret: Path) -> None:
    (request / "inblob").unlink()


@pytest.mark.parametrize("spoil", [_too_long, _link, _pipe, _directory, _gone])
def test_what_is_no_inblob_gives_the_request_up_and_no_other(
    folder: Path, served: TsmFolder, asked: Asked, tmp_path: Path, spoil: Callable[[Path, Path], None]
) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    for name in ("bad", "good"):
        (folder / name).mkdir()
    served.serve_once()
    spoil(folder / "bad", tmp_path / "secret")
    (folder / "good" / "inblob").write_bytes(DATA)
    served.serve_once()
    served.serve_once()
    assert asked == [DATA]
    assert "outblob" not in names_in(folder / "bad")
    assert (folder / "good" / "outblob").is_file()


def test_something_in_the_way_of_an_attribute_gives_the_request_up(folder: Path, served: TsmFolder) -> None:
    (folder / "request" / "generation").mkdir(parents=True)
    served.serve_once()
    served.serve_once()
    assert names_in(folder / "request") == {"generation"}
    (folder / "next").mkdir()
    served.serve_once()
    assert names_in(folder / "next") == {"provider", "generation", "inblob"}


def test_a_directory_that_goes_away_is_forgotten(folder: Path, served: TsmFolder, asked: Asked) -> None:
    request = folder / "request"
    request.mkdir()
    served.serve_once()
    for path in request.iterdir():
        path.unlink()
    request.rmdir()
    served.serve_once()
    assert not asked
    assert not list(folder.iterdir())


def test_requests_over_the_limit_wait_for_their_turn(folder: Path, served: TsmFolder) -> None:
    for number in range(MAX_REQUESTS + 3):
        (folder / f"{number:03}").mkdir()
    served.serve_once()
    ready = [path for path in sorted(folder.iterdir()) if list(path.iterdir())]
    assert len(ready) == MAX_REQUESTS
    for path in ready[:3]:
        for attribute in path.iterdir():
            attribute.unlink()
        path.rmdir()
    served.serve_once()
    assert all(list(path.iterdir()) for path in folder.iterdir())


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701])
def test_the_folder_must_be_private(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(InvalidArgumentError, match="chmod 700"):
        TsmFolder(folder, lambda data: (b"", b""))


def test_the_folder_must_be_there_and_no_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    for path in (tmp_path / "absent", tmp_path / "link"):
        with pytest.raises(InvalidArgumentError, match="no directory"):
            TsmFolder(path, lambda data: (b"", b""))


def test_the_measurement_is_of_the_source(tmp_path: Path) -> None:
    for name in ("trusted_worker/a.py", "trusted_worker/below/b.py", "wire/c.py", "gpu_worker/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    first = measure(tmp_path)
    assert len(first) == 48
    (tmp_path / "gpu_worker/d.py").write_text("other")
    (tmp_path / "wire/notes.txt").write_text("other")
    assert measure(tmp_path) == first
    (tmp_path / "trusted_worker/below/b.py").write_text("other")
    changed = measure(tmp_path)
    (tmp_path / "trusted_worker/below/b.py").rename(tmp_path / "trusted_worker/below/e.py")
    assert len({first, changed, measure(tmp_path)}) == 3
