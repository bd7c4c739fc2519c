"""Views of whole conversations: plain by the attacker's own forward pass, kv-shield by both workers in process."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evaluation.attacks.public_model import Layer, PublicModel
from evaluation.attacks.view import Place, View
from evaluation.leakage.prompts import Script
from evaluation.transcript import Array, Transcript
from gpu_worker.calls import Call
from gpu_worker.recording import Recording
from gpu_worker.stream import Stream
from gpu_worker.worker import Result
from tests.contract.shield import build_shield
from tests.simulators.in_process import InProcessWorker
from trusted_worker.schemes.kv_shield import Options

Table = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Shielded:
    """What the GPU worker recorded, and the truth: pi [layers, K, d], and sigma of the repeated prompt [K, d]."""

    view: View
    pi: Table
    sigma: Table


def plain(model: PublicModel, script: Script) -> View:
    """As a worker sees it that runs the model and holds the caches."""
    prompts = tuple(_held(model.run(prompt[None])) for prompt in script.prompts)
    return View(Transcript(()), prompts)


def shielded(folder: Path, into: Path, script: Script, options: Options) -> Shielded:
    """The script under kv-shield, each prompt in two steps; idle time after each."""
    rig = build_shield(folder, options)
    _record(rig.worker, into)
    rig.scheme.provision()
    sigma: Table = np.empty(0, np.uint16)
    for number, prompt in enumerate(script.prompts):
        tokens, half = [int(token) for token in prompt], -(-len(prompt) // 2)
        cache = rig.scheme.open(len(tokens))
        steps = [tokens] if len(tokens) < 4 else [tokens[:half], tokens[half:]]
        for step in steps:
            rig.step([(cache, step)])
        if number == script.knowledge.repeated:
            sigma = cache.tables[0, 0].copy()
        if options.seal_idle:
            rig.park(cache)
        cache.free()
    view = View.of(Transcript.read(into), script.knowledge.lengths)
    return Shielded(view, rig.scheme._pi[:, 0].copy(), sigma)


def _record(worker: InProcessWorker, into: Path) -> None:
    """From its next stream on, as compute.py does."""
    real, execute = worker.worker, worker.worker.execute

    def recorded(call: Call, stream: Stream) -> Result:
        answer = execute(call, stream)
        assert stream.recording is not None
        stream.recording.call(call, answer, None)
        return answer

    real._recording = Recording(into)
    real.execute = recorded  # type: ignore[method-assign]
    worker.close()


def _held(layers: list[Layer]) -> dict[Place, Array]:
    rows: dict[Place, Array] = {}
    for number, layer in enumerate(layers):
        rows["residual", number] = layer.residual[0]
        rows["qk", number] = np.concatenate([layer.q[0], layer.k[0]], axis=1).reshape(len(layer.q[0]), -1)
        rows["v", number] = rows["cache_v", number] = layer.v[0]
        rows["cache_k", number] = layer.k_rotated[0]
    return rows
