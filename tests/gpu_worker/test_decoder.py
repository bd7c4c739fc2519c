"""The decoder equals transformers in float32, agrees with itself in any chunking and batch, and stays near in int8."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gpu_worker.allowance import Allowance
from gpu_worker.cache import CacheStore
from gpu_worker.chain import forward
from gpu_worker.decoder import Decoder
from gpu_worker.model import Model
from gpu_worker.weights import Float32Weights, Int8Weights
from tests.gpu_worker.calling import HIDDEN, MODEL, TIED
from tests.model_folders import ASIDE, MODELS, greedy_reference, transformers_logits
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError
from wire.kv_pages import KvType
from wire.linears import Linear, spec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, parameters, read, weight_name
from wire.quantize import quantize_rows
from wire.v1 import gpu_worker_pb2 as pb

PROMPT = [3, 141, 59, 26, 5, 200, 260, 0, 17, 17, 99]


class Run:
    """Feeds rows of sequences to a decoder, chunk by chunk."""

    def __init__(self, decoder: Decoder, sequences: int = 1) -> None:
        self.decoder = decoder
        self.store = CacheStore(Allowance("a cache", 1 << 30))
        for number in range(sequences):
            self.store.reserve(number, decoder.config, 128, KvType.FLOAT32, "cpu")

    def step(self, chunks: dict[int, list[int]]) -> torch.Tensor:
        """Token ids by sequence -> the logits of all rows."""
        spans = self.store.find([(number, len(ids)) for number, ids in chunks.items()], self.decoder.config)
        ids = torch.tensor([i for chunk in chunks.values() for i in chunk])
        with torch.inference_mode():
            return forward(self.decoder, spans, ids, range(len(ids)))


def _decoder(folder: Path, precision: int = pb.PRECISION_FLOAT32) -> Decoder:
    decoder = Model(folder, precision, "cpu", ring_only=False).decoder
    assert decoder is not None
    return decoder


def _weight(folder: Path, layer: int, linear: Linear) -> npt.NDArray[np.float32]:
    config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
    try:
        return read(checkpoint, parameters(config)[weight_name(config, spec(config, layer, linear))])
    finally:
        checkpoint.close()


def _assert_close(got: torch.Tensor, expected: torch.Tensor, bound: float = 1e-4) -> None:
    assert float((got - expected).abs().max() / expected.abs().max()) < bound


@pytest.mark.parametrize("name", [*MODELS, *ASIDE])
def test_float32_equals_transformers(model_folders: dict[str, Path], name: str) -> None:
    folder, count = model_folders[name], 64
    run, ids = Run(_decoder(folder)), list(PROMPT)
    logits = run.step({0: ids})
    _assert_close(logits, torch.from_numpy(transformers_logits(folder, PROMPT)))
    for _ in range(count):
        ids.append(int(logits[-1].argmax()))
        logits = run.step({0: ids[-1:]})
    assert ids[len(PROMPT) :] == greedy_reference(folder, PROMPT, count)


@pytest.mark.parametrize("precision", [pb.PRECISION_FLOAT32, pb.PRECISION_INT8])
@pytest.mark.parametrize("name", ["llama-bf16-tied-sharded", "mistral", "gpt2", "chatglm3"])
def test_any_chunking_and_any_batch_agree(model_folders: dict[str, Path], precision: int, name: str) -> None:
    decoder = _decoder(model_folders[name], precision)
    whole = Run(decoder).step({0: PROMPT})
    single = Run(decoder)
    _assert_close(torch.cat([single.step({0: [i]}) for i in PROMPT]), whole)
    chunked = Run(decoder)
    _assert_close(torch.cat([chunked.step({0: PROMPT[a:b]}) for a, b in ((0, 4), (4, 5), (5, 11))]), whole)
    batch = Run(decoder, sequences=3)
    batch.step({2: PROMPT[:3], 0: [9, 8, 7]})
    mixed = batch.step({1: PROMPT[:6], 2: PROMPT[3:7], 0: [5]})
    _assert_close(mixed[:6], whole[:6])
    _assert_close(mixed[6:10], whole[3:7])


def test_a_failed_step_leaves_the_sequence_as_it_was(model_folders: dict[str, Path]) -> None:
    decoder = _decoder(model_folders[MODEL])
    run = Run(decoder)
    run.step({0: PROMPT[:5]})
    with pytest.raises(IndexError):
        run.step({0: [9999, 1]})
    _assert_close(run.step({0: PROMPT[5:]}), Run(decoder).step({0: PROMPT})[5:])


@pytest.mark.parametrize("name", [TIED, "llama", "qwen3", "gpt2-untied", "chatglm3"])
def test_int8_is_near_float32(model_folders: dict[str, Path], name: str) -> None:
    exact = Run(_decoder(model_folders[name])).step({0: PROMPT})
    near = Run(_decoder(model_folders[name], pb.PRECISION_INT8)).step({0: PROMPT})
    assert float(torch.cosine_similarity(exact, near, dim=1).min()) > 0.995


@pytest.mark.parametrize("linear", list(Linear))
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_matmul_in_both_precisions(model_folders: dict[str, Path], linear: Linear, name: str) -> None:
    folder = model_folders[name]
    exact, weight = _decoder(folder), _weight(folder, 0, linear)
    quantised, scale = quantize_rows(weight)
    x = torch.randn(3, weight.shape[1])
    _assert_close(exact.matmul(0, linear, x), x @ torch.from_numpy(weight).T)
    dequantised = torch.from_numpy(quantised * scale[:, None])
    _assert_close(_decoder(folder, pb.PRECISION_INT8).matmul(0, linear, x), x @ dequantised.T)


def test_a_precision_holds_no_copy_of_the_other(model_folders: dict[str, Path]) -> None:
    folder = model_folders["gpt2"]
    assert Model(folder, pb.PRECISION_FLOAT32, "cpu", ring_only=False).ring is None
    model = Model(folder, pb.PRECISION_INT8, "cpu", ring_only=False)
    assert model.decoder is not None
    for name in parameters(model.config):
        matrix = name.kind in (Kind.LINEAR, Kind.EMBEDDING) and not name.bias
        assert isinstance(model.decoder._find(name), Int8Weights if matrix else Float32Weights)
    ring_only = Model(folder, pb.PRECISION_INT8, "cpu", ring_only=True)
    assert ring_only.decoder is None
    assert ring_only.ring is not None
    assert Name(Kind.POSITIONS) not in ring_only.ring._parameters


def test_ring_products_use_the_shared_quantisation(model_folders: dict[str, Path]) -> None:
    model = Model(model_folders[MODEL], pb.PRECISION_INT8, "cpu", ring_only=True)
    assert model.ring is not None
    quantised, _ = quantize_rows(_weight(model_folders[MODEL], 2, Linear.GATE_UP))
    z = np.random.default_rng(1).integers(-(1 << 31), 1 << 31, (5, HIDDEN)).astype(np.int32)
    expected = (z.astype(np.int64) @ quantised.astype(np.int64).T).astype(np.int32)
    np.testing.assert_array_equal(model.ring.product(2, Linear.GATE_UP, z), expected)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(model_folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_folders[MODEL] / name).read_bytes())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(CheckpointError, match="missing"):
        Model(tmp_path, pb.PRECISION_INT8, "cpu", ring_only=False)
