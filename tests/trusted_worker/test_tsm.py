"""configfs-tsm, as a thread of the test serves it: reports, and everything that the other side can get wrong."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trusted_worker.fake_tsm import FakeTsm, evidence
from trusted_worker import tsm
from trusted_worker.tsm import ATTEMPTS, MAX_AUX_BYTES, MAX_EVIDENCE_BYTES, MAX_QUOTE_BYTES, Report, Tsm
from wire.errors import CleaveError, DeadlineError, PreconditionError, UnavailableError

DATA = bytes(range(64))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "report"


def test_a_report_is_what_the_folder_serves(folder: Path) -> None:
    with FakeTsm(folder, "sev_guest", aux=b"table") as served:
        assert Tsm(folder).report(DATA) == Report("sev-snp", evidence(DATA), b"table")
        assert served.requests == [DATA]
        assert served.left == []


@pytest.mark.parametrize(
    ("name", "provider"), [("sev_guest", "sev-snp"), ("tdx_guest", "tdx"), ("simulated", "simulated")]
)
def test_providers_by_name_and_no_auxblob(folder: Path, name: str, provider: str) -> None:
    with FakeTsm(folder, name) as served:
        assert Tsm(folder).provider() == provider
        assert served.requests == []
        assert Tsm(folder).report(DATA) == Report(provider, evidence(DATA), b"")
        assert served.left == []


def test_every_request_has_a_directory_of_its_own(folder: Path) -> None:
    with FakeTsm(folder) as served:
        for _ in range(3):
            Tsm(folder).report(DATA)
        assert len(served.answered) == len(served.requests) == 3


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_has_64_bytes(folder: Path, size: int) -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        Tsm(folder).report(bytes(size))


def test_what_somebody_else_wrote_to_is_discarded_and_asked_again(folder: Path) -> None:
    with FakeTsm(folder, foreign=ATTEMPTS - 1) as served:
        assert Tsm(folder).report(DATA).evidence == evidence(DATA)
        assert len(served.requests) == ATTEMPTS
        assert served.left == []


def test_it_is_not_asked_for_ever(folder: Path) -> None:
    with FakeTsm(folder, foreign=ATTEMPTS) as served:
        with pytest.raises(UnavailableError, match="somebody else writes"):
            Tsm(folder).report(DATA)
        assert len(served.requests) == ATTEMPTS
        assert served.left == []


@pytest.mark.parametrize("size", [MAX_EVIDENCE_BYTES, MAX_EVIDENCE_BYTES + 1, 1 << 20])
def test_evidence_has_a_bound(folder: Path, size: int) -> None:
    with FakeTsm(folder, answer=lambda _: bytes(size)) as served:
        if size <= MAX_EVIDENCE_BYTES:
            assert len(Tsm(folder).report(DATA).evidence) == size
        else:
            with pytest.raises(UnavailableError, match="outblob has more than"):
                Tsm(folder).report(DATA)
        assert served.left == []


@pytest.mark.parametrize("size", [MAX_AUX_BYTES, MAX_AUX_BYTES + 1])
def test_the_table_has_a_bound(folder: Path, size: int) -> None:
    with FakeTsm(folder, aux=bytes(size)) as served:
        if size <= MAX_AUX_BYTES:
            assert len(Tsm(folder).report(DATA).aux) == size
        else:
            with pytest.raises(UnavailableError, match="auxblob has more than"):
                Tsm(folder).report(DATA)
        assert served.left == []


@pytest.mark.parametrize("size", [MAX_QUOTE_BYTES + 1, MAX_EVIDENCE_BYTES + 1])
def test_a_large_quote_is_of_a_kind_that_is_refused(folder: Path, size: int) -> None:
    with FakeTsm(folder, "tdx_guest", lambda _: bytes(size)), pytest.raises(PreconditionError, match="DICE"):
        Tsm(folder).report(DATA)
    with FakeTsm(folder, "sev_guest", lambda _: bytes(MAX_QUOTE_BYTES + 1)):
        assert len(Tsm(folder).report(DATA).evidence) == MAX_QUOTE_BYTES + 1


@pytest.mark.parametrize("name", ["arm_cca_guest", "sev-snp", "SEV_GUEST", "\x1b[31mno"])
def test_another_provider_is_refused_by_its_name(folder: Path, name: str) -> None:
    with FakeTsm(folder, name) as served:
        with pytest.raises(PreconditionError, match="is not supported: sev_guest, tdx_guest, simulated are") as refused:
            Tsm(folder).provider()
        assert repr(name) in str(refused.value)
        assert "\x1b" not in str(refused.value)
        assert served.left == []


def test_a_generation_that_is_no_number_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tsm._read
    monkeypatch.setattr(tsm, "_read", lambda path, most: b"one\n" if path.name == "generation" else read(path, most))
    with FakeTsm(folder), pytest.raises(UnavailableError, match="not a number"):
        Tsm(folder).report(DATA)


def test_who_never_answers_is_not_waited_for(folder: Path) -> None:
    with FakeTsm(folder, stuck=True) as served:
        with pytest.raises(DeadlineError, match="outblob"):
            Tsm(folder, 0.1).report(DATA)
        assert served.left == []


def test_a_folder_that_nobody_serves_is_not_waited_for(folder: Path) -> None:
    folder.mkdir()
    with pytest.raises(DeadlineError, match="provider"):
        Tsm(folder, 0.02).provider()
    assert list(folder.iterdir()) == []


def test_a_missing_folder_says_what_evidence_needs(folder: Path) -> None:
    with pytest.raises(PreconditionError, match=r"report is missing: evidence needs a SEV-SNP or TDX guest"):
        Tsm(folder).provider()


@pytest.mark.parametrize(("tpm", "parent"), [(True, False), (True, True), (False, False)])
def test_a_vtpm_without_the_folder_looks_like_azure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tpm: bool, parent: bool
) -> None:
    monkeypatch.setattr(tsm, "CONFIGFS", tmp_path)
    monkeypatch.setattr(tsm, "TPM", tmp_path / "tpmrm0")
    if tpm:
        (tmp_path / "tpmrm0").touch()
    if parent:
        (tmp_path / "tsm").mkdir()
    with pytest.raises(PreconditionError) as refused:
        Tsm(tmp_path / "tsm" / "report").provider()
    assert ("Azure" in str(refused.value)) == (tpm and not parent)


ERRORS = {
    errno.EACCES: (PreconditionError, "needs root"),
    errno.EPERM: (PreconditionError, "needs root"),
    errno.EROFS: (PreconditionError, "read-only"),
    errno.ENXIO: (PreconditionError, "load sev-guest"),
    errno.EFBIG: (PreconditionError, "larger than"),
    errno.EBUSY: (UnavailableError, "busy"),
    errno.ETIMEDOUT: (DeadlineError, "did not answer"),
    errno.EIO: (UnavailableError, "EIO"),
}


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("step", ["mkdir", "_read", "_write"])
def test_what_the_kernel_refuses_becomes_advice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: str
) -> None:
    kind, text = ERRORS[number]

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, "secret text of a library")

    with FakeTsm(folder) as served:
        monkeypatch.setattr(Path if step == "mkdir" else tsm, step, fail)
        with pytest.raises(CleaveError, match=text) as refused:
            Tsm(folder).report(DATA)
        monkeypatch.undo()
        assert type(refused.value) is kind
        assert "secret" not in str(refused.value)
        assert served.left == []


def test_half_a_write_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTsm(folder) as served:
        write: Callable[[int, bytes], int] = os.write
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]))
        with pytest.raises(UnavailableError, match="did not take"):
            Tsm(folder).report(DATA)
        monkeypatch.undo()
        assert served.left == []


def test_inblob_is_not_made_here(folder: Path) -> None:
    """In configfs it could not be, and elsewhere a simulator would take half a request for one."""
    folder.mkdir()
    made = folder / "one"
    made.mkdir()
    with pytest.raises(FileNotFoundError):
        tsm._write(made / "inblob", DATA)
    assert list(made.iterdir()) == []


def test_files_go_with_their_directory(folder: Path) -> None:
    folder.mkdir()
    made = folder / "one"
    made.mkdir()
    (made / "outblob").touch()
    (made / ".auxblob").touch()
    tsm._remove(made)
    assert not made.exists()
    tsm._remove(made)  # gone already
