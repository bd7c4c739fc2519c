"""Random LoRA adapters in PEFT folders, and what peft and transformers say about them. Made from fixed seeds.

transformers has no class for ChatGLM3 (see model_folders.py): its adapter is made on the twin. There q, k and v have
an A and a B each; the twin's A are made equal, so that one A and the three B below each other say the same.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.model_folders import reference_folder, reference_model
from trusted_worker.adapters import Adapter, Adapters
from trusted_worker.lora import CONFIG, WEIGHTS, LoraConfig

Tensors = dict[str, npt.NDArray[Any]]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
_GPT2 = ("c_attn", "c_proj", "c_fc")
_GLM = {"gate_up_proj": "mlp.dense_h_to_4h", "down_proj": "mlp.dense_4h_to_h", "o_proj": "self_attention.dense"}

PLAIN = {  # a configuration that is taken
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
}


@dataclass(frozen=True)
class Case:
    """One adapter: `targets` as peft takes them."""

    rank: int = 4
    alpha: float = 8
    rslora: bool = False
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    seed: int = 1


@dataclass
class Made:
    """A folder, and peft's model of it in float32."""

    folder: Path
    model: Any = field(repr=False)

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """float32[len(ids), vocabulary]."""
        import torch

        with torch.no_grad():
            found: npt.NDArray[np.float32] = self.model(torch.tensor([ids])).logits[0].numpy()
        return found

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The next `count` tokens; an end of sequence ends nothing."""
        import torch

        ids = torch.tensor([prompt])
        found = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)
        rest: list[int] = found[0].tolist()[len(prompt) :]
        return rest


def everything(folder: Path) -> tuple[str, ...] | str:
    """Names of all linears of a model's layers, as one would say them to peft."""
    return _GPT2 if "gpt2" in folder.name else "all-linear"


def make(model: Path, folder: Path, case: Case) -> Made:
    """An adapter of the model in a folder of model_folders.save."""
    import peft
    import torch

    torch.manual_seed(case.seed)
    twin = reference_folder(model) != model
    targets = ["q_proj", "k_proj", "v_proj", *_GLM] if twin else case.targets
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=case.alpha,  # type: ignore[arg-type]
        use_rslora=case.rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        lora_dropout=0.1,
        fan_in_fan_out="gpt2" in model.name,
    )
    adapted = peft.get_peft_model(copy.deepcopy(reference_model(model)), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
        for name, parameter in adapted.named_parameters() if twin else ():
            if "k_proj.lora_A" in name or "v_proj.lora_A" in name:
                parameter.copy_(adapted.get_parameter(name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")))
    adapted.save_pretrained(str(folder))
    if twin:
        _rename(folder)
    return Made(folder, adapted)


def read(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Configuration and tensors."""
    from safetensors.numpy import load_file

    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


def write(folder: Path, config: Any, tensors: Tensors) -> None:
    """The folder of an adapter."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(one) for name, one in tensors.items()}, folder / WEIGHTS)


def tensors_of(found: LoraConfig, seed: int = 0) -> Tensors:
    """Random A and B of every module, as peft names them."""
    random, tensors = np.random.default_rng(seed), Tensors()
    for module in found.modules:
        start = f"base_model.model.{module.name}.lora_"
        tensors[f"{start}A.weight"] = random.normal(size=(found.rank, module.of.k)).astype(np.float32)
        tensors[f"{start}B.weight"] = random.normal(size=(module.stop - module.start, found.rank)).astype(np.float32)
    return tensors


def upload(adapters: Adapters | None, folder: Path, piece: int = 1000) -> Adapter:
    """As a client does it."""
    assert adapters is not None
    raw = (folder / WEIGHTS).read_bytes()
    incoming = adapters.begin((folder / CONFIG).read_bytes(), len(raw))
    for first in range(0, len(raw), piece):
        incoming.write(raw[first : first + piece])
    return incoming.finish()


def _rename(folder: Path) -> None:
    """From the twin's names to ChatGLM3's."""
    config, tensors = read(folder)
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        _, layer, rest = name.removeprefix("base_model.model.model.").split(".", 2)
        _, module, part, _ = rest.split(".")
        start = f"base_model.model.transformer.encoder.layers.{layer}."
        if module in _GLM:
            renamed[f"{start}{_GLM[module]}.{part}.weight"] = tensor
        elif module == "q_proj":
            fused = [tensors[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            renamed[f"{start}self_attention.query_key_value.{part}.weight"] = (
                tensor if part == "lora_A" else np.concatenate(fused)
            )
    config["target_modules"] = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    write(folder, config, renamed)
