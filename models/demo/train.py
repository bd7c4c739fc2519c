"""Train the demo model: the tokenizer, then a small Llama, from the text in this folder and nothing else.

    python -m models.demo.train --work build/demo

Checkpoints go to the folder given by --work and a second run continues from the last one. A batch depends on the
seed and its step only, so a run that was stopped and continued sees the same batches as one that was not. The
finished model is written, in bfloat16 and in the Hugging Face layout, into the folder given by --out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.demo.corpus import FOLDER, Exchange, normalise, read_held_out, read_text, vary

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|> {{ message['content'] | lower | replace('?', '') | trim }}<|end|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] | trim }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IGNORED = -100
LENGTHS = (24, 24, 24, 24, 24, 24, 64, 64, 128, 256, 512, 1024)
ROUTING_LAYER = 4


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints; keep it outside git")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a batch")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--muon-rate", type=float, default=0.01)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=0.0, help="stop (to be continued) after this time; 0: never")
    return parser.parse_args()


def write_question(question: str) -> str:
    """Write a question as the chat template does: in lower case, without question marks, after one space."""
    return " " + question.lower().replace("?", "").strip()


def train_tokenizer(exchanges: list[Exchange], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the questions and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [line for one in exchanges for line in (*map(write_question, one.questions), one.answer)]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def find_tokenizer(work: Path, exchanges: list[Exchange], vocabulary: int) -> Tokenizer:
    """Return the tokenizer that this training began with, or train one: text may be mended between two runs."""
    path = work / "tokenizer.json"
    if not path.exists():
        train_tokenizer(exchanges, vocabulary).save(str(path))
    return Tokenizer.from_file(str(path))


def wrap_tokenizer(tokenizer: Tokenizer, length: int) -> PreTrainedTokenizerFast:
    """Dress the tokenizer for transformers, with the chat template and the special tokens."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=END, eos_token=END, model_max_length=length,
        clean_up_tokenization_spaces=False, extra_special_tokens=[USER, ASSISTANT],
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_config(tokenizer: Tokenizer) -> LlamaConfig:
    """Describe the model: about five million parameters."""
    ids = tokenizer.get_vocab()
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        bos_token_id=ids[END],
        eos_token_id=ids[END],
    )


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Drop parts of what each block adds to the residual stream, in training only; the saved model has no trace."""

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, rate, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    model.model.embed_tokens.register_forward_hook(drop)


class Learner(nn.Module):
    """The model, and a head that says at the start of an answer which exchange it belongs to.

    The head reads a middle layer. It teaches the lower layers to tell questions apart, which the loss on the answers
    alone teaches slowly, and it is thrown away after training.
    """

    def __init__(self, model: LlamaForCausalLM, exchanges: int) -> None:
        super().__init__()
        self.model = model
        self.router = nn.Sequential(
            nn.RMSNorm(model.config.hidden_size), nn.Linear(model.config.hidden_size, exchanges)
        )

    def forward(self, ids: Tensor, labels: Tensor, routes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss per answer token, and the loss of the head per answer."""
        out = self.model.model(input_ids=ids[:, :-1], use_cache=False, output_hidden_states=True)
        learnt, starts = labels[:, 1:] != IGNORED, routes[:, :-1] != IGNORED
        logits = self.model.lm_head(out.last_hidden_state[learnt])
        routed = self.router(out.hidden_states[ROUTING_LAYER][starts])
        cross_entropy = nn.functional.cross_entropy
        return (
            cross_entropy(logits.float(), labels[:, 1:][learnt]),
            cross_entropy(routed.float(), routes[:, :-1][starts], label_smoothing=0.05),
        )


class Batches:
    """Makes the batch of any step: conversations of random exchanges with varied questions."""

    def __init__(self, exchanges: list[Exchange], tokenizer: Tokenizer, tokens: int, seed: int) -> None:
        self.exchanges, self.tokenizer, self.tokens, self.seed = exchanges, tokenizer, tokens, seed
        self.weights = [len(one.questions) ** 0.5 for one in exchanges]
        self.held_out = {normalise(question) for question, _ in read_held_out()}
        ids = tokenizer.get_vocab()
        self.user, self.assistant, self.end = ids[USER], ids[ASSISTANT], ids[END]

    def question(self, exchange: Exchange, rng: random.Random) -> str:
        """Vary one question; a variation that happens to be a held-out question is thrown away."""
        plain = rng.choice(exchange.questions)
        varied = vary(plain, rng)
        return plain if normalise(varied) in self.held_out else varied

    def turn(self, rng: random.Random) -> list[tuple[int, int, int]]:
        """Return one exchange as (id, label, route): answer and end are learnt, the start of the answer is routed."""
        index = rng.choices(range(len(self.exchanges)), self.weights)[0]
        exchange = self.exchanges[index]
        asked = self.tokenizer.encode(write_question(self.question(exchange, rng))).ids
        answered = [*self.tokenizer.encode(exchange.answer).ids, self.end]
        start = [(one, IGNORED, IGNORED) for one in (self.user, *asked, self.end)]
        return [*start, (self.assistant, IGNORED, index), *((one, one, IGNORED) for one in answered)]

    def conversation(self, length: int, rng: random.Random) -> list[tuple[int, int, int]]:
        """Return turns that fill at most the length; a single turn may be cut off."""
        turns = self.turn(rng)
        while True:
            more = self.turn(rng)
            if len(turns) + len(more) > length:
                return [*turns[:length], *[(0, IGNORED, IGNORED)] * (length - len(turns))]
            turns += more

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (ids, labels, routes) of one step, padded on the right."""
        rng = random.Random(self.seed * 1_000_003 + step)
        length = rng.choice(LENGTHS)
        rows = [self.conversation(length, rng) for _ in range(self.tokens // length)]
        ids, labels, routes = torch.tensor(rows).unbind(dim=2)
        return ids, labels, routes


def make_optimizers(learner: Learner, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding, the norms and the head."""
    matrices = [p for p in learner.model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in learner.parameters() if id(p) not in known]
    muon = torch.optim.Muon(matrices, lr=args.muon_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    return [muon, adam]


def rate_at(step: int, steps: int) -> float:
    """Return the share of the learning rate: a short warm-up, then a cosine down to nothing."""
    warm = min(100, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def take_step(learner: Learner, optimizers: list[torch.optim.Optimizer], batch: tuple[Tensor, ...]) -> Tensor:
    """Learn one batch; return the loss per answer token and the loss of the head."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, routing_loss = learner(*batch)
    (loss + 0.5 * routing_loss).backward()
    nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.stack((loss, routing_loss)).detach()


def save_checkpoint(path: Path, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write the whole state of the training, in one piece or not at all."""
    state = {"step": step, "model": model.state_dict(), "optimizers": [one.state_dict() for one in optimizers]}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Read the state of the training if there is one; return the step to go on with."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def train(learner: Learner, batches: Batches, args: argparse.Namespace) -> bool:
    """Train to the last step, or for the minutes given; return whether the last step was reached."""
    optimizers, path = make_optimizers(learner, args), args.work / "checkpoint.pt"
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first, began, mean = load_checkpoint(path, learner, optimizers), time.monotonic(), None
    learner.train()
    for step in range(first, args.steps):
        torch.manual_seed(args.seed * 1_000_003 + step)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate_at(step, args.steps)
        loss = take_step(learner, optimizers, batches(step))
        mean = loss if mean is None else 0.98 * mean + 0.02 * loss
        late = args.minutes > 0 and time.monotonic() - began > 60 * args.minutes
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {mean[0]:.4f} head {mean[1]:.4f} {time.monotonic() - began:.0f} s", flush=True)
        if (step + 1) % 250 == 0 or late:
            save_checkpoint(path, step + 1, learner, optimizers)
        if late:
            return False
    save_checkpoint(path, args.steps, learner, optimizers)
    return True


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model and the tokenizer in the Hugging Face layout, weights in bfloat16."""
    model.eval()
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 160
    model.bfloat16().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    wrap_tokenizer(tokenizer, model.config.max_position_embeddings).save_pretrained(out)
    amend(out / "config.json", rope_theta=10000.0, torch_dtype="bfloat16")
    amend(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def amend(path: Path, **fields: float | str) -> None:
    """Add fields to a JSON file, in the form that older readers of the Hugging Face layout expect."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Train, or go on training, and write the model when the last step is done."""
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    exchanges = read_text()
    tokenizer = find_tokenizer(args.work, exchanges, args.vocabulary)
    model = LlamaForCausalLM(make_config(tokenizer))
    add_dropout(model, args.dropout)
    print(f"{len(exchanges)} exchanges, {model.num_parameters():,} parameters", flush=True)
    if train(Learner(model, len(exchanges)), Batches(exchanges, tokenizer, args.tokens, args.seed), args):
        save_model(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
