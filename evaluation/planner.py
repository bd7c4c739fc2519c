"""What a run of the bench starts: the settings of every row's cluster, and whether all of them fit into memory."""

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from client.terminal import size
from deploy.local.child import Progress
from deploy.local.cluster import Settings
from evaluation import reference
from evaluation.flags import OUTSIDE_NOTHING
from evaluation.measure import Load, Rig
from evaluation.reference import TRANSFORMERS, Reference
from evaluation.rounds import Key, Start
from evaluation.sizing import FILL, available_bytes, library_bytes, sizes
from wire.errors import ExhaustedError
from wire.model_config import ModelConfig


@dataclass(frozen=True)
class Plan:
    """How each row is started. `together`: all of them run all the time. `notes`: what is left out, and why."""

    starts: Mapping[Key, Start]
    together: bool
    notes: list[str]


class Planner:
    """From flags to a plan."""

    def __init__(self, options: argparse.Namespace, folder: Path, loads: Sequence[Load], progress: Progress) -> None:
        self._options, self._folder, self._loads, self._progress = options, folder, loads, progress
        self._config, self._available = ModelConfig.from_hf(folder), available_bytes()
        self._taken = self._parked = 0

    def plan(self) -> Plan:
        """Raises ContextError for a context that the model lacks, ExhaustedError for pads that the disk cannot hold."""
        starts, notes = dict[Key, Start](), list[str]()
        if any(scheme == TRANSFORMERS for scheme, _ in self._options.rows) and (why := reference.missing()):
            notes.append(why)
        for scheme, precision in self._options.rows:
            if scheme == TRANSFORMERS:
                starts |= {} if notes else {Key(scheme, precision, "-"): self._library(precision)}
            else:
                planes = ("-",) if scheme in OUTSIDE_NOTHING else self._options.planes
                starts |= {Key(scheme, precision, plane): self._cluster(scheme, precision, plane) for plane in planes}
        together = not self._options.one_at_a_time and self._taken <= FILL * self._available
        return Plan(starts, together, notes)

    def _cluster(self, scheme: str, precision: str, plane: str) -> Start:
        options, prompts = self._options, self._options.prefill == "worker"
        needed = sizes(self._config, scheme, precision, self._loads, self._available, prompts)
        self._taken += needed.resident
        if scheme == "secure-infer":
            self._require_room(int(options.pad_bank or needed.pad_bank))
        budget, bank = budget_flag(options, needed.memory_budget), str(options.pad_bank or needed.pad_bank)
        more = (*worker_flags(options, plane), "--prefill", options.prefill)
        if scheme == "secure-infer" and options.projections:
            more += ("--projections", options.projections)
        settings = Settings(self._folder, scheme, precision, budget, bank, options.device, more=more)
        return partial(Rig, settings, self._loads, self._progress)

    def _require_room(self, bank: int) -> None:
        self._parked += bank
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if self._parked > FILL * free:
            raise ExhaustedError(
                f"the banks of pads would take {size(self._parked)}, and {tempfile.gettempdir()} has {size(free)}: "
                "leave --prefill worker out, or give --pad-bank, shorter prompts or smaller batches"
            )

    def _library(self, precision: str) -> Start:
        self._taken += library_bytes(self._config, precision)
        how = precision, self._options.device, not self._options.no_compile
        return partial(Reference, self._folder, *how, self._loads, self._progress)


def budget_flag(options: argparse.Namespace, default: int) -> str | None:
    """For the trusted worker's command line; None where the profile says it."""
    given: int | None = options.memory_budget
    return None if options.tee_profile and given is None else str(given or default)


def worker_flags(options: argparse.Namespace, plane: str) -> tuple[str, ...]:
    """Further words of the trusted worker's command line."""
    profile = ("--tee-profile", options.tee_profile) if options.tee_profile else ()
    data_plane = ("--data-plane", plane) if plane == "stream" else ()
    return (*profile, *data_plane, *(("--switch-us", str(options.switch_us)) if options.switch_us else ()))
