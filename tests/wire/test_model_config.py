"""config.json as transformers reads it, and every variant and mistake that must not pass unnoticed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model_folders import MODELS, reference_model
from wire.errors import CheckpointError
from wire.families import FAMILIES, Rope
from wire.model_config import ModelConfig

CASES = settings(deadline=None, max_examples=200, derandomize=True)
BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "hidden_act": "silu",
    "eos_token_id": 2,
}
FIELDS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
]


def _folder(path: Path, raw: Any, generation: Any = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def _read(path: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(_folder(path, BASE | changes))


@pytest.mark.parametrize("name", MODELS)
def test_fields_are_those_of_transformers(model_folder: Callable[[str], Path], name: str) -> None:
    folder = model_folder(name)
    config, model = ModelConfig.from_hf(folder), reference_model(folder)
    theirs = model.config
    assert (config.name, config.layers, config.hidden) == (name, theirs.num_hidden_layers, theirs.hidden_size)
    heads = theirs.num_attention_heads
    assert (config.heads, config.kv_heads) == (heads, getattr(theirs, "num_key_value_heads", heads))
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    assert config.ffn == (theirs.n_inner if name.startswith("gpt2") else theirs.intermediate_size)
    assert (config.vocabulary, config.max_context) == (theirs.vocab_size, theirs.max_position_embeddings)
    assert config.norm_eps == (theirs.layer_norm_epsilon if name.startswith("gpt2") else theirs.rms_norm_eps)
    assert config.tied == theirs.tie_word_embeddings
    assert config.eos == (theirs.eos_token_id,)
    assert config.window == (getattr(theirs, "sliding_window", None) or 0)
    assert config.layer_norm == config.names.transposed == name.startswith("gpt2")
    if config.rope is None:
        assert name.startswith("gpt2")
        return
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.rope.dims == config.head_dim * theirs.rope_parameters.get("partial_rotary_factor", 1)
    layer = model.model.layers[0]
    assert config.qkv_bias == (layer.self_attn.q_proj.bias is not None)
    assert config.o_bias == (layer.self_attn.o_proj.bias is not None)
    assert config.mlp_bias == (layer.mlp.down_proj.bias is not None)
    assert config.q_width == layer.self_attn.q_proj.out_features
    assert config.kv_width == layer.self_attn.k_proj.out_features
    assert config.qk_norm == hasattr(layer.self_attn, "q_norm")


KINDS = {one: one.removesuffix("ForCausalLM").lower() for one in FAMILIES if one.endswith("ForCausalLM")}


@pytest.mark.parametrize("architecture", KINDS)
def test_defaults_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoConfig

    kind = KINDS[architecture]
    sizes = {key: BASE[key] for key in FIELDS}
    folder = _folder(tmp_path / "model", {**sizes, "architectures": [architecture], "model_type": kind})
    config, theirs = ModelConfig.from_hf(folder), AutoConfig.from_pretrained(folder)
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.rope == Rope(config.head_dim, False, theirs.rope_parameters["rope_theta"])
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert config.tied == theirs.tie_word_embeddings
    assert config.window == (getattr(theirs, "sliding_window", None) or 0)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (kind == "qwen2", False, False)


def test_defaults_of_gpt_2_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 100}
    raw = {**sizes, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    folder = _folder(tmp_path / "model", raw)
    config, theirs = ModelConfig.from_hf(folder), AutoConfig.from_pretrained(folder)
    assert (config.norm_eps, config.tied) == (theirs.layer_norm_epsilon, theirs.tie_word_embeddings)
    assert config.ffn == (theirs.n_inner or 4 * theirs.n_embd)


def test_heads_without_a_group_size_are_not_grouped(tmp_path: Path) -> None:
    raw = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
    assert ModelConfig.from_hf(_folder(tmp_path / "model", raw)).kv_heads == 4
    assert _read(tmp_path / "model", num_key_value_heads=None).kv_heads == 4


def test_a_head_size_of_its_own(tmp_path: Path) -> None:
    config = _read(tmp_path / "model", head_dim=32)
    assert (config.head_dim, config.q_width, config.kv_width) == (32, 128, 64)
    assert _read(tmp_path / "model", head_dim=None).head_dim == 16


@pytest.mark.parametrize("place", ["rope_theta", "rope_parameters", "rope_scaling"])
def test_the_base_of_the_rotation_is_found_where_versions_put_it(tmp_path: Path, place: str) -> None:
    raw = {key: value for key, value in BASE.items() if key != "rope_theta"}
    nested = {"rope_type": "default", "rope_theta": 1e6}
    raw[place] = 1e6 if place == "rope_theta" else nested
    assert ModelConfig.from_hf(_folder(tmp_path / "model", raw)).rope == Rope(16, False, 1e6)


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 3], None, (2, 3)),
        (None, None, ()),
        (2, {"eos_token_id": [5, 6]}, (5, 6)),
        (2, {"eos_token_id": 7}, (7,)),
        (2, {}, (2,)),
        (None, {"eos_token_id": 7}, (7,)),
    ],
)
def test_the_generation_config_has_the_last_word_on_the_end(
    tmp_path: Path, own: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    folder = _folder(tmp_path / "model", BASE | {"eos_token_id": own}, generation)
    assert ModelConfig.from_hf(folder).eos == expected


def test_the_name_is_the_folders(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", BASE)
    assert ModelConfig.from_hf(folder / ".." / "model").name == "model"


VARIANTS: dict[str, tuple[dict[str, Any], str]] = {  # of every family: test_families.py
    "linear scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "another activation": ({"hidden_act": "gelu"}, "gelu"),
    "a quantised checkpoint": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    "a base model": ({"architectures": ["LlamaModel"]}, "LlamaModel"),
    "no architecture": ({"architectures": []}, "none"),
    "a null architecture": ({"architectures": None}, "none"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_would_give_other_results_is_refused_by_name(tmp_path: Path, variant: str) -> None:
    changes, text = VARIANTS[variant]
    with pytest.raises(CheckpointError, match=text):
        _read(tmp_path / "model", **changes)


@pytest.mark.parametrize("harmless", [{"use_sliding_window": False, "sliding_window": 16}, {"rope_scaling": None}])
def test_a_variant_that_is_switched_off_is_fine(tmp_path: Path, harmless: dict[str, Any]) -> None:
    assert _read(tmp_path / "model", **harmless).layers == 2


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    raw = {key: value for key, value in BASE.items() if key != field}
    with pytest.raises(CheckpointError, match=field):
        ModelConfig.from_hf(_folder(tmp_path / "model", raw))


JUNK: dict[str, Any] = {
    "text": "many",
    "digits": "64",
    "a fraction": 64.5,
    "true": True,
    "null": None,
    "a list": [64],
    "an object": {"value": 64},
    "zero": 0,
    "negative": -64,
    "beyond 32 bits": 1 << 31,
    "beyond 64 bits": 1 << 70,
    "not a number": float("nan"),
    "infinite": float("inf"),
}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("field", FIELDS)
def test_a_size_that_is_not_a_positive_integer_is_refused(tmp_path: Path, field: str, junk: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _read(tmp_path / "model", **{field: JUNK[junk]})


WRONG: list[tuple[str, Any]] = [
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 8),
    ("num_key_value_heads", -2),
    ("num_key_value_heads", "2"),
    ("num_key_value_heads", [2]),
    ("num_key_value_heads", 1.5),
    ("num_key_value_heads", float("inf")),
    ("num_attention_heads", 128),  # more heads than hidden units: head_dim would be 0
    ("head_dim", 15),
    ("head_dim", -16),
    ("head_dim", "16"),
    ("head_dim", 1 << 40),
    ("rms_norm_eps", "small"),
    ("rms_norm_eps", None),
    ("rms_norm_eps", -1.0),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", [1e-5]),
    ("rope_theta", "ten thousand"),
    ("rope_theta", -1.0),
    ("rope_theta", float("nan")),
    ("rope_theta", float("inf")),
    ("rope_theta", [1e4]),
    ("rope_scaling", "linear"),
    ("rope_scaling", ["linear"]),
    ("rope_scaling", 2.0),
    ("rope_parameters", "default"),
    ("rope_parameters", {"rope_theta": "large"}),
    ("architectures", "LlamaForCausalLM"),
    ("architectures", {"name": "LlamaForCausalLM"}),
    ("architectures", 5),
    ("architectures", [["LlamaForCausalLM"]]),
    ("tie_word_embeddings", "false"),
    ("attention_bias", "no"),
    ("mlp_bias", [False]),
    ("hidden_act", ["silu"]),
    ("eos_token_id", "two"),
    ("eos_token_id", [2, "three"]),
    ("eos_token_id", [2, None]),
    ("eos_token_id", {"id": 2}),
    ("eos_token_id", [[2]]),
    ("eos_token_id", float("inf")),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_field_of_the_wrong_type_or_range_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(CheckpointError):
        _read(tmp_path / "model", **{field: value})


CONTENTS: dict[str, Any] = {
    "nothing": b"",
    "not JSON": b"hidden_size = 64",
    "half JSON": b'{"hidden_size": 6',
    "not UTF-8": b"\xff\xfe\xfd",
    "a list": [BASE],
    "a text": "config",
    "null": None,
    "nested without end": b'{"a": ' + b"[" * 200_000,
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: str, file: str) -> None:
    folder = _folder(tmp_path / "model", BASE)
    raw = CONTENTS[content]
    (folder / file).write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    with pytest.raises(CheckpointError, match=file):
        ModelConfig.from_hf(folder)


def test_a_hub_name_is_not_a_folder() -> None:
    with pytest.raises(CheckpointError, match=r"org/model is not a folder.*not downloaded"):
        ModelConfig.from_hf(Path("org/model"))


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        ModelConfig.from_hf(tmp_path)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=4,
)
OPTIONAL = ["head_dim", "rope_parameters", "rope_scaling", "attention_bias", "mlp_bias", "tie_word_embeddings"]


FIELD_NAMES = [*BASE, *OPTIONAL, "quantization_config", "use_sliding_window", "sliding_window"]


@given(
    st.sampled_from(["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]),
    st.dictionaries(st.sampled_from(FIELD_NAMES), values, min_size=1, max_size=3),
)
@CASES
def test_any_junk_is_a_configuration_or_a_checkpoint_error(architecture: str, changes: dict[str, Any]) -> None:
    _check(BASE | {"architectures": [architecture]} | changes)


GPT2 = {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128} | {
    key: BASE[key] for key in ("vocab_size", "eos_token_id")
}
CHATGLM = {
    "architectures": ["ChatGLMModel"],
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_layers": 2,
    "num_attention_heads": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 16,
    "padded_vocab_size": 100,
    "seq_length": 128,
}
MORE = ["n_inner", "layer_norm_epsilon", "scale_attn_weights", "tie_word_embeddings", "activation_function"]
MORE += ["rope_ratio", "layernorm_epsilon", "add_qkv_bias", "add_bias_linear", "rmsnorm", "original_rope"]


@pytest.mark.parametrize("base", [GPT2, CHATGLM], ids=["gpt2", "chatglm"])
@given(st.data())
@CASES
def test_any_junk_in_another_family(base: dict[str, Any], data: st.DataObject) -> None:
    names = st.sampled_from([*base, *MORE])
    _check(base | data.draw(st.dictionaries(names, values, min_size=1, max_size=3)))


def _check(raw: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_dict("junk", raw, {})
    except CheckpointError:
        return
    assert min(config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim, config.ffn) > 0
    assert config.heads % config.kv_heads == 0
    if config.head_dim < 1 << 20:
        rotating = config.rope.dims // 2 if config.rope else 0
        found = config.inverse_frequencies()
        assert found.shape == (rotating,)
        assert np.isfinite(found).all()
