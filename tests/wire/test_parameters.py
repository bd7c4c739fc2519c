"""Every parameter of every family: where it lies, and that it is read as transformers reads it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tests.model_folders import MODELS, reference_model
from wire.checkpoint import Checkpoint
from wire.errors import CheckpointError
from wire.linears import Linear, all_specs, spec
from wire.model_config import ModelConfig
from wire.parameters import Kind, Name, Parameter, parameters, read, tiles, weight_name

CASES = settings(deadline=None, max_examples=60, derandomize=True)
BUFFERS = (".attn.bias", ".rotary_pos_emb.inv_freq")  # in published checkpoints, and no parameters
F32 = npt.NDArray[np.float32]
LLAMA = {
    "ATTENTION_NORM": "input_layernorm",
    "FFN_NORM": "post_attention_layernorm",
    "Q_NORM": "self_attn.q_norm",
    "K_NORM": "self_attn.k_norm",
    "QKV": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "O": "self_attn.o_proj",
    "GATE_UP": "mlp.gate_proj mlp.up_proj",
    "DOWN": "mlp.down_proj",
}
GLM = LLAMA | {"GATE_UP": "mlp.gate_up_proj"}
GPT2 = {
    "ATTENTION_NORM": "ln_1",
    "FFN_NORM": "ln_2",
    "QKV": "attn.c_attn",
    "O": "attn.c_proj",
    "GATE_UP": "mlp.c_fc",
    "DOWN": "mlp.c_proj",
}
WHOLE = {"EMBEDDING": "embed_tokens", "FINAL_NORM": "norm"}
WHOLE_GPT2 = {"EMBEDDING": "wte", "POSITIONS": "wpe", "FINAL_NORM": "ln_f"}


def _expected(model: Any, name: Name) -> F32:
    """The rows of a parameter from transformers' own modules."""
    gpt2, base = model.config.model_type == "gpt2", model.base_model
    key = (name.kind if name.linear is None else name.linear).name
    if key == "LM_HEAD":
        modules = [model.lm_head]
    elif key in WHOLE_GPT2:
        modules = [base.get_submodule((WHOLE_GPT2 if gpt2 else WHOLE)[key])]
    else:
        paths = (GPT2 if gpt2 else GLM if model.config.model_type == "glm" else LLAMA)[key].split()
        block = (base.h if gpt2 else base.layers)[name.layer]
        modules = [block.get_submodule(path) for path in paths]
    found: list[F32] = [(one.bias if name.bias else one.weight).detach().numpy() for one in modules]
    if gpt2 and name.kind is Kind.LINEAR and not name.bias:
        found = [one.T for one in found]  # Conv1D
    return np.concatenate([one.reshape(len(one), -1) for one in found])


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(model_folder: Callable[[str], Path], name: str) -> None:
    folder = model_folder(name)
    config, checkpoint, model = ModelConfig.from_hf(folder), Checkpoint(folder), reference_model(folder)
    found = parameters(config)
    for key, parameter in found.items():
        value = read(checkpoint, parameter)
        assert parameter.name == key
        assert value.shape == (parameter.rows, parameter.width)
        assert value.flags.c_contiguous
        assert (value == _expected(model, key)).all()
    assert sum(one.rows * one.width for one in found.values()) == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_a_checkpoint_belongs_to_one_parameter(model_folder: Callable[[str], Path], name: str) -> None:
    folder = model_folder(name)
    stored = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as shard:
            stored += [one for one in shard.keys() if not one.endswith(BUFFERS)]  # noqa: SIM118
    named = [tensor for one in parameters(ModelConfig.from_hf(folder)).values() for tensor, _ in one.tensors]
    if name == "gpt2-bare":
        named = [tensor.removeprefix("transformer.") for tensor in named]
    assert sorted(stored) == sorted(named)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt2-bare", "chatglm3"])
@pytest.mark.parametrize("rows", [1, 7, 64, 10_000])
def test_tiles_of_any_height_give_the_same_rows_and_never_span_two_tensors(
    model_folder: Callable[[str], Path], name: str, rows: int
) -> None:
    folder = model_folder(name)
    config, checkpoint = ModelConfig.from_hf(folder), Checkpoint(folder)
    for parameter in parameters(config).values():
        if parameter.name.layer > 0:
            continue
        ends, end, pieces = set(np.cumsum([count for _, count in parameter.tensors]).tolist()), 0, []
        for first, tile in tiles(checkpoint, parameter, rows):
            assert first == end
            end += len(tile)
            assert len(tile) == rows or end in ends
            pieces.append(tile)
        assert end == parameter.rows
        assert (np.concatenate(pieces) == read(checkpoint, parameter)).all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 7), st.integers(1, 12), st.booleans())
@CASES
def test_any_split_into_tensors_gives_the_rows_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], width: int, rows: int, transposed: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "split"
    folder.mkdir(exist_ok=True)
    whole = torch.randn(sum(counts), width + 1)  # a width of 1 means vectors
    parts = {f"part{n}": part for n, part in enumerate(whole.split(counts))}
    save_file(
        {name: (part.T if transposed else part).contiguous() for name, part in parts.items()},
        folder / "model.safetensors",
    )
    stored = tuple((name, len(part)) for name, part in parts.items())
    parameter = Parameter(Name(Kind.LINEAR), len(whole), width + 1, stored, transposed)
    checkpoint = Checkpoint(folder)
    for first, tile in tiles(checkpoint, parameter, rows):
        assert tile.flags.c_contiguous
        assert (tile == whole[first : first + len(tile)].numpy()).all()
    assert (read(checkpoint, parameter) == whole.numpy()).all()
    checkpoint.close()


@pytest.mark.parametrize("name", MODELS)
def test_a_tied_head_is_the_embedding(model_folder: Callable[[str], Path], name: str) -> None:
    config = ModelConfig.from_hf(model_folder(name))
    head = weight_name(config, spec(config, 0, Linear.LM_HEAD))
    assert head == (Name(Kind.EMBEDDING) if config.tied else Name(Kind.LINEAR, 0, Linear.LM_HEAD))
    found = parameters(config)
    assert (Name(Kind.LINEAR, 0, Linear.LM_HEAD) in found) != config.tied
    assert all(weight_name(config, one) in found for one in all_specs(config))


def test_an_untied_gpt_2_has_a_head_that_is_not_transposed(model_folder: Callable[[str], Path]) -> None:
    config = replace(ModelConfig.from_hf(model_folder("gpt2")), tied=False)
    head = parameters(config)[Name(Kind.LINEAR, 0, Linear.LM_HEAD)]
    assert head.tensors == (("lm_head.weight", config.vocabulary),)
    assert not head.transposed


def test_a_bias_everywhere_in_chatglm(model_folder: Callable[[str], Path]) -> None:
    config = replace(ModelConfig.from_hf(model_folder("chatglm3")), o_bias=True, mlp_bias=True)
    found = parameters(config)
    up = found[Name(Kind.LINEAR, 1, Linear.GATE_UP, bias=True)]
    assert up.tensors == (("transformer.encoder.layers.1.mlp.dense_h_to_4h.bias", 2 * config.ffn),)
    assert up.width == 1


@pytest.mark.parametrize(
    ("name", "field"), [("llama", "ffn"), ("gpt2", "ffn"), ("chatglm3", "heads"), ("qwen3", "layers")]
)
def test_a_checkpoint_that_is_not_as_configured_is_refused(
    model_folder: Callable[[str], Path], name: str, field: str
) -> None:
    folder = model_folder(name)
    config = ModelConfig.from_hf(folder)
    other = replace(config, **{field: 2 * getattr(config, field)})
    checkpoint = Checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"tensor .* (has shape|is missing)"):
        _ = [read(checkpoint, parameter) for parameter in parameters(other).values()]
