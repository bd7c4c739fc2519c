"""What may be logged: the list is exactly what the packages log, and nothing else gets through."""

import ast
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wire.logs import ALLOWED, ListFormatter

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("wire", "trusted_worker", "gpu_worker", "deploy", "client")
METHODS = ("debug", "info", "warning", "warn", "error", "exception", "critical", "fatal", "log")
FOREIGN = "a message that is not on the list of what may be logged"
PROMPT = "Yesterday I told my doctor"


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "_pb2" not in path.name:
                yield path, ast.parse(path.read_text())


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _calls(tree: ast.Module) -> list[ast.Call]:
    """Calls of a logger's methods. A logger is called `log`, which another test sees to."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [
        node
        for node in found
        if isinstance(node.func, ast.Attribute)
        and node.func.attr in METHODS
        and _name(node.func.value) in ("log", "logging")
    ]


def test_every_logger_is_called_log() -> None:
    """Else its calls would not be found."""
    for path, tree in _trees():
        made = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node.func) == "getLogger"]
        assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and node.value in made]
        assert [[_name(target) for target in node.targets] for node in assigned] == [["log"]] * len(made), path


def test_the_list_is_what_the_packages_log() -> None:
    used = set()
    for path, tree in _trees():
        for call in _calls(tree):
            template = call.args[0]
            assert isinstance(template, ast.Constant), (path, call.lineno)
            assert isinstance(template.value, str), (path, call.lineno)
            used.add(template.value)
    assert used == ALLOWED


def test_templates_say_something_themselves() -> None:
    """`%s` alone would let everything through."""
    for template in ALLOWED:
        assert sum(letter.isalpha() for letter in template.replace("%s", "").replace("%d", "")) >= 5, template


def test_nobody_logs_what_an_exception_says() -> None:
    """Its type is enough: its text may quote a value."""
    for path, tree in _trees():
        caught = {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
        for call in _calls(tree):
            assert call.keywords == [], (path, call.lineno)
            assert not caught & {_name(argument) for argument in call.args}, (path, call.lineno)
            quoted = [
                node for node in ast.walk(call) if isinstance(node, ast.Call) and _name(node.func) in ("str", "repr")
            ]
            assert quoted == [], (path, call.lineno)


def _record(template: object, *arguments: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("some.logger", level, "path", 1, template, arguments, None)


def test_an_allowed_template_is_filled_in() -> None:
    line = ListFormatter("gpu-worker", "text").format(_record("draining: %d streams are open", 3))
    assert line.endswith("Z gpu-worker INFO some.logger draining: 3 streams are open")


@pytest.mark.parametrize("message", [PROMPT, "%s", f"draining: {PROMPT}", Exception(PROMPT), 7, b"internal error: %s"])
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_foreign_message_is_replaced(message: object, form: str) -> None:
    arguments = (PROMPT,) if "%s" in str(message) else ()
    line = ListFormatter("trusted-worker", form).format(_record(message, *arguments))
    assert FOREIGN in line
    assert "doctor" not in line


def test_a_traceback_is_left_out() -> None:
    try:
        raise ValueError(PROMPT)
    except ValueError:
        record = _record("internal error: %s", "ValueError")
        record.exc_info = sys.exc_info()
    line = ListFormatter("trusted-worker", "text").format(record)
    assert line.endswith("internal error: ValueError")


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_record_is_one_line(form: str) -> None:
    line = ListFormatter("gpu-worker", form).format(_record("internal error: %s", 'a\nb\r\x85\u2028"c"'))
    assert len(line.splitlines()) == 1


def test_json_lines_parse() -> None:
    line = ListFormatter("gpu-worker", "json").format(_record("internal error: %s", 'a\n"b"', level=logging.ERROR))
    fields = json.loads(line)
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "role": "gpu-worker", "level": "ERROR", "logger": "some.logger", "message": 'internal error: a\n"b"'
    }  # fmt: skip


PROGRAM = f"""
import logging, warnings
from wire import logs
logging.basicConfig()
logs.setup("gpu-worker", "json")
log = logging.getLogger("gpu_worker")
log.info("draining: %d streams are open", 2)
log.info("draining: %d streams are open", "{PROMPT}")
log.error("{PROMPT}")
warnings.warn("{PROMPT}")
logging.getLogger("asyncio").error("%s", "{PROMPT}", exc_info=ValueError("{PROMPT}"))
log.debug("draining: %d streams are open", 9)
"""


def test_everything_in_a_process_goes_through_the_list() -> None:
    """Warnings, tracebacks, and a template with the wrong arguments, which logging would show with them."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    said = [(line["logger"], line["message"]) for line in lines]
    foreign = [(name, FOREIGN) for name in ("gpu_worker", "py.warnings", "asyncio")]
    assert said == [("gpu_worker", "draining: 2 streams are open"), *foreign]
    assert done.stdout == ""


@pytest.mark.parametrize("worker", ["gpu_worker", "trusted_worker"])
def test_the_core_of_grpc_is_told_to_be_silent_before_it_is_imported(worker: str) -> None:
    program = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'grpc': print(os.environ.get('GRPC_VERBOSITY'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"import {worker}.__main__\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert done.stdout == "NONE\n"
