"""What an operator may watch: counters of the service, and times as histograms. Nothing about one prompt.

Names: `gen_ai_server_*` are OpenTelemetry's (semantic conventions for generative AI), `*_tokens_total` and
`num_requests_*` are vLLM's with our prefix, the rest is ours. `cleave_pads_reused_total` must stay 0: alert on it.
"""

from wire.metrics import Histogram, Metric, render
from wire.v1 import trusted_worker_pb2 as pb


class Latencies:
    """Written by the compute thread. Times a client lets pass without credit do not count."""

    def __init__(self) -> None:
        self.first_token, self.next_token = Histogram(), Histogram()
        self.prompt_tokens = self.generated_tokens = 0


def text(stats: pb.StatsResponse, latencies: Latencies, transport: Histogram, running: int, queued: int) -> str:
    """The page that Prometheus reads."""
    return render(_metrics(stats, latencies, transport, running, queued), f'scheme="{stats.scheme}"')


def _metrics(
    stats: pb.StatsResponse, latencies: Latencies, transport: Histogram, running: int, queued: int
) -> list[Metric]:
    return [
        ("gen_ai_server_time_to_first_token_seconds", "From a prompt to its first token.", latencies.first_token),
        ("gen_ai_server_time_per_output_token_seconds", "Between tokens of an answer.", latencies.next_token),
        ("cleave_prompt_tokens_total", "Tokens that clients sent.", latencies.prompt_tokens),
        ("cleave_generation_tokens_total", "Tokens that were sampled.", latencies.generated_tokens),
        ("cleave_num_requests_running", "Sessions within a turn.", running),
        ("cleave_num_requests_waiting", "Calls that wait for the compute thread.", queued),
        ("cleave_sessions", "Sessions that are open.", stats.sessions),
        ("cleave_exchanges_total", "Exchanges with the GPU worker.", stats.exchanges),
        ("cleave_wire_bytes_up_total", "Bytes to the GPU worker.", stats.wire_bytes_up),
        ("cleave_wire_bytes_down_total", "Bytes from the GPU worker.", stats.wire_bytes_down),
        ("cleave_step_seconds_total", "Time in steps of the model.", stats.step_seconds),
        ("cleave_exchange_seconds_total", "Time in exchanges.", stats.exchange_seconds),
        ("cleave_exchange_transport_seconds", "Of one exchange, what neither worker computed in.", transport),
        ("cleave_pads_in_stock", "One-time pads made in advance.", stats.pads_in_stock),
        ("cleave_pads_capacity", "Pads that the bank holds.", stats.pads_capacity),
        ("cleave_pads_issued_total", "Pads that were spent.", stats.pads_issued),
        ("cleave_pads_reused_total", "Refused second uses of a pad. Must be 0.", stats.pads_reused),
        ("cleave_products_verified_total", "Products that passed their check.", stats.products_verified),
        ("cleave_products_failed_total", "Products that did not.", stats.products_failed),
        ("cleave_products_inside_total", "Products computed without the GPU worker.", stats.products_inside),
        ("cleave_pages_sealed_total", "Pages of KV caches that were parked.", stats.pages_sealed),
        ("cleave_pages_restored_total", "Parked pages that came back.", stats.pages_restored),
        ("cleave_kv_pages_used", "Pages of KV caches in the budget.", stats.kv_pages_used),
        ("cleave_kv_pages_capacity", "Pages that the budget holds.", stats.kv_pages_capacity),
        ("cleave_adapters", "LoRA adapters that are held.", stats.adapters),
        ("cleave_adapter_bytes", "Of the budget, taken by them.", stats.adapter_bytes),
        ("cleave_adapter_capacity_bytes", "Of the budget, set aside for them.", stats.adapter_capacity),
        ("cleave_tiles_read_total", "Tiles of weights that were read from disk.", stats.tiles_read),
        ("cleave_tiles_unchecked", "1: without comparing their digests.", int(stats.tiles_unchecked)),
        ("cleave_table_scans_total", "Scans of the whole embedding table.", stats.table_scans),
        ("cleave_spill_bytes", "Parked outside the budget.", stats.spill_bytes),
        ("cleave_switch_seconds", "Charged for each exchange as a world switch.", stats.switch_us / 1e6),
        ("cleave_arena_used_bytes", "Secure memory in use.", stats.memory_used),
        ("cleave_arena_peak_bytes", "The most that was in use.", stats.memory_peak),
        ("cleave_arena_limit_bytes", "The memory budget.", stats.memory_budget),
        ("cleave_arena_locked", "1: the budget is locked into memory.", int(stats.memory_locked)),
        ("cleave_process_limit_bytes", "What bounds the process; 0: nothing.", stats.process_limit_bytes),
        ("process_resident_memory_bytes", "Resident memory of the process.", stats.rss),
    ]
