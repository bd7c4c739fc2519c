"""The attacker's model: the public base with an adapter of its own, trained to say what a transcript says.

A score is made token by token: given a prompt and the adapted model's own answer so far, does the student's most likely
token equal the answer's next one? torch and peft are imported when a model is asked for, never before.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.eavesdrop import Conversation
from wire.errors import PreconditionError

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16  # those of the adapter that is attacked: the attacker is given them
TOGETHER = 16  # conversations in a step
RATE = 3e-3
MOST_TOKENS = 64  # of an answer

Pair = tuple[list[int], list[int]]  # prompt, answer


def require() -> None:
    """Before anything is recorded. Raises PreconditionError when no student could be trained."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise PreconditionError("--extraction needs peft and transformers: pip install 'cleave[dev]'") from None


def load(folder: Path, adapter: Path | None = None) -> Any:
    """The base model in float32, with an adapter folded in if one is given."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # small products: a second thread mostly waits
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.eval()


def distil(folder: Path, taught: Sequence[Conversation], steps: int, seed: int = 0) -> Any:
    """A student of what was read: its distributions after the prompts and answers become those of the transcript."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), bias="none")
    model = get_peft_model(load(folder), config).train()
    learnt = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=RATE, weight_decay=0.01)
    pick = np.random.default_rng(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (
            RATE * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        chosen = [taught[int(one)] for one in pick.integers(0, len(taught), TOGETHER)]
        _loss(model, chosen).backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.merge_and_unload().eval()


def hits(model: Any, pairs: Sequence[Pair]) -> list[tuple[int, int]]:
    """Of each pair: tokens of the answer that the model would say next as well, and tokens of the answer."""
    import torch

    found = []
    for start in range(0, len(pairs), TOGETHER):
        some = pairs[start : start + TOGETHER]
        with torch.inference_mode():
            said = model(input_ids=_padded([prompt + answer for prompt, answer in some])).logits.argmax(-1).tolist()
        for (prompt, answer), tokens in zip(some, said, strict=True):
            next_ones = tokens[len(prompt) - 1 : len(prompt) - 1 + len(answer)]
            found.append((sum(one == other for one, other in zip(next_ones, answer, strict=True)), len(answer)))
    return found


def answer(model: Any, prompts: Sequence[list[int]], end: Sequence[int]) -> list[Pair]:
    """The greedy answer to each prompt, its end included."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        given = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=MOST_TOKENS,
            eos_token_id=list(end),
            pad_token_id=0,
        )
    return [(prompt, _until(said, end)) for prompt, said in zip(prompts, given[:, longest:].tolist(), strict=True)]


def _loss(model: Any, chosen: Sequence[Conversation]) -> Any:
    """Cross-entropy between what was read and what the student says, per token of the answers."""
    import torch

    logits = model(input_ids=_padded([one.prompt + one.answer for one in chosen])).logits
    pieces = [logits[row, len(one.prompt) - 1 :][: len(one.answer)] for row, one in enumerate(chosen)]
    wanted = torch.softmax(torch.from_numpy(np.concatenate([one.logits for one in chosen])), -1)
    return torch.nn.functional.cross_entropy(torch.cat(pieces), wanted)


def _until(said: list[int], end: Sequence[int]) -> list[int]:
    """What was said up to its end, which belongs to it."""
    last = next((at for at, token in enumerate(said) if token in end), len(said) - 1)
    return said[: last + 1]


def _padded(texts: Sequence[list[int]]) -> "Tensor":
    """Token ids, padded on the right: what comes later changes nothing before it."""
    import torch

    longest = max(map(len, texts))
    return torch.tensor([text + [0] * (longest - len(text)) for text in texts])
