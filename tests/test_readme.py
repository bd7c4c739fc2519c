"""README.md and docs/ must stay true: the annotated tree, the make targets, the commands and the links."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest

from client import flags
from client.shapes import shape
from evaluation import flags as bench_flags
from trusted_worker.config import parse as parse_worker
from wire.kv_pages import PAGE_TOKENS
from wire.layout import Demand
from wire.linears import all_specs, lookup_spec
from wire.model_config import ModelConfig
from wire.plan import plan
from wire.profiles import MIB, PROFILES
from wire.sheets import row_bytes

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = ("proto", "wire", "trusted_worker", "gpu_worker", "client", "deploy", "evaluation", "models", "docs")

_FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
_TREE_LINE = re.compile(r"^(?P<indent> *)(?P<names>\S+(?:, \S+)*)(?: {2,}\S.*|(?<=/))$")  # folders may do without text


@dataclass
class Tree:
    """What the README claims. Names with a star describe generated files: they cover, and need not be there."""

    files: set[str] = field(default_factory=set)
    patterns: set[str] = field(default_factory=set)
    folders: dict[str, int] = field(default_factory=dict)  # path -> entries below it

    def covers(self, path: str) -> bool:
        """Whether a file has a line of its own, or lies in a folder that is described as a whole."""
        whole = (folder for folder, entries in self.folders.items() if not entries)
        return (
            path in self.files
            or any(path.startswith(f"{folder}/") for folder in whole)
            or any(Path(path).parent == Path(p).parent and fnmatch(path, p) for p in self.patterns)
        )


def _tree() -> Tree:
    block = README.split("## The tree", 1)[1].split("```", 2)[1]
    tree, above = Tree(), [""]
    for line in block.splitlines()[1:]:
        match = _TREE_LINE.match(line)
        assert match, f"not `name  description`: {line!r}"
        depth = len(match["indent"]) // 2
        assert depth < len(above), f"indentation: {line!r}"
        del above[depth + 1 :]
        for name in match["names"].split(", "):
            path = f"{above[depth]}{name}"
            if above[depth]:
                tree.folders[above[depth].rstrip("/")] += 1
            if name.endswith("/"):
                tree.folders[path.rstrip("/")] = 0
                above.append(path)
            elif "*" in name:
                tree.patterns.add(path)
            else:
                tree.files.add(path)
    return tree


def _on_disk() -> list[str]:
    """Files of the listed folders: what git knows or would add, or simply all of them where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *FOLDERS]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
        return sorted(path for path in set(listed.splitlines()) if (ROOT / path).is_file())
    except (OSError, subprocess.SubprocessError):
        return sorted(_walk())


def _walk() -> Iterator[str]:
    for top in FOLDERS:
        for folder, below, names in os.walk(ROOT / top):
            below[:] = [name for name in below if name != "__pycache__" and not name.startswith(".")]
            yield from (Path(folder, name).relative_to(ROOT).as_posix() for name in names)


def _code() -> Iterator[str]:
    """Code of the README, line by line: fenced blocks, then spans."""
    for block in _FENCE.findall(README):
        yield from block.splitlines()
    yield from _SPAN.findall(_FENCE.sub("", README))


def test_every_file_is_in_the_tree() -> None:
    tree = _tree()
    missing = [path for path in _on_disk() if not tree.covers(path)]
    assert not missing, f"README.md has no line for: {', '.join(missing)}"


def test_everything_in_the_tree_exists() -> None:
    tree = _tree()
    stale = [path for path in tree.files if not (ROOT / path).is_file()]
    stale += [path for path in tree.folders if not (ROOT / path).is_dir()]
    assert not stale, f"README.md describes what is not there: {', '.join(sorted(stale))}"


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {target for line in _code() for target in re.findall(r"\bmake ([a-z][a-z-]*)", line)}
    assert {"chat", "test", "install"} <= named
    assert named <= targets, f"the Makefile has no target {', '.join(sorted(named - targets))}"


def test_every_command_line_is_accepted() -> None:
    lines = [line for block in _FENCE.findall(README) for line in block.splitlines()]
    commands = [line.removeprefix(".venv/bin/") for line in lines if re.match(r"(\.venv/bin/)?cleave ", line)]
    arguments = [match for line in lines for match in re.findall(r'make chat ARGS="([^"]*)"', line)]
    assert commands
    assert arguments
    for argv in [
        *(shlex.split(line, comments=True)[1:] for line in commands),
        *(["chat", *shlex.split(a)] for a in arguments),
    ]:
        flags.parse(argv)


def test_every_command_line_of_the_bench_is_accepted() -> None:
    text = README + (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    lines = [line for block in _FENCE.findall(text) for line in block.splitlines() if line.startswith("cleave-bench")]
    assert lines
    for line in lines:
        bench_flags.parse(shlex.split(line, comments=True)[1:])


def _divisions() -> Iterator[str]:
    """Rows of the table in docs/memory.md: what a trusted worker with default settings allocates, in KiB."""
    bank = parse_worker(["--model", str(flags.DEMO_MODEL)]).pad_bank
    for config in (ModelConfig.from_hf(flags.DEMO_MODEL), shape("qwen2.5-0.5b")):
        stock = bank // row_bytes([*all_specs(config), lookup_spec(config)])
        for scheme in ("tee-only", "secure-infer"):
            for profile in ("optee", "trustzone"):
                found = plan(Demand(config, scheme, "int8", stock=stock), PROFILES[profile].bytes)
                kib = {name: f"{round(count / 1024):,}" if count else "-" for name, count in found.parts.items()}
                kib["embedding"] = kib["embedding"].replace("-", found.layout.embed)
                kib["weights"] = kib["weights"].replace("-", found.layout.linears)
                sessions = found.slots // config.layers
                cells = [
                    f"{config.name}, {scheme}, {PROFILES[profile].bytes // MIB} MiB",
                    *(kib[name] for name in ("embedding", "weights", "norms and biases", "scales", "verification")),
                    f"{kib['scratch']} ({found.rows})",
                    f"{kib['refill']} ({found.refill_rows})" if found.refill_rows else "-",
                    f"{kib['kv cache']} ({found.slots})",
                    f"{sessions}",
                    f"{sessions * PAGE_TOKENS:,}",
                ]
                yield f"| {' | '.join(cells)} |"


def test_the_divisions_of_docs_memory_are_those_that_are_made() -> None:
    text = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    missing = [row for row in _divisions() if row not in text]
    assert not missing, "docs/memory.md lacks:\n" + "\n".join(missing)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_resolves(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target for target in _LINK.findall(text) if "://" not in target and not target.startswith("mailto:")]
    broken = [target for target in targets if not (page.parent / target).exists()]
    assert not broken, f"broken links: {', '.join(broken)}"
