"""PEFT's files: which are taken, what every other one is refused for, and what an adapter adds to a row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.adapter_folders import PLAIN, Tensors, read, tensors_of, write
from trusted_worker.arithmetic import F32
from trusted_worker.lora import (
    MAX_CONFIG_BYTES,
    MAX_DELTA,
    WEIGHTS,
    LoraConfig,
    LowRank,
    fill,
    place,
    read_config,
)
from trusted_worker.secure_memory import Scratch, SecureMemory
from wire.checkpoint import Checkpoint, FileSource
from wire.errors import CheckpointError, InvalidArgumentError
from wire.linears import Linear
from wire.model_config import ModelConfig
from wire.scratch import MAX_RANK

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "eos_token_id": 49,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": 2,
    "n_embd": 8,
    "n_head": 2,
    "n_positions": 64,
    "vocab_size": 50,
    "eos_token_id": 49,
    "activation_function": "gelu_new",
}
CONFIG = ModelConfig.from_dict("tiny", LLAMA, {})
SAVED: dict[str, Any] = {  # what peft 0.21 writes beside it
    "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None, "base_model_name_or_path": "a/model",
    "bias": "none", "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
    "lora_bias": False, "lora_dropout": 0.1, "megatron_config": None, "megatron_core": "megatron.core",
    "modules_to_save": None, "peft_version": "0.21.2", "qalora_group_size": 16, "rank_pattern": {},
    "revision": None, "use_dora": False, "use_rslora": False,
}  # fmt: skip


def read_raw(fields: dict[str, Any], config: ModelConfig = CONFIG) -> LoraConfig:
    return read_config(json.dumps(fields).encode(), config)


def names(found: LoraConfig) -> list[str]:
    return [module.name for module in found.modules]


def test_what_peft_saves_is_taken() -> None:
    found = read_raw(PLAIN | SAVED)
    assert (found.rank, found.scale) == (2, 2.0)
    assert names(found) == [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"]
    q, v = found.modules[:2]
    assert (q.of, q.start, q.stop) == (v.of, 0, 8)
    assert (v.of.linear, v.start, v.stop) == (Linear.QKV, 12, 16)  # behind the 8 rows of q and the 4 of k


def test_a_missing_field_has_its_usual_value() -> None:
    assert read_raw(PLAIN) == read_raw(PLAIN | SAVED)
    del (fields := dict(PLAIN))["task_type"]
    assert read_raw(fields) == read_raw(PLAIN)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 0.5), (True, 2.0)])
def test_the_scale_is_alpha_over_the_rank_or_its_root(rslora: bool, scale: float) -> None:
    assert read_raw(PLAIN | {"r": 16, "lora_alpha": 8.0, "use_rslora": rslora}).scale == scale


@pytest.mark.parametrize("value", [True, False, "gaussian"])
def test_how_an_adapter_began_does_not_matter(value: object) -> None:
    assert read_raw(PLAIN | {"init_lora_weights": value}) == read_raw(PLAIN)


def test_all_linear_is_every_linear_of_the_layers_and_no_other() -> None:
    found = names(read_raw(PLAIN | {"target_modules": "all-linear"}))
    assert len(found) == len(set(found)) == 14
    assert "lm_head" not in found
    listed = read_raw(PLAIN | {"target_modules": found[::-1] + found})
    assert names(listed) == found


def test_a_name_is_a_whole_path_or_follows_a_dot() -> None:
    for target, count in (("mlp.up_proj", 2), ("layers.1.mlp.up_proj", 1), ("model.layers.1.mlp.up_proj", 1)):
        assert len(read_raw(PLAIN | {"target_modules": [target]}).modules) == count
    for target in ("p_proj", "proj", "mlp", "layers.1", "", ".", "model.layers.2.mlp.up_proj", "*"):
        with pytest.raises(InvalidArgumentError, match="target module"):
            read_raw(PLAIN | {"target_modules": [target]})


def test_fused_modules_are_one_each() -> None:
    config = ModelConfig.from_dict("gpt2", GPT2, {})
    found = read_raw(PLAIN | {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, config)
    assert [(one.of.linear, one.start, one.stop) for one in found.modules[:3]] == [
        (Linear.QKV, 0, 24),
        (Linear.O, 0, 8),
        (Linear.DOWN, 0, 8),
    ]


REFUSED_FIELDS: dict[str, list[Any]] = {
    "peft_type": ["LOHA", "lora", "", None, 1],
    "task_type": ["SEQ_CLS", "", False],
    "r": [0, -1, MAX_RANK + 1, 2.0, "2", True, None, [2]],
    "lora_alpha": [0, -1, 1e6, float("nan"), float("inf"), "8", True, None],
    "use_rslora": [1, "true", None, 0],
    "bias": ["all", "lora_only", None],
    "fan_in_fan_out": [True, None],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "eva", None],
    "use_dora": [True],
    "modules_to_save": [["lm_head"]],
    "layers_to_transform": [0, [1], 1],
    "layers_pattern": ["layers", ["h"]],
    "rank_pattern": [{"q_proj": 4}],
    "alpha_pattern": [{"q_proj": 4}],
    "exclude_modules": ["q_proj", ["q_proj"]],
    "layer_replication": [[[0, 1]]],
    "lora_bias": [True],
    "loftq_config": [{"loftq_bits": 4}],
    "trainable_token_indices": [[1]],
    "target_parameters": [["w"]],
    "use_qalora": [True],
    "something_new": [True, 0, 1, "x", {"a": None}],
}


@pytest.mark.parametrize(("field", "value"), [(key, value) for key, many in REFUSED_FIELDS.items() for value in many])
def test_what_is_not_plain_lora_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"adapter_config.json: {field} "):
        read_raw(PLAIN | SAVED | {field: value})


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_what_must_be_said_is_missed_by_name(field: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"adapter_config.json: {field} "):
        read_raw({key: value for key, value in PLAIN.items() if key != field})


@pytest.mark.parametrize(
    "targets", [None, [], {}, "q_proj", ".*_proj", r"model\.layers\.0\..*", [1], ["q_proj", None], "all_linear", 7]
)
def test_patterns_and_other_forms_of_targets_are_refused(targets: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="target_modules must be a list of names"):
        read_raw(PLAIN | {"target_modules": targets})


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "model.embed_tokens", "norm", "input_layernorm", "wte"])
def test_the_head_and_the_embeddings_are_refused_by_name(target: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"target module {target} is no linear .* cannot be adapted"):
        read_raw(PLAIN | {"target_modules": ["q_proj", target]})


@pytest.mark.parametrize("name", ["a\nb", "x" * 129, "ü", "\ud800", "a b", "\x00"])
def test_a_name_that_is_unfit_for_a_text_is_not_repeated(name: str) -> None:
    for fields in (PLAIN | {name: True}, PLAIN | {"target_modules": [name]}):
        with pytest.raises(InvalidArgumentError, match="a name that cannot be shown") as caught:
            read_raw(fields)
        assert name not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b" " * (MAX_CONFIG_BYTES + 1), "is larger than"),
    ],
)
def test_what_is_no_configuration_is_refused(raw: bytes, what: str) -> None:
    with pytest.raises(InvalidArgumentError, match=what):
        read_config(raw, CONFIG)


def test_many_targets_cost_little() -> None:
    targets = ["q_proj"] * 20_000
    assert len(names(read_raw(PLAIN | {"target_modules": targets}))) == 2


def filled(folder: Path, found: LoraConfig, tensors: Tensors) -> dict[Any, LowRank]:
    """Through a file. Raises what `fill` raises."""
    write(folder, PLAIN, tensors)
    floats: F32 = np.full(found.floats, np.nan, np.float32)
    placed = place(found, floats)
    fill(placed, found, Checkpoint.of(FileSource(folder / WEIGHTS), WEIGHTS))
    return placed


@pytest.mark.parametrize("rank", [1, 2, 5, 256])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_row_gains_what_the_formula_says(tmp_path: Path, rank: int, dtype: type[np.generic]) -> None:
    found = read_raw(PLAIN | {"r": rank, "target_modules": ["k_proj", "v_proj", "gate_proj", "down_proj"]})
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors_of(found).items()}
    placed = filled(tmp_path, found, tensors)
    scratch = Scratch(SecureMemory(1 << 17), 1 << 16)
    for of, modules in found.linears:
        x = np.random.default_rng(3).normal(size=of.k).astype(np.float32)
        y = np.zeros(of.n, np.float32)
        expected = y.astype(np.float64)
        for one in modules:
            a, b = (tensors[f"base_model.model.{one.name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
            expected[one.start : one.stop] += found.scale * (b @ (a @ x))
        assert placed[of].add(x[None], y[None], scratch)
        assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()
        untouched = np.ones(of.n, bool)
        for one in modules:
            untouched[one.start : one.stop] = False
        assert not y[untouched].any()


def test_a_row_s_bits_do_not_depend_on_where_it_lies() -> None:
    """Rows of odd widths begin at any multiple of 4 bytes."""
    random = np.random.default_rng(5)
    for k, n, rank in ((97, 53, 7), (8, 8, 1), (255, 129, 33), (1031, 517, 16)):
        low = LowRank(
            random.normal(size=(rank, k)).astype(np.float32),
            [(slice(1, n), random.normal(size=(rank, n - 1)).astype(np.float32))],
        )
        x, y = random.normal(size=(9, k)).astype(np.float32), random.normal(size=(9, n)).astype(np.float32)
        scratch, together = Scratch(SecureMemory(1 << 17), 1 << 16), y.copy()
        assert low.add(x, together, scratch)
        for row in range(9):
            alone = y[row : row + 1].copy()
            assert low.add(x[row : row + 1].copy(), alone, scratch)
            assert np.array_equal(alone[0], together[row])
            assert alone[0, 0] == y[row, 0]


@pytest.mark.parametrize("value", [1e3, 1e30, 3e38])
def test_a_result_out_of_bounds_is_told(value: float) -> None:
    low = LowRank(np.full((2, 4), value, np.float32), [(slice(0, 4), np.full((2, 4), value, np.float32))])
    with np.errstate(over="ignore", invalid="ignore"):
        x, y = np.ones((1, 4), np.float32), np.zeros((1, 4), np.float32)
        assert not low.add(x, y, Scratch(SecureMemory(4096), 1024))


def test_the_bound_is_on_the_norm_of_what_a_module_adds() -> None:
    for factor, fine in ((0.99, True), (1.01, False)):
        low = LowRank(np.ones((1, 1), np.float32), [(slice(0, 4), np.full((1, 4), MAX_DELTA / 2, np.float32))])
        x, y = np.zeros((11, 1), np.float32), np.zeros((11, 4), np.float32)
        x[9] = factor
        assert low.add(x, y, Scratch(SecureMemory(4096), 1024)) is fine


Change = Any  # (tensors, a name of A, a name of B) -> None
A, B = (f"base_model.model.model.layers.1.self_attn.v_proj.lora_{part}.weight" for part in "AB")


def _swap(tensors: Tensors) -> None:
    tensors[A], tensors[B] = tensors[B], tensors[A]


REFUSED_TENSORS: dict[str, tuple[Change, str]] = {
    "no A": (lambda t: t.pop(A), f"tensor {A} is missing"),
    "no B": (lambda t: t.pop(B), f"tensor {B} is missing"),
    "a bias": (lambda t: t.update({B.replace("weight", "bias"): t[B][:, 0]}), "v_proj.lora_B.bias belongs to no"),
    "DoRA": (lambda t: t.update({"x.lora_magnitude_vector": t[B][:, 0]}), "x.lora_magnitude_vector belongs to no"),
    "another module": (lambda t: t.update({A.replace("v_", "k_"): t[A]}), "k_proj.lora_A.weight belongs to no"),
    "another layer": (lambda t: t.update({A.replace("s.1", "s.2"): t[A]}), "layers.2.* belongs to no target module"),
    "a head": (lambda t: t.update({"base_model.model.lm_head.weight": t[A]}), "lm_head.weight belongs to no target"),
    "no prefix": (lambda t: t.update({A.partition(".")[2]: t.pop(A)}), f"tensor {A} is missing"),
    "unprintable": (lambda t: t.update({"ä\n": t[A]}), "a name that cannot be shown"),
    "a smaller rank": (lambda t: t.update({A: t[A][:1]}), r"has shape \(1, 8\)"),
    "another width": (lambda t: t.update({A: t[A][:, :7]}), r"has shape \(2, 7\)"),
    "too many rows": (lambda t: t.update({B: np.vstack([t[B], t[B]])}), r"has shape \(8, 2\)"),
    "a vector": (lambda t: t.update({B: t[B].reshape(-1)}), r"has shape \(8,\)"),
    "one more dimension": (lambda t: t.update({B: t[B][None]}), r"has shape \(1, 4, 2\)"),
    "A and B swapped": (_swap, "has shape"),
    "nothing": (lambda t: t.update({B: t[B][:0]}), r"has shape \(0, 2\)"),
    "float64": (lambda t: t.update({B: t[B].astype(np.float64)}), "has dtype F64"),
    "integers": (lambda t: t.update({A: t[A].astype(np.int8)}), "has dtype I8"),
    "not a number": (lambda t: t[A].__setitem__((1, 3), np.nan), "not finite"),
    "infinite": (lambda t: t[B].__setitem__((3, 1), -np.inf), "not finite"),
    "infinite times its scale": (lambda t: t[B].__setitem__((3, 1), 3e38), f"tensor {B} is too large"),
}


@pytest.mark.parametrize("what", REFUSED_TENSORS)
def test_tensors_that_are_not_those_of_the_configuration_are_refused_by_name(tmp_path: Path, what: str) -> None:
    found = read_raw(PLAIN)
    tensors = tensors_of(found)
    filled(tmp_path, found, tensors)
    change, text = REFUSED_TENSORS[what]
    change(tensors)
    with pytest.raises((InvalidArgumentError, CheckpointError), match=text) as caught:
        filled(tmp_path, found, tensors)
    assert "\n" not in str(caught.value)


def test_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    found = read_raw(PLAIN)
    tensors = {name: torch.from_numpy(one).bfloat16() for name, one in tensors_of(found).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    placed = place(found, np.empty(found.floats, np.float32))
    fill(placed, found, Checkpoint.of(FileSource(tmp_path / WEIGHTS), WEIGHTS))
    low = placed[found.modules[2].of]
    assert np.array_equal(low.a[2:], tensors[A].float().numpy())
    assert np.array_equal(low.b[1][1].T, tensors[B].float().numpy() * 2)


def test_large_matrices_are_read_piece_by_piece(tmp_path: Path) -> None:
    """As much as 32768 elements at a time: more than one piece, and a last one that is smaller."""
    config = ModelConfig.from_dict("wide", LLAMA | {"hidden_size": 4096, "head_dim": 8, "num_hidden_layers": 1}, {})
    found = read_raw(PLAIN | {"r": 11, "target_modules": ["o_proj", "up_proj"]}, config)
    tensors = tensors_of(found)
    placed = filled(tmp_path, found, tensors)
    for of, (one,) in found.linears:
        start = f"base_model.model.{one.name}.lora_"
        assert np.array_equal(placed[of].a, tensors[f"{start}A.weight"])
        expected = tensors[f"{start}B.weight"] * np.float32(found.scale)
        assert np.array_equal(placed[of].b[0][1].T, expected)
    assert read(tmp_path)[0] == PLAIN
