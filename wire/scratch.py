"""How much scratch the trusted worker's arithmetic asks for, from sizes alone: upper bounds, a few percent above.

m is a number of rows of activations; matrices are [rows, columns]. What is measured here is allocated in
trusted_worker/{arithmetic,verification,sampling,attention,model,pads,pad_bank}.py; tests hold the two together.
"""

from wire.kv_pages import attention_bytes
from wire.layout import WORD, Demand, Layout, tile_rows
from wire.linears import BLOCK, Linear, LinearSpec, kinds, lookup_spec, spec
from wire.model_config import ModelConfig

SLACK = 1 << 12  # for what alignment loses
SHEET = 1 << 14  # words of u that are sealed together, at most
LOOKUP_BYTES = 1 << 20  # of one-hot rows that travel together
MAX_RANK, ADAPTED_ROWS = 256, 8  # of a LoRA adapter; rows of activations that go through it together
# Exact products (arithmetic.py).
EXACT_DEPTH = 1 << 15  # 2^31 * 127 * 2^15 < 2^53
PIECE = 1 << 17  # weights that lie in float64 at a time: 1 MiB, what a second-level cache holds
SUMS = 1 << 16  # sums that lie in float64 at a time
PIECE_COLUMNS = 1056  # of a piece, beside more than FEW rows of activations
FEW = 8
# Step 1 (arithmetic.py).
QUANTIZED = 1 << 14  # elements that lie in float64 at a time
# Verification (verification.py).
SUM_LIMBS, CHECK_LIMBS = 4, 3  # digits of s and of c
SUM_BLOCK = 1 << 13  # outputs, or inputs, that are summed in float64
WORK = 1 << 15  # elements of y_q or x_q that lie in float64 at a time


def piece(rows: int, columns: int, m: int) -> tuple[int, int]:
    """The largest piece of a matrix in float64. Whole rows are copied fastest; wide ones multiplied slowest."""
    width = min(columns, EXACT_DEPTH if m <= FEW else PIECE_COLUMNS)
    return min(rows, EXACT_DEPTH, max(1, PIECE // width // 8 * 8)), width


def exact_bytes(m: int, rows: int, columns: int) -> int:
    """Of exact_product and exact_lookup."""
    height, width = piece(rows, columns, m)
    product, lookup = min(max(1, SUMS // max(m, 1)), rows), height + width
    return 8 * (height * width + m * max(product, lookup))


def quantize_bytes(m: int, k: int) -> int:
    """Of step 1, beside its result."""
    return 2 * 8 * max(min(QUANTIZED, m * k), k)


def sheet_words(config: ModelConfig) -> int:
    """At most so many are in one sheet of a pad."""
    layer = sum(spec(config, 0, linear).n for linear in BLOCK)
    return min(SHEET, max(layer, config.vocabulary, config.hidden))


def check_bytes(m: int, widest: int) -> int:
    """Of a verdict over m rows; `widest` is the largest k or n."""
    width = min(widest, SUM_BLOCK)
    kept = SUM_LIMBS * SUM_BLOCK if widest > SUM_BLOCK else 0
    return kept + 8 * (SUM_LIMBS * width + max(min(WORK, m * width), width))


def prepare_bytes(rows: int, columns: int) -> int:
    """Of c, for tiles [rows, columns]."""
    return SUM_LIMBS * (12 * max(rows, columns) + SUM_BLOCK) + exact_bytes(SUM_LIMBS, rows, columns)


def sampling_bytes(vocabulary: int) -> int:
    """Of choosing a token."""
    return 8 * vocabulary + SLACK


def step_bytes(demand: Demand, layout: Layout, rows: int, head_rows: int) -> int:
    """Of one forward pass over `rows` rows, the logits of `head_rows` at a time; and of preparing verification."""
    config, width = demand.config, WORD * rows * demand.config.hidden

    def product(linear: Linear, m: int = rows) -> int:
        return _product(demand, layout, spec(config, 0, linear), m)

    norm = (1 + config.layer_norm) * width
    queries = WORD * rows * (config.q_width + 2 * config.kv_width)
    attention = WORD * rows * config.q_width + max(
        norm + queries + max(product(Linear.QKV) - queries, attention_bytes(config, rows)), product(Linear.O)
    )
    up = WORD * rows * (2 if config.gated else 1) * config.ffn
    feed_forward = norm + max(product(Linear.GATE_UP), up + WORD * rows * config.ffn + product(Linear.DOWN))
    normed = (2 + config.layer_norm) * WORD * head_rows * config.hidden
    logits = WORD * head_rows * config.vocabulary
    head = normed + max(product(Linear.LM_HEAD, head_rows), logits + sampling_bytes(config.vocabulary))
    passes = max(_embed(demand, layout, rows), attention, feed_forward, head)
    open_sheets = WORD * rows * sheet_words(config) if demand.masks else 0
    return max(open_sheets + width + passes, _prepare(demand, layout)) + SLACK


def refill_bytes(demand: Demand, layout: Layout, made: int) -> int:
    """Of making `made` pads."""
    if not made:
        return 0
    table = [_table_refill(demand, layout, made)] if demand.looks_up(layout) else []
    each = max([_refill(demand, layout, one, made) for one in kinds(demand.config)] + table)
    return WORD * made * sheet_words(demand.config) + each + SLACK


def _refill(demand: Demand, layout: Layout, of: LinearSpec, made: int) -> int:
    own = 8 * made * of.k + WORD * of.k
    return own + _tiles(demand, layout, of) + exact_bytes(made, sheet_words(demand.config), of.k)


def _table_refill(demand: Demand, layout: Layout, made: int) -> int:
    hidden = demand.config.hidden
    rows = min(tile_rows(hidden), demand.config.vocabulary)
    own = 2 * WORD * made * hidden + 8 * made * rows + WORD * rows
    return own + _table_tiles(demand) + exact_bytes(made, rows, hidden)


def _product(demand: Demand, layout: Layout, of: LinearSpec, m: int) -> int:
    """One linear for m rows, its result included."""
    result = WORD * m * of.n
    three = 3 * MAX_RANK  # of q, k and v
    adapted = WORD * min(m, ADAPTED_ROWS) * (three + of.n) if demand.adapters else 0
    if not demand.int8:
        inside = demand.inside * (_tiles(demand, layout, of) + WORD * m * min(tile_rows(of.k), of.n))
        return result + max(inside, adapted)
    integers = WORD * m * (of.k + of.n)
    inside = 8 * m * of.k + _tiles(demand, layout, of) + exact_bytes(m, of.n, of.k) if demand.inside else 0
    outside = WORD * m * of.k + check_bytes(m, max(of.k, of.n)) if demand.masks else 0
    return result + max(integers + max(inside, outside, quantize_bytes(m, of.k)), adapted)


def _tiles(demand: Demand, layout: Layout, of: LinearSpec) -> int:
    """Two tiles of a linear, if it is parked."""
    parked = layout.place(demand.config, of) == "parked"
    return 2 * demand.width * min(tile_rows(of.k), of.n) * of.k if parked else 0


def _table_tiles(demand: Demand) -> int:
    """Two tiles of a parked embedding table."""
    config = demand.config
    return 2 * demand.width * min(tile_rows(config.hidden), config.vocabulary) * config.hidden


def _embed(demand: Demand, layout: Layout, rows: int) -> int:
    config = demand.config
    scan = _table_tiles(demand) if layout.embed == "scan" else 0
    if not demand.looks_up(layout):
        return scan
    of = lookup_spec(config)
    together = min(rows, max(1, LOOKUP_BYTES // (WORD * of.k)))
    words = WORD * together * (of.k + of.n)
    return max(scan, words + check_bytes(together, of.n))


def _prepare(demand: Demand, layout: Layout) -> int:
    """Of the verifier, tile by tile: as much as a step at least, for none is made meanwhile."""
    if not demand.masks:
        return 0
    specs = kinds(demand.config)
    rows = [prepare_bytes(min(tile_rows(of.k), of.n), of.k) + _tiles(demand, layout, of) for of in specs]
    hidden = demand.config.hidden
    table = prepare_bytes(min(tile_rows(hidden), demand.config.vocabulary), hidden) + _table_tiles(demand)
    return max([*rows, table * demand.looks_up(layout)])
