"""The process of transformers, from the inside: what it answers, its caches, and its int8 linears."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation import reference_worker
from evaluation.reference_worker import PACKED_ROWS, WAYS, Generator, load, serve

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
PROMPTS = [[5, 9, 2, 7], [1, 2, 3, 4]]


@pytest.fixture(scope="module")
def model() -> Any:
    return load(DEMO, "float32", "cpu")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def answer(model: Any, kind: str) -> list[list[int]]:
    generator = Generator(model, torch, WAYS[:2])
    return [generator.begin(PROMPTS, 6, kind), *(generator.step() for _ in range(6))]


def test_answers_are_those_of_generate_whatever_the_cache(model: Any) -> None:
    found = model.generate(torch.tensor(PROMPTS), max_new_tokens=7, do_sample=False, eos_token_id=None)
    expected = found[:, 4:].T.tolist()
    assert answer(model, "dynamic") == answer(model, "static") == expected


def test_the_faster_cache_is_used_from_then_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, made = Generator(model, torch, WAYS[:2]), list[str]()
    keep = generator._new_cache

    def note(kind: str, size: int) -> Any:
        made.append(kind)
        return keep(kind, size)

    monkeypatch.setattr(generator, "_new_cache", note)
    times = iter([2.0, 3.0, 1.0, 4.0])
    monkeypatch.setattr(generator, "_timed", lambda: next(times))
    assert generator.tune(PROMPTS, 2) == "static"
    generator.begin(PROMPTS, 2)
    generator.begin(PROMPTS[:1], 2)
    assert made == ["dynamic", "static", "static", "dynamic"]


def test_steps_are_compiled_where_that_is_fastest_and_never_where_there_is_no_compiler(model: Any) -> None:
    generator = Generator(model, torch, WAYS)
    calls: list[str] = []

    def compiled(*_: Any, **__: Any) -> Any:
        calls.append("compiled")
        raise torch._dynamo.exc.TorchDynamoException

    generator._compiled = compiled
    assert generator.tune(PROMPTS, 4) in ("dynamic", "static")
    assert calls == ["compiled"]
    generator._compiled = lambda *given, **more: [calls.append("again"), model(*given, **more)][1]  # type: ignore[func-returns-value]
    generator._best[2, 4] = "compiled"
    first = generator.begin(PROMPTS, 6)
    assert [first, *(generator.step() for _ in range(6))] == answer(model, "static")
    assert calls[1:] == ["again"] * 6


def test_lines_are_answered_in_order(model: Any) -> None:
    class Both(io.StringIO):
        """Lines that are read, and beside them those that are written."""

        said = ""

        def write(self, text: str) -> int:
            self.said += text
            return len(text)

    requests: list[dict[str, Any]] = [{"prompts": PROMPTS, "room": 6}, {"tokens": 6}]
    file = Both("".join(json.dumps(one) + "\n" for one in requests))
    serve(file, Generator(model, torch, WAYS[:2]))
    assert [json.loads(line) for line in file.said.splitlines()] == answer(model, "dynamic")


@pytest.mark.parametrize("rows", [1, PACKED_ROWS - 1, PACKED_ROWS, 64])
def test_an_int8_linear_is_the_linear_but_for_rounding(rows: int) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    x = torch.randn(1, rows, 64)
    packed = reference_worker._packed(torch, linear.weight, linear.bias.bfloat16())
    found = packed(x.bfloat16()).float()
    assert found.shape == linear(x).shape
    assert (found - linear(x)).abs().max() < 0.02 * linear(x).abs().max() + 0.02


def test_every_linear_of_an_int8_model_is_packed_and_answers() -> None:
    model = load(DEMO, "int8", "cpu")
    assert not any(isinstance(one, torch.nn.Linear) for one in model.modules())
    assert sum(hasattr(one, "integers") for one in model.modules()) == 6 * 7 + 1
    assert len(answer(model, "dynamic")) == 7


def test_a_family_that_the_library_lacks_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ChatGLMModel"]}))
    with pytest.raises(SystemExit) as left:
        load(tmp_path, "float32", "cpu")
    assert left.value.code == 2
    assert capsys.readouterr().err == "transformers has no ChatGLMModel\n"
