"""Every architecture: published configurations, what is refused by name, and how fast transformers rotates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model_folders import reference_model
from wire.errors import CheckpointError
from wire.families import FAMILIES, Llama3Scaling, Rope
from wire.model_config import ModelConfig
from wire.parameters import parameters

CASES = settings(deadline=None, max_examples=60, derandomize=True)
Raw = dict[str, Any]
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PUBLISHED: dict[str, tuple[int, Raw]] = {  # parameters, and what config.json says of the architecture
    "Llama-3.1-8B": (
        8_030_261_248,
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": SCALING | {"rope_type": "llama3"},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "eos_token_id": 128001,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "architectures": ["MistralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "eos_token_id": 2,
        },
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "max_window_layers": 24,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "eos_token_id": 151643,
        },
    ),
    "Qwen3-8B": (
        8_190_735_360,
        {
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
            "attention_bias": False,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "eos_token_id": 151645,
        },
    ),
    "gpt2": (
        124_439_808,
        {
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "n_ctx": 1024,
            "vocab_size": 50257,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "eos_token_id": 50256,
        },
    ),
    "chatglm3-6b": (
        6_243_584_000,
        {
            "architectures": ["ChatGLMModel"],
            "hidden_size": 4096,
            "ffn_hidden_size": 13696,
            "num_layers": 28,
            "num_attention_heads": 32,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "kv_channels": 128,
            "padded_vocab_size": 65024,
            "seq_length": 8192,
            "layernorm_epsilon": 1e-5,
            "rmsnorm": True,
            "post_layer_norm": True,
            "apply_residual_connection_post_layernorm": False,
            "original_rope": True,
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "tie_word_embeddings": False,
            "eos_token_id": 2,
        },
    ),
}
BY_KIND = {raw["architectures"][0]: name for name, (_, raw) in PUBLISHED.items()}
BY_KIND["ChatGLMForConditionalGeneration"] = "chatglm3-6b"


def _read(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict("model", PUBLISHED[name][1] | changes, {})


def test_every_supported_architecture_is_tested_here() -> None:
    assert set(BY_KIND) == set(FAMILIES)


@pytest.mark.parametrize("architecture", BY_KIND)
def test_the_parameters_of_a_published_model_are_all_counted(architecture: str) -> None:
    name = BY_KIND[architecture]
    config = _read(name, architectures=[architecture])
    assert sum(one.rows * one.width for one in parameters(config).values()) == PUBLISHED[name][0]


def test_llama_3() -> None:
    config = _read("Llama-3.1-8B")
    assert (config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim) == (32, 4096, 32, 8, 128)
    assert (config.ffn, config.vocabulary, config.max_context, config.norm_eps) == (14336, 128256, 131072, 1e-5)
    assert config.rope == Rope(128, False, 500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.tied) == (False, False, False, False)
    assert (config.window, config.qk_norm) == (0, False)
    assert config.gated
    assert not config.layer_norm
    assert config.eos == (128001,)
    biased = _read("Llama-3.1-8B", attention_bias=True, mlp_bias=True)
    assert biased.qkv_bias
    assert biased.o_bias
    assert biased.mlp_bias


def test_mistral_has_a_window_or_none() -> None:
    config = _read("Mistral-7B-v0.1")
    assert (config.window, config.rope, config.kv_heads) == (4096, Rope(128, False, 10000.0), 8)
    assert _read("Mistral-7B-v0.1", sliding_window=None).window == 0
    assert ModelConfig.from_dict("model", _without("Mistral-7B-v0.1", "sliding_window"), {}).window == 4096


def test_qwen_2_has_biases_where_q_k_and_v_are_made_and_no_window() -> None:
    config = _read("Qwen2.5-0.5B")
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)
    assert (config.tied, config.window, config.head_dim, config.kv_width) == (True, 0, 64, 128)


def test_qwen_3_normalises_heads_of_its_own_size() -> None:
    config = _read("Qwen3-8B", hidden_size=1024, num_attention_heads=16)
    assert (config.qk_norm, config.head_dim, config.q_width) == (True, 128, 2048)
    assert not config.qkv_bias
    assert ModelConfig.from_dict("model", _without("Qwen3-8B", "head_dim"), {}).head_dim == 128


def test_gpt_2_has_learned_positions_and_a_bias_everywhere() -> None:
    config = _read("gpt2")
    assert (config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim) == (12, 768, 12, 12, 64)
    assert (config.ffn, config.vocabulary, config.max_context, config.norm_eps) == (3072, 50257, 1024, 1e-5)
    assert config.rope is None
    assert config.inverse_frequencies().shape == (0,)
    assert config.layer_norm
    assert config.qkv_bias
    assert config.o_bias
    assert config.mlp_bias
    assert config.tied
    assert not config.gated
    assert _read("gpt2", n_inner=1000).ffn == 1000
    assert not _read("gpt2", tie_word_embeddings=False).tied


def test_chatglm_rotates_half_of_a_head() -> None:
    config = _read("chatglm3-6b")
    assert (config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim) == (28, 4096, 32, 2, 128)
    assert (config.ffn, config.vocabulary, config.max_context, config.norm_eps) == (13696, 65024, 8192, 1e-5)
    assert config.rope == Rope(64, True, 10000.0)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.tied) == (True, False, False, False)
    assert _read("chatglm3-6b", rope_ratio=1).rope == Rope(64, True, 10000.0)
    with pytest.raises(CheckpointError, match="rope_ratio"):
        _read("chatglm3-6b", rope_ratio=50)
    assert _read("chatglm3-6b", add_bias_linear=True).o_bias


REFUSED: list[tuple[str, Raw, str]] = [
    ("Llama-3.1-8B", {"num_attention_heads": 24, "num_key_value_heads": 8}, "hidden_size 4096 .* 24 heads"),
    ("gpt2", {"n_head": 7}, "n_embd 768 .* 7 heads"),
    ("Llama-3.1-8B", {"num_key_value_heads": 5}, "32 query heads .* 5 key heads"),
    ("chatglm3-6b", {"multi_query_group_num": 3}, "32 query heads .* 3 key heads"),
    ("Qwen3-8B", {"head_dim": 127}, "127 dims"),
    ("gpt2", {"n_head": 256}, "3 dims"),
    ("chatglm3-6b", {"kv_channels": 126}, "126 dims"),  # of which 63 would rotate
    ("Llama-3.1-8B", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ("Qwen2.5-0.5B", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ("Qwen3-8B", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, "dynamic"),
    ("Llama-3.1-8B", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ("Llama-3.1-8B", {"rope_scaling": SCALING | {"type": "llama3", "high_freq_factor": 1.0}}, "high_freq_factor"),
    ("Qwen2.5-0.5B", {"use_sliding_window": True}, "sliding"),
    ("Qwen3-8B", {"use_sliding_window": True, "sliding_window": 4096}, "sliding"),
    ("Llama-3.1-8B", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("Mistral-7B-v0.1", {"hidden_act": None}, "hidden_act = None"),
    ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
    ("chatglm3-6b", {"rmsnorm": False}, "rmsnorm = False"),
    ("chatglm3-6b", {"post_layer_norm": False}, "post_layer_norm = False"),
    ("chatglm3-6b", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("chatglm3-6b", {"multi_query_attention": False}, "multi_query_attention = False"),
    ("chatglm3-6b", {"original_rope": False}, "original_rope = False"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "quantised"),
    ("gpt2", {"architectures": ["GPT2Model"]}, "GPT2Model"),
]


@pytest.mark.parametrize(("name", "changes", "text"), REFUSED)
def test_what_would_give_other_results_is_refused_by_name(name: str, changes: Raw, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        _read(name, **changes)


def test_an_unknown_architecture_is_told_which_ones_are_known() -> None:
    with pytest.raises(CheckpointError) as caught:
        _read("gpt2", architectures=["FalconForCausalLM"])
    assert all(known in str(caught.value) for known in ("FalconForCausalLM", *FAMILIES))


def _without(name: str, field: str) -> Raw:
    return {key: value for key, value in PUBLISHED[name][1].items() if key != field}


FIELDS = [(name, field) for name, (_, raw) in PUBLISHED.items() for field in raw]
LLAMA = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
GPT2 = ["n_embd", "n_layer", "n_head", "n_positions"]
CHATGLM = ["ffn_hidden_size", "num_layers", "multi_query_group_num", "kv_channels", "padded_vocab_size", "seq_length"]
REQUIRED = {"architectures", "max_position_embeddings", "multi_query_attention", *LLAMA, *GPT2, *CHATGLM}
IGNORED = {"n_ctx", "max_window_layers"}
NULLABLE = {"num_key_value_heads", "head_dim", "rope_scaling", "sliding_window", "eos_token_id", *IGNORED}
JUNK = {"text": "many", "negative": -1, "huge": 1 << 70, "fraction": 0.5, "list": [1], "object": {"a": 1}}
FINE: dict[str, tuple[str, ...]] = {  # what is no junk there
    **dict.fromkeys(IGNORED, tuple(JUNK)),
    "rms_norm_eps": ("fraction",),
    "layer_norm_epsilon": ("fraction",),
    "layernorm_epsilon": ("fraction",),
    "rope_theta": ("fraction",),
    "rope_scaling": ("object",),
    "eos_token_id": ("list",),
}


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_junk_in_a_field_is_refused_with_its_name(name: str, field: str) -> None:
    for junk, value in JUNK.items():
        if junk in FINE.get(field, ()) or (field == "sliding_window" and not name.startswith("Mistral")):
            assert _read(name, **{field: value}).layers
        else:
            with pytest.raises(CheckpointError, match=rf"{field.removesuffix('s')}|wrong type"):
                _read(name, **{field: value})


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_null_field_is_refused_with_its_name_or_optional(name: str, field: str) -> None:
    if field in NULLABLE:
        assert _read(name, **{field: None}).layers
        return
    with pytest.raises(CheckpointError, match=field.removesuffix("s")):
        _read(name, **{field: None})


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_missing_size_is_named_and_what_has_a_default_may_be_missing(name: str, field: str) -> None:
    raw = _without(name, field)
    if field in REQUIRED:
        with pytest.raises(CheckpointError, match=field.removesuffix("s")):
            ModelConfig.from_dict("model", raw, {})
    else:
        assert ModelConfig.from_dict("model", raw, {}).layers


@pytest.mark.parametrize("name", ["llama", "llama3-scaled", "qwen2", "qwen3", "mistral", "chatglm3"])
def test_pairs_rotate_as_fast_as_in_transformers(model_folder: Callable[[str], Path], name: str) -> None:
    folder = model_folder(name)
    expected = reference_model(folder).model.rotary_emb.inv_freq.numpy()
    found = ModelConfig.from_hf(folder).inverse_frequencies()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@given(
    st.sampled_from([1e4, 5e5, 1e6]),
    st.floats(1, 64),
    st.floats(0.5, 4),
    st.floats(1, 16),
    st.integers(1, 1 << 17),
    st.sampled_from([8, 64, 128]),
)
@CASES
def test_any_llama_3_scaling_is_that_of_transformers(
    theta: float, factor: float, low: float, more: float, context: int, head_dim: int
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": low + more}
    scaling["original_max_position_embeddings"] = context
    described = scaling | {"rope_type": "llama3", "rope_theta": theta}
    sizes: dict[str, Any] = {"head_dim": head_dim, "max_position_embeddings": 1 << 18}
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**sizes, rope_parameters=described), None)
    config = _read("Llama-3.1-8B", **sizes, rope_scaling=None, rope_parameters=described)
    np.testing.assert_allclose(config.inverse_frequencies(), expected.numpy(), rtol=1e-5)
