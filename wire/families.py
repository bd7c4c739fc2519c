"""What Hugging Face calls things, family by family: fields of config.json in, our sizes and tensor names out.

Together with `ModelConfig.from_hf` the only code that knows these names. `{}` in a tensor's name is the layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from wire.errors import CheckpointError

MAX_NUMBER = 1e12  # no finite constant of an architecture is larger
Raw = dict[str, Any]


@dataclass(frozen=True)
class Llama3Scaling:
    """Rope scaling of Llama 3.1 and later: low frequencies are divided by `factor`, high ones stay."""

    factor: float
    low: float
    high: float
    context: int  # of the original training


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings: which dims of a head rotate, in which pairs, how fast (Su et al. 2021)."""

    dims: int  # the first ones of a head; even
    interleaved: bool  # pairs are (2i, 2i + 1); else (i, i + dims / 2)
    theta: float
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True)
class Names:
    """Tensors of a checkpoint, without `.weight` and `.bias`. Several names: their rows follow each other."""

    embedding: str
    attention_norm: str
    qkv: tuple[str, ...]
    o: str
    ffn_norm: str
    gate_up: tuple[str, ...]
    down: str
    final_norm: str
    lm_head: str
    positions: str = ""
    q_norm: str = ""
    k_norm: str = ""
    transposed: bool = False  # linears are stored as [k, n]: GPT-2's Conv1D


_LAYER = "model.layers.{}."
_LLAMA = Names(
    embedding="model.embed_tokens",
    attention_norm=_LAYER + "input_layernorm",
    qkv=tuple(f"{_LAYER}self_attn.{part}_proj" for part in "qkv"),
    o=_LAYER + "self_attn.o_proj",
    ffn_norm=_LAYER + "post_attention_layernorm",
    gate_up=(_LAYER + "mlp.gate_proj", _LAYER + "mlp.up_proj"),
    down=_LAYER + "mlp.down_proj",
    final_norm="model.norm",
    lm_head="lm_head",
)
_BLOCK = "transformer.encoder.layers.{}."
_CHATGLM = Names(
    embedding="transformer.embedding.word_embeddings",
    attention_norm=_BLOCK + "input_layernorm",
    qkv=(_BLOCK + "self_attention.query_key_value",),
    o=_BLOCK + "self_attention.dense",
    ffn_norm=_BLOCK + "post_attention_layernorm",
    gate_up=(_BLOCK + "mlp.dense_h_to_4h",),
    down=_BLOCK + "mlp.dense_4h_to_h",
    final_norm="transformer.encoder.final_layernorm",
    lm_head="transformer.output_layer",
)


_GPT2_BLOCK = "transformer.h.{}."
_GPT2 = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    attention_norm=_GPT2_BLOCK + "ln_1",
    qkv=(_GPT2_BLOCK + "attn.c_attn",),
    o=_GPT2_BLOCK + "attn.c_proj",
    ffn_norm=_GPT2_BLOCK + "ln_2",
    gate_up=(_GPT2_BLOCK + "mlp.c_fc",),
    down=_GPT2_BLOCK + "mlp.c_proj",
    final_norm="transformer.ln_f",
    lm_head="lm_head",
    transposed=True,
)


def fields(raw: Raw) -> Raw:
    """Fields of ModelConfig, all but `name` and `eos`, from a parsed config.json.

    Raises CheckpointError, KeyError, TypeError.
    """
    architectures = raw.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else "none"
    if architecture not in FAMILIES:
        raise CheckpointError(f"architecture {architecture} is not supported; {', '.join(FAMILIES)} are")
    if raw.get("quantization_config"):
        raise CheckpointError("quantised checkpoints are not supported: give float32, float16 or bfloat16 weights")
    return FAMILIES[architecture](raw)


def _llama(raw: Raw) -> Raw:
    bias, mlp_bias = flag(raw, "attention_bias"), flag(raw, "mlp_bias")
    if flag(raw, "use_sliding_window"):
        raise CheckpointError("sliding windows on some of the layers are not supported; on all of them they are")
    _only(raw, "hidden_act", "silu")
    heads, hidden = positive(raw, "num_attention_heads"), positive(raw, "hidden_size")
    head_dim = positive(raw, "head_dim", _split(hidden, heads, "hidden_size", raw))
    return {
        "layers": positive(raw, "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": positive(raw, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "ffn": positive(raw, "intermediate_size"),
        "vocabulary": positive(raw, "vocab_size"),
        "max_context": positive(raw, "max_position_embeddings"),
        "norm_eps": number(raw, "rms_norm_eps", 1e-6),
        "rope": _rope(raw, head_dim),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": mlp_bias,
        "tied": flag(raw, "tie_word_embeddings"),
        "names": _LLAMA,
    }


def _qwen2(raw: Raw) -> Raw:
    return _llama(raw) | {"qkv_bias": True, "o_bias": False}


def _qwen3(raw: Raw) -> Raw:
    names = replace(_LLAMA, q_norm=_LAYER + "self_attn.q_norm", k_norm=_LAYER + "self_attn.k_norm")
    return _llama({"head_dim": 128} | raw) | {"qk_norm": True, "names": names}


def _mistral(raw: Raw) -> Raw:
    raw = {"sliding_window": 4096} | raw
    return _llama(raw) | {"window": 0 if raw["sliding_window"] is None else positive(raw, "sliding_window")}


def _gpt2(raw: Raw) -> Raw:
    _only(raw, "activation_function", "gelu_new")
    for key, value in {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}.items():
        _only(raw, key, value)
    heads, hidden = positive(raw, "n_head"), positive(raw, "n_embd")
    return {
        "layers": positive(raw, "n_layer"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": _split(hidden, heads, "n_embd", raw),
        "ffn": positive(raw, "n_inner", 4 * hidden),
        "vocabulary": positive(raw, "vocab_size"),
        "max_context": positive(raw, "n_positions"),
        "norm_eps": number(raw, "layer_norm_epsilon", 1e-5),
        "rope": None,
        "layer_norm": True,
        "gated": False,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "tied": flag(raw, "tie_word_embeddings", True),
        "names": _GPT2,
    }


def _chatglm(raw: Raw) -> Raw:
    raw = {"multi_query_attention": False} | raw
    for key, value in {
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "multi_query_attention": True,
        "original_rope": True,
        "rope_ratio": 1,  # ChatGLM2 and ChatGLM3 mean different things by another one
    }.items():
        _only(raw, key, value)
    heads, bias = positive(raw, "num_attention_heads"), flag(raw, "add_bias_linear")
    head_dim = positive(raw, "kv_channels")
    return {
        "layers": positive(raw, "num_layers"),
        "hidden": positive(raw, "hidden_size"),
        "heads": heads,
        "kv_heads": positive(raw, "multi_query_group_num"),
        "head_dim": head_dim,
        "ffn": positive(raw, "ffn_hidden_size"),
        "vocabulary": positive(raw, "padded_vocab_size"),
        "max_context": positive(raw, "seq_length"),
        "norm_eps": number(raw, "layernorm_epsilon", 1e-5),
        "rope": Rope(head_dim // 2, True, 10000.0),
        "qkv_bias": bias or flag(raw, "add_qkv_bias"),
        "o_bias": bias,
        "mlp_bias": bias,
        "tied": flag(raw, "tie_word_embeddings"),
        "names": _CHATGLM,
    }


FAMILIES: dict[str, Callable[[Raw], Raw]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "GPT2LMHeadModel": _gpt2,
    "ChatGLMModel": _chatglm,
    "ChatGLMForConditionalGeneration": _chatglm,
}


def _rope(raw: Raw, head_dim: int) -> Rope:
    described = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = number(described if "rope_theta" in described else raw, "rope_theta", 10000.0)
    kind = described.get("rope_type") or described.get("type") or "default"
    if kind == "default":
        return Rope(head_dim, False, theta)
    if kind != "llama3":
        raise CheckpointError(f"RoPE scaling of type {kind} is not supported; llama3 is")
    scaling = Llama3Scaling(
        number(described, "factor"),
        number(described, "low_freq_factor"),
        number(described, "high_freq_factor"),
        positive(described, "original_max_position_embeddings"),
    )
    if scaling.high <= scaling.low:
        raise CheckpointError("config.json: high_freq_factor must be above low_freq_factor")
    return Rope(head_dim, False, theta, scaling)


def positive(raw: Raw, key: str, default: int | None = None) -> int:
    """A positive 31-bit integer; `default` stands for a missing or null field. Raises KeyError, CheckpointError."""
    value = raw[key] if default is None else default if raw.get(key) is None else raw[key]
    if type(value) is not int or not 0 < value < 1 << 31:
        raise CheckpointError(f"config.json: {key} must be a positive integer below 2^31")
    return value


def number(raw: Raw, key: str, default: float | None = None) -> float:
    """A positive number. Raises KeyError, CheckpointError."""
    value = raw[key] if default is None else raw.get(key, default)
    if type(value) not in (int, float) or not 0 < value < MAX_NUMBER:
        raise CheckpointError(f"config.json: {key} must be a positive number")
    return float(value)


def flag(raw: Raw, key: str, default: bool = False) -> bool:
    """true or false. Raises CheckpointError for anything else."""
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} must be true or false")
    return value


def _only(raw: Raw, key: str, value: Any) -> None:
    """What would silently give other results is refused by name."""
    if raw.get(key, value) != value:
        raise CheckpointError(f"config.json: {key} = {raw[key]!r} is not supported; {value!r} is")


def _split(hidden: int, heads: int, key: str, raw: Raw) -> int | None:
    """The size of a head, when no field names it. Raises CheckpointError when the heads do not divide `hidden`."""
    if raw.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"config.json: {key} {hidden} does not divide into {heads} heads")
    return hidden // heads
