"""Puts together the scheme that the settings name, in the memory that it may use. Compute thread, while loading."""

import logging
import secrets
import tempfile
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import cast

from trusted_worker.adapters import Adapters
from trusted_worker.config import Settings
from trusted_worker.kv_cache import PagePool
from trusted_worker.offload import GpuWorker
from trusted_worker.opener import Opener
from trusted_worker.pad_bank import Bank
from trusted_worker.pads import Pads, PadSource, Refill
from trusted_worker.parked_tiles import DigestedTiles, TileStore
from trusted_worker.placement import Placement, decide
from trusted_worker.schemes import kv_shield
from trusted_worker.schemes.base import InsideDecoder, Scheme
from trusted_worker.schemes.kv_shield import KvShield
from trusted_worker.schemes.plain import Plain
from trusted_worker.schemes.secure_infer import Prefill, SecureInfer
from trusted_worker.schemes.split import Split
from trusted_worker.schemes.tee_only import TeeOnly
from trusted_worker.sealed_model import is_sealed, open_sealed, read_key
from trusted_worker.sealed_pages import PageStore
from trusted_worker.secure_memory import Scratch, SecureMemory
from trusted_worker.verification import Verifier
from trusted_worker.weights import Weights
from wire.errors import CheckpointError, PreconditionError
from wire.kv_pages import KvType
from wire.layout import Demand
from wire.linears import all_specs, lookup_spec
from wire.measured import MeasuredCheckpoint
from wire.model_config import ModelConfig
from wire.plan import MAX_ROWS, plan
from wire.scratch import sampling_bytes
from wire.sheets import row_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembled:
    """A scheme, ready but for its first connection to the GPU worker."""

    scheme: Scheme
    scratch: Scratch  # of a step: samplers work in it too
    rows: int  # that one step may have
    model_digest: bytes  # 32: see wire/measured.py
    adapters: Adapters
    embedding: str = ""  # where embeddings come from: see StatsResponse
    weights_resident: bool = False
    placement: Placement = field(default_factory=Placement)


def assemble(settings: Settings, config: ModelConfig, memory: SecureMemory, worker: GpuWorker) -> Assembled:
    """Raises ExhaustedError when the budget is too small, CheckpointError, PreconditionError.

    With --projections auto also what an exchange raises.
    """
    try:
        tempfile.TemporaryFile(dir=settings.spill_dir).close()
    except OSError as error:
        folder = settings.spill_dir or tempfile.gettempdir()
        raise PreconditionError(f"{folder} takes no files: give another --spill-dir") from error
    if settings.scheme == "kv-shield":
        return _kv_shield(settings, config, memory, worker)
    if settings.scheme != "tee-only" and is_sealed(settings.model):
        raise PreconditionError(
            f"{settings.model} is sealed, and {settings.scheme} needs a GPU worker that reads it from "
            "its own disk: use --scheme kv-shield or tee-only"
        )
    if settings.scheme == "plain":
        scratch = Scratch(memory, sampling_bytes(config.vocabulary))
        adapters = _no_adapters(settings, config, memory)
        with closing(_checkpoint(settings, config)) as checkpoint:  # read by the worker, measured for claims
            digest = checkpoint.model_digest
        return Assembled(Plain(config, worker, _kv_type(settings)), scratch, MAX_ROWS, digest, adapters)
    return _inside(settings, config, memory, worker)


def _inside(settings: Settings, config: ModelConfig, memory: SecureMemory, worker: GpuWorker) -> Assembled:
    """The schemes whose decoder runs here, as wire.plan divides the budget."""
    int8, boot_key = settings.precision == "int8", secrets.token_bytes(32)
    kv_type, client_embeds, set_aside = _kv_type(settings), settings.embed == "client", settings.adapter_memory
    demand = Demand(config, settings.scheme, settings.precision, kv_type, 0, client_embeds, set_aside)
    placement = decide(settings.projections, demand, memory, worker)
    stock = settings.pad_bank // row_bytes([*all_specs(config, placement.kept), lookup_spec(config)])
    demand = replace(demand, stock=stock, kept=placement.kept)
    division = plan(demand, memory.budget)
    log.info("memory plan: %s", division.parts)
    checkpoint, opener, store = _checkpoint(settings, config), Opener(), PageStore(boot_key, settings.spill_dir)
    tiles: TileStore = (
        DigestedTiles(settings.spill_dir, settings.insecure_unchecked_tiles)
        if settings.model_key_file is None
        else store.sequence()
    )
    weights = Weights(checkpoint, config, memory, int8, division.layout, tiles, opener)
    scratch, head_rows = Scratch(memory, division.scratch), division.head_rows
    pages = PagePool(memory, config, demand.kv, division.slots, store, opener)
    built: InsideDecoder
    if demand.masks:
        specs, looks_up = demand.padded(division.layout), demand.looks_up(division.layout)
        source = PadSource(boot_key, checkpoint.model_digest)
        bank = Bank(boot_key, specs, settings.pad_bank, settings.spill_dir)
        making = Scratch(memory, division.refill)
        pads = Pads(source, bank, Refill(source, bank, weights, specs, making, division.refill_rows))
        verifier = Verifier(memory, all_specs(config, demand.kept), config.vocabulary if looks_up else 0)
        prefill = cast(Prefill, settings.prefill)
        built = SecureInfer(weights, pages, scratch, head_rows, worker, pads, verifier, prefill, demand.kept)
    elif demand.inside:
        built = TeeOnly(weights, pages, scratch, head_rows)
    else:
        built = Split(weights, pages, scratch, head_rows, worker)
    embedding = "lookup" if demand.looks_up(division.layout) else division.layout.embed
    adapters = Adapters(config, memory, division.parts["adapters"])
    for text in settings.insecure_clear_adapter:
        adapters.load(text)
    if settings.insecure_clear_adapter:
        log.warning("%d adapters lie on this disk in the clear", len(settings.insecure_clear_adapter))
    resident = division.layout.linears == "resident"
    return Assembled(built, scratch, division.rows, checkpoint.model_digest, adapters, embedding, resident, placement)


def _kv_shield(settings: Settings, config: ModelConfig, memory: SecureMemory, worker: GpuWorker) -> Assembled:
    kv_type, adapters = _kv_type(settings), _no_adapters(settings, config, memory)
    log.warning(
        "kv-shield does not protect the conversation from the GPU worker, which sees every activation: it hides "
        "the KV cache from somebody who reads nothing but the cache and does not know the model"
    )
    options = kv_shield.Options(
        rope_on_worker=settings.rope == "worker",
        kv_type=kv_type,
        rotate_every=settings.rotate_every,
        seal_idle=settings.seal_idle,
        provision_all=settings.model_key_file is not None,
    )
    rows, least = MAX_ROWS, kv_shield.scratch_bytes(config, kv_type, 1)
    while rows > 1 and kv_shield.scratch_bytes(config, kv_type, rows) > max(memory.budget // 4, least):
        rows //= 2  # nothing is saved below the least
    scratch = Scratch(memory, kv_shield.scratch_bytes(config, kv_type, rows))
    pages = PageStore(secrets.token_bytes(32), settings.spill_dir)
    checkpoint = _checkpoint(settings, config)
    scheme = KvShield(checkpoint, config, memory, scratch, worker, pages, options)
    worker.greet = scheme.provision
    return Assembled(scheme, scratch, rows, checkpoint.model_digest, adapters)


def _no_adapters(settings: Settings, config: ModelConfig, memory: SecureMemory) -> Adapters:
    refusal = f"the scheme {settings.scheme} cannot apply adapters: its products run on the GPU worker as a whole"
    if settings.adapter_memory or settings.insecure_clear_adapter:
        raise PreconditionError(refusal)
    return Adapters(config, memory, 0, refusal)


def _kv_type(settings: Settings) -> KvType:
    return KvType[settings.kv_dtype.upper()]


def _checkpoint(settings: Settings, config: ModelConfig) -> MeasuredCheckpoint:
    """The model's weights, opened here if they are sealed, measured. Raises CheckpointError, PreconditionError."""
    if settings.model_key_file is not None:
        if not is_sealed(settings.model):
            raise CheckpointError(f"{settings.model} is not sealed: leave --model-key-file out")
        return open_sealed(settings.model, read_key(settings.model_key_file), config)
    if is_sealed(settings.model):
        raise CheckpointError(f"{settings.model} is sealed: say where its key is with --model-key-file FILE")
    return MeasuredCheckpoint(settings.model, config)
