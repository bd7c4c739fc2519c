"""The targets by name, and one process of the offline run: a target, its frames, its report, what is kept of it."""

import argparse
import importlib
import resource
import tempfile
from pathlib import Path

from tests.fuzz import tiny
from tests.fuzz.harness import Bug, Result, Target, alarms, replay, save, shortest
from tests.fuzz.run import run

CLASSES = {
    "gpu": "GpuTarget",
    "trusted": "TrustedTarget",
    "offload": "OffloadTarget",
    "client": "ClientTarget",
    "sockets": "SocketsTarget",
    "conversation": "ConversationTarget",
    "stream_plane": "StreamPlaneTarget",
}
SHARES = {"gpu": 0.53, "trusted": 0.2, "offload": 0.15, "client": 0.03, "sockets": 0.02}  # of the frames of a whole run
SHARES |= {"conversation": 0.03, "stream_plane": 0.04}
HEADROOM = 768 << 20  # of address space: one allocation beyond it fails, and that is a bug
LARGEST_SEED = 4096  # bytes of a corpus file that is no reproducer of a bug


def make(name: str, folders: dict[str, Path]) -> Target:
    """A target over the folders of tiny.save_all."""
    target: Target = getattr(importlib.import_module(f"tests.fuzz.{name}"), CLASSES[name])(folders)
    return target


def one(work: tuple[str, int, str, argparse.Namespace]) -> list[str]:
    """One process: a target, its frames, its report. The signatures of the bugs that it found."""
    import numba
    import torch

    torch.set_num_threads(1)
    numba.set_num_threads(1)
    name, frames, seed, options = work
    with tempfile.TemporaryDirectory() as folder:
        target = make(name, tiny.save_all(Path(folder)))
        try:
            target.check()
            _cap()
            result = run(target, frames, seed, options.go_on)
            print(_report(name, seed, result), flush=True)
            if growth := getattr(target, "growth", None):
                print(f"  services grew by {growth} bytes", flush=True)
            with alarms():
                for signature, entries in result.bugs.items():
                    path = save(options.out, name, "bug-" + signature, shortest(target, entries, signature))
                    print(f"  BUG {signature}: {path}", flush=True)
                if options.seeds:
                    _keep_seeds(target, result, options.out)
        finally:
            target.close()
    return list(result.bugs)


def _keep_seeds(target: Target, result: Result, out: Path) -> None:
    for outcome, entries in sorted(result.seeds.items()):
        try:
            fewer = shortest(target, entries, outcome) if replay(target, entries) == outcome else []
        except Bug:
            continue
        if fewer and sum(map(len, fewer)) <= LARGEST_SEED:
            save(out, target.name, "-".join(filter(None, outcome)), fewer)


def _cap() -> None:
    with open("/proc/self/status") as status:
        size = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _report(name: str, seed: str, result: Result) -> str:
    rate = result.frames / max(result.seconds, 1e-9)
    lines = [f"{name} seed {seed}: {result.frames} frames in {result.seconds:.0f} s, {rate:.0f}/s"]
    lines += [f"  {count:9d}  {outcome}" for outcome, count in result.outcomes.most_common()]
    if result.worst_factor:
        lines.append(f"  traced memory: at most {result.worst_factor:.2f} x max(entry, 16 KiB)")
    return "\n".join(lines)
