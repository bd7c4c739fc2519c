"""The boundary is linted, and it is physical: each role runs with the others absent. The trusted code has a budget."""

import ast
import importlib.util
import io
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("trusted_worker", "gpu_worker", "client")
TRUSTED_LINES = 6_500  # raised only with a reason in an ADR
FORBIDDEN_IN_TRUSTED = ("torch", "numba", "transformers", "requests", "safetensors", "tokenizers", "jinja2")


def sources(*folders: str) -> list[Path]:
    """Hand-written Python files."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if "_pb2" not in path.name]


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    text = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines: set[int] = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_the_trusted_code_is_within_its_budget() -> None:
    total = sum(map(code_lines, sources("wire", "trusted_worker")))
    assert 500 < total <= TRUSTED_LINES


def test_our_packages_are_the_ones_that_are_imported() -> None:
    for name in ("wire", *ROLES, "deploy"):
        origin = subprocess.run(
            [sys.executable, "-c", f"import {name}; print({name}.__file__)"], capture_output=True, text=True, check=True
        ).stdout.strip()
        assert Path(origin).is_relative_to(ROOT)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_imports_with_the_others_absent(role: str, tmp_path: Path) -> None:
    """Finds what a linter cannot: computed imports. The editable install is taken off the path."""
    own = {"client": ("client", "deploy")}.get(role, (role,))
    for folder in ("wire", *own):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    modules = [
        ".".join(path.relative_to(tmp_path).with_suffix("").parts)
        for path in sorted(tmp_path.rglob("*.py"))
        if path.name != "__init__.py"
    ]
    blocked = FORBIDDEN_IN_TRUSTED if role == "trusted_worker" else ()
    # What comes with CUDA builds of torch alone.
    absent = () if importlib.util.find_spec("triton") else ("triton", "triton.language")
    program = (
        "import importlib, sys\n"
        "from unittest.mock import MagicMock\n"
        f"sys.path[:] = [{str(tmp_path)!r}] + [p for p in sys.path if p != {str(ROOT)!r}]\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"sys.modules.update({{name: MagicMock() for name in {absent!r}}})\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"others = {[r for r in ROLES if r != role]!r}\n"
        "sys.exit(any(m.partition('.')[0] in others for m in sys.modules))\n"
    )
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_product_code_asserts_or_hides_in_a_drawer() -> None:
    """`python -O` removes asserts; drawers collect what nobody named."""
    for path in sources("wire", *ROLES, "deploy"):
        tree = ast.parse(path.read_text())
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), path
        assert path.stem not in ("utils", "common", "helpers", "misc"), path


def test_files_and_functions_are_short() -> None:
    lengths: list[int] = []
    for path in sources("wire", *ROLES, "deploy"):
        text = path.read_text()
        assert text.count("\n") <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append((node.end_lineno or 0) - node.lineno + 1)
                assert lengths[-1] <= 80, (path, node.name)
    assert sorted(lengths)[len(lengths) // 2] <= 12
