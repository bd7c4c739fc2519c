"""Settings of the GPU worker: what is taken, what is refused in one line, and the way back from --print-config."""

from pathlib import Path

import pytest

from gpu_worker.config import Settings, parse
from tests.gpu_worker.calling import MODEL, TIED
from wire.errors import CleaveError, DeniedError, PreconditionError
from wire.tls import Tls

EVERYTHING = [
    "--listen=unix:/run/gpu.sock", "--model=one", "--model=t w o", "--device=cpu", "--ops=ring", "--threads=3",
    "--request-seconds=1.5", "--drain-seconds=20", "--reflection", "--metrics=127.0.0.1:9464", "--log-format=json",
    "--tls-certificate=c", "--tls-key=k", "--tls-authority=a", "--insecure-plaintext", "--parent=7",
]  # fmt: skip


def test_defaults() -> None:
    settings = parse(["--model", "one"])
    assert (settings.listen, settings.model, settings.device) == ("127.0.0.1:0", [Path("one")], "auto")
    assert settings.threads >= 1
    assert (settings.ring_only, settings.reflection, settings.metrics, settings.tls()) == (False, False, None, None)
    assert (settings.request_seconds, settings.drain_seconds) == (60, 5)
    assert settings.stream is None


def test_the_stream_socket_lies_beside_a_unix_socket_or_where_it_is_told() -> None:
    assert parse(["--model=one", "--listen=unix:/run/gpu"]).stream == "unix:/run/gpu.stream"
    for listen in ("unix:/run/gpu", "127.0.0.1:0"):
        told = parse(["--model=one", f"--listen={listen}", "--stream=vsock:4294967295:5000"])
        assert told.stream == "vsock:4294967295:5000"


def test_everything_is_taken_and_printed_and_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = parse(EVERYTHING)
    assert settings.model == [Path("one"), Path("t w o")]
    assert (settings.ring_only, settings.threads, settings.parent) == (True, 3, 7)
    assert settings.tls() == Tls(Path("c"), Path("k"), Path("a"))
    with pytest.raises(SystemExit) as caught:
        parse([*EVERYTHING, "--print-config"])
    assert caught.value.code == 0
    file = tmp_path / "gpu.toml"
    file.write_text(capsys.readouterr().out)
    assert parse(["--config", str(file)]) == settings
    monkeypatch.setenv("CLEAVE_GPU_CONFIG", str(file))
    monkeypatch.setenv("CLEAVE_GPU_THREADS", "2")
    assert parse([]) == Settings(**{**vars(settings), "threads": 2})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--threads", "0"), ("--threads", "many"), ("--threads", "²"), ("--device", "tpu"), ("--ops", "none"),
        ("--stream", "tcp:1"), ("--stream", "vsock:1"),
        ("--listen", "127.0.0.1:99999"), ("--listen", "127.0.0.1"), ("--listen", "127.0.0.1:²"),
        ("--request-seconds", "0"), ("--request-seconds", "nan"), ("--drain-seconds", "inf"),
        ("--drain-seconds", "-1"), ("--drain-seconds", "soon"), ("--log-format", "xml"), ("--parent", "me"),
        ("--colour", "red"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--model", "one", f"{option}={value}"])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("cleave-gpu-worker: error: ")
    assert option in last


def test_there_must_be_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([])
    assert "--model" in capsys.readouterr().err


def test_folders_have_different_names(model_folders: dict[str, Path]) -> None:
    both = [model_folders[TIED], model_folders[MODEL]]
    assert parse([f"--model={one}" for one in both]).folders() == dict(zip((TIED, MODEL), both, strict=True))
    with pytest.raises(PreconditionError, match="two model folders"):
        parse([f"--model={both[0]}", f"--model={both[0]}"]).folders()
    with pytest.raises(CleaveError, match="is not a folder") as caught:
        parse(["--model", "no/such/folder"]).folders()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "gpu.example:7000", ":7000"])
def test_plaintext_stays_on_this_machine(address: str) -> None:
    words = ["--model=one", f"--listen={address}"]
    with pytest.raises(PreconditionError, match="--insecure-plaintext"):
        parse(words).tls()
    assert parse([*words, "--insecure-plaintext"]).tls() is None
    assert parse([*words, "--tls-certificate=c", "--tls-key=k", "--tls-authority=a"]).tls() is not None


def test_half_of_tls_is_none() -> None:
    for listen in ("127.0.0.1:0", "0.0.0.0:0"):
        with pytest.raises(DeniedError, match="--tls-authority"):
            parse(["--model=one", f"--listen={listen}", "--tls-certificate=c", "--tls-key=k"]).tls()


def test_help_names_the_other_two_sources(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0
    assert "CLEAVE_GPU_DRAIN_SECONDS" in said
    assert "TOML" in said
