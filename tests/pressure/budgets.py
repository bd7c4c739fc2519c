"""Memory budgets as small as they can be."""

from pathlib import Path

from wire.kv_pages import KvType
from wire.layout import Demand
from wire.linears import all_specs, lookup_spec
from wire.model_config import ModelConfig
from wire.plan import plan, smallest
from wire.sheets import row_bytes

BANK = 1 << 20  # bytes of pads


def flags_for(folder: Path, scheme: str, kv: str, sessions: int, embed: str = "auto") -> list[str]:
    """Flags of a trusted worker with the smallest budget that holds exactly so many sessions."""
    config = ModelConfig.from_hf(folder)
    stock = BANK // row_bytes([*all_specs(config), lookup_spec(config)])
    demand = Demand(config, scheme, "int8", KvType[kv.upper()], stock, embed == "client")
    budget = smallest(demand)
    while plan(demand, budget).slots // config.layers != sessions:
        budget += demand.page
    return ["--memory-budget", str(budget), "--kv-dtype", kv, "--pad-bank", str(BANK), "--embed", embed]
