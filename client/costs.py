"""What a scheme costs, from the sizes of a model alone: exchanges, bytes, multiplications, memory.

Counts are those of one decoded token (one row, logits wanted) whose context holds `Case.context` tokens, itself
included. Bytes are those of tensors; a call's envelope, a few dozen bytes, comes on top. MACs are multiply-accumulates
of matrix products; norms, RoPE, softmax and quantisation are left out. Memory is the smallest arena of the trusted
worker with one session, as it divides it (plan.py), block by block; tests hold the two together.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from wire.errors import ContextError, InvalidArgumentError
from wire.kv_pages import KvType, page_words
from wire.layout import WORD, Demand, blocks
from wire.linears import Linear, LinearSpec, all_specs, lookup_spec
from wire.model_config import ModelConfig
from wire.parameters import parameters
from wire.plan import Parts, plan, smallest
from wire.scratch import CHECK_LIMBS, SUM_LIMBS, sampling_bytes
from wire.sheets import row_bytes


@dataclass(frozen=True)
class Case:
    """What is asked. `stock`: pads that the bank holds; `rope_on_worker`: kv-shield's faster form.

    `kept`: linears whose products secure-infer computes in the trusted worker.
    """

    config: ModelConfig
    precision: str  # float32 or int8
    context: int
    stock: int = 64
    rope_on_worker: bool = False
    kv: KvType = KvType.FLOAT32
    kept: tuple[Linear, ...] = ()


@dataclass(frozen=True)
class Pads:
    """One one-time pad, for one row on its way through all linears."""

    words: int  # 32-bit words of key stream
    macs: int  # to make it
    sealed_bytes: int  # that it takes in the bank


@dataclass(frozen=True)
class Lookup:
    """The masked embedding lookup of one row: one more exchange."""

    bytes_up: int
    bytes_down: int
    sealed_bytes: int  # more of each pad

    @property
    def macs(self) -> int:
        """On the worker, and again to make the pad."""
        return self.bytes_up * self.bytes_down // WORD**2


@dataclass(frozen=True)
class Cost:
    """What one scheme costs. Parts are bytes, or MACs, by what they are for."""

    exchanges: int  # of any pass through the model whose logits are wanted, whatever its rows
    bytes_up: int  # from the trusted worker
    bytes_down: int
    prompt_up: int  # the same of a prompt row, whose logits are not wanted
    prompt_down: int
    macs_trusted: Parts
    macs_worker: Parts
    memory: Parts  # the smallest budget of the trusted worker with one session
    pads: Pads | None = None
    lookup: Lookup | None = None  # on top, with a pad, where the budget does not hold the embedding table
    start_up: int = 0  # bytes up on every new stream, before its first session


def cost(scheme: str, case: Case) -> Cost:
    """Raises InvalidArgumentError for what a scheme does not do, ContextError for a context that the model lacks."""
    if case.precision not in SCHEMES[scheme][0]:
        raise InvalidArgumentError(f"{scheme} runs at {' or '.join(SCHEMES[scheme][0])}, not at {case.precision}")
    if not 0 < case.context <= case.config.max_context:
        most = case.config.max_context
        raise ContextError(f"a context of {case.context} tokens was asked; {case.config.name} has 1 to {most}")
    return SCHEMES[scheme][1](case)


def _plain(case: Case) -> Cost:
    config = case.config
    work, memory = _products(all_specs(config)) | _attention(case), blocks([sampling_bytes(config.vocabulary)])
    return Cost(1, WORD, WORD * config.vocabulary, WORD, 0, {}, work, {"sampling": memory})


def _split(case: Case) -> Cost:
    return _linear_by_linear(all_specs(case.config), _attention(case), _inside(case, "split"))


def _tee_only(case: Case) -> Cost:
    work = _products(all_specs(case.config)) | _attention(case)
    return Cost(0, 0, 0, 0, 0, work, {}, _inside(case, "tee-only"))


def _secure_infer(case: Case) -> Cost:
    config, specs = case.config, all_specs(case.config, case.kept)
    kept = [spec for spec in all_specs(config) if spec.linear in case.kept]
    checks = sum(SUM_LIMBS * spec.n + CHECK_LIMBS * spec.k for spec in specs)
    pads = Pads(sum(spec.k for spec in specs), _products(specs)["linears"], row_bytes(specs))
    inside = (_products(kept) if kept else {}) | _attention(case) | {"verification": checks}
    lookup = Lookup(WORD * config.vocabulary, WORD * config.hidden, row_bytes([lookup_spec(config)]))
    return replace(_linear_by_linear(specs, inside, _inside(case, "secure-infer")), pads=pads, lookup=lookup)


def _kv_shield(case: Case) -> Cost:
    """q and k come back between two crossings, unless nothing is left to do on them here."""
    config, crosses = case.config, case.config.rope is not None and not case.rope_on_worker
    row = WORD * config.layers * (config.q_width + crosses * (config.q_width + config.kv_width))
    exchanges, down = (1 + crosses) * config.layers + 1, row + WORD * config.vocabulary
    work, memory = _products(all_specs(config)) | _attention(case), _permuter(config, crosses)
    permuted = (one for one in parameters(config).values() if one.name.linear is Linear.QKV)
    start = WORD * sum(one.rows * one.width for one in permuted)
    return Cost(exchanges, WORD + row, down, WORD + row, row, {}, work, memory, start_up=start)


SCHEMES: dict[str, tuple[tuple[str, ...], Callable[[Case], Cost]]] = {  # precisions, the usual one first
    "secure-infer": (("int8",), _secure_infer),
    "kv-shield": (("float32",), _kv_shield),
    "split": (("int8", "float32"), _split),
    "plain": (("int8", "float32"), _plain),
    "tee-only": (("int8", "float32"), _tee_only),
}


def _linear_by_linear(specs: list[LinearSpec], inside: Parts, memory: Parts) -> Cost:
    """An exchange for each of these linears, the head last."""
    up, down = (WORD * sum(sizes) for sizes in zip(*((spec.k, spec.n) for spec in specs), strict=True))
    prompt = up - WORD * specs[-1].k, down - WORD * specs[-1].n
    return Cost(len(specs), up, down, *prompt, inside, _products(specs), memory)


def _products(specs: list[LinearSpec]) -> Parts:
    return {"linears": sum(spec.k * spec.n for spec in specs)}


def _attention(case: Case) -> Parts:
    tokens = min(case.context, case.config.window or case.context)
    return {"attention": 2 * case.config.layers * case.config.q_width * tokens}


def _inside(case: Case, scheme: str) -> Parts:
    """The arena of the smallest budget, part by part."""
    kept = case.kept if scheme == "secure-infer" else ()
    demand = Demand(case.config, scheme, case.precision, case.kv, case.stock, kept=kept)
    budget = smallest(demand)
    parts = plan(demand, budget).parts
    return parts | {"unused": budget - sum(parts.values())}


def _permuter(config: ModelConfig, crosses: bool) -> Parts:
    """Memory of kv-shield: permutations of the process and of one session, for keys and for values each."""
    table = 4 * config.layers * config.kv_heads * config.head_dim
    norms = [WORD * config.head_dim] * (2 * config.layers if crosses and config.qk_norm else 0)
    others = config.head_dim * config.hidden, page_words(config, KvType.FLOAT32), 2 * config.vocabulary
    step = WORD * max(3 * config.q_width + 2 * config.kv_width, *others) + (1 << 12)
    return {"permutations": blocks([table, table]), "norms and biases": blocks(norms), "scratch": blocks([step])}
