"""Paged attention: decode, prefill, both at once, over every cache type and option."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch

from minivllm.ops import kv_write
from minivllm.ops.kv_layout import RowLayout
from minivllm.ops.paged_attention import Options, _attend
from minivllm.ops.triton.paged_attention import BatchShape, paged_attention
from tests.gpu.case import DTYPES, Case, Check, ints, randn

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}

# (tokens a request has, its query rows): across borders of tiles and segments.
BATCHES = {
    "decode": [(33, 1), (1, 1), (1100, 1)],
    "prefill": [(70, 70), (150, 33), (1, 1)],
    "mixed": [(40, 40), (33, 1), (1100, 1), (1030, 3)],
    "long": [(2100, 3), (2049, 1)],
    "segments": [(3080, 1), (1, 1), (2049, 1)],
}
LARGE = {
    "decode": [(8192, 1)] * 16 + [(65536, 1), (1, 1), (1025, 1)],
    "prefill": [(4096, 4096), (1000, 300), (9000, 1024)],
    "mixed": [(2048, 2048), (33, 1), (50000, 1), (1050, 9), (5000, 4)],
    "long": [(60000, 3), (70000, 1)],
    "segments": [(131072, 1)] + [(40, 1)] * 300,  # so many that programs share the long one's segments
}


def some_options(heads: int, device: str) -> dict[str, dict]:
    sinks = torch.linspace(-2, 3, heads, device=device)
    slopes = 2.0 ** -torch.arange(1, heads + 1, device=device).float()
    every = {"softcap": 5.0, "sinks": sinks, "alibi_slopes": slopes, "sliding_window": 150}
    return {
        "plain": {},
        "window": {"sliding_window": 20},
        "window_1100": {"sliding_window": 1100},
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": sinks},
        "all": every,
    }


def attention(
    device: str,
    large: bool,
    *,
    batch: str,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
    head_dim: int = 64,
    group: int = 4,
    block_size: int = 16,
    option: str = "plain",
    invariant: bool = False,
    split_len: int = 1,
) -> Check:
    kv_heads = 8 if large else 2
    heads, torch_dtype = group * kv_heads, DTYPES[dtype]
    requests = (LARGE if large else BATCHES)[batch]
    layout = RowLayout(kv_dtype or NAMES[torch_dtype], kv_heads, head_dim, block_size)
    scales = {"k_scale": 0.75, "v_scale": 1.5} if kv_dtype == "fp8_e4m3" else {}
    options = Options(scale=head_dim**-0.5, **scales, **some_options(heads, device)[option])
    cache, table = filled_cache(requests, layout, torch_dtype, options, device)
    seq_lens = ints(device, *(seq_len for seq_len, _ in requests))
    starts = ints(device, 0, *(query_len for _, query_len in requests)).cumsum(0, dtype=torch.int32)
    num_tokens = sum(query_len for _, query_len in requests)
    q = randn(device, num_tokens, heads + 3, head_dim, dtype=torch_dtype)[:, :heads]  # rows that lie apart
    shape = BatchShape(max(n for _, n in requests), max(n for n, _ in requests), split_len)

    def run() -> torch.Tensor:
        return paged_attention(
            q, cache, table, seq_lens, starts,
            layout=layout, options=options, shape=shape, batch_invariant=invariant,
        )  # fmt: skip

    def expected() -> torch.Tensor:
        rows = []
        for b, (seq_len, query_len) in enumerate(requests):
            pages = cache[table[b, : -(-seq_len // block_size)].long()]
            k = layout.read(pages, 0, options.k_scale).transpose(0, 1).flatten(1, 2)[:, :seq_len].double()
            v = layout.read(pages, 1, options.v_scale).transpose(0, 1).flatten(1, 2)[:, :seq_len].double()
            queries = q[starts[b] : starts[b] + query_len].double()
            for chunk in queries.split(256):  # the last rows of a sequence that ends with them
                end = seq_len - query_len + sum(len(r) for r in rows_of_request(rows, b)) + len(chunk)
                rows.append((b, _attend(chunk, k[:, :end], v[:, :end], options)))
        return torch.cat([row for _, row in rows])

    exact = torch_dtype == torch.float32
    return Check(run, expected, 2e-5 if exact else TOLERANCE[torch_dtype] + 8e-3 * (kv_dtype is not None))


def any_schedule(device: str, large: bool, *, dtype: str, option: str) -> Check:
    """Batch invariant: rows have the bits of one chunk when they come in several, or one by one, among others.

    Small: 27 rows, the 15th of which is the first to see another segment, or with a window of 1,100 the third: more
    than a query tile holds, and chunks begin inside tiles, before the border and behind it.
    """
    (num_rows, kv_heads), torch_dtype = (90, 2) if large else (27, 1), DTYPES[dtype]
    heads = 3 * kv_heads
    seq_len = 40000 if large else 13 + (2048 if option == "window_1100" else 1024)
    layout = RowLayout(NAMES[torch_dtype], kv_heads, 64, 16)
    options = Options(scale=64**-0.5, **some_options(heads, device)[option])
    cache, table = filled_cache([(seq_len, 1), (50, 1)], layout, torch_dtype, options, device)
    q, stranger = (randn(device, rows, heads, 64, dtype=torch_dtype) for rows in (num_rows, 3))

    def attend(rows: range) -> torch.Tensor:
        """Of the last rows some, beside another request; a row by itself is sometimes part of a decode."""
        ends, num_others = seq_len - num_rows + rows.stop, 1 if len(rows) == 1 and rows.start % 2 else 3
        return paged_attention(
            torch.cat([q[rows.start : rows.stop], stranger[:num_others]]), cache, table, ints(device, ends, 50),
            ints(device, 0, len(rows), len(rows) + num_others), layout=layout, options=options, batch_invariant=True,
            shape=BatchShape(max(num_others, len(rows)), ends),
        )[: len(rows)]  # fmt: skip

    borders = [0, 7, 8, 60, 61, 62, 63, 64, 90] if large else [0, 3, 4, 17, 18, 19, 27]
    parts = [range(*pair) for pair in pairwise(borders)]
    return Check(lambda: torch.cat([attend(part) for part in parts]), lambda: attend(range(num_rows)), 0.0)


def rows_of_request(rows: list[tuple[int, torch.Tensor]], b: int) -> list[torch.Tensor]:
    return [row for request, row in rows if request == b]


def filled_cache(
    requests: list[tuple[int, int]], layout: RowLayout, dtype: torch.dtype, options: Options, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache and block tables; blocks are dealt at random, and what no token was written to is NaN."""
    num_blocks = [-(-seq_len // layout.block_size) for seq_len, _ in requests]
    order = torch.randperm(sum(num_blocks) + 3, generator=torch.Generator().manual_seed(1))
    cache = torch.full(layout.shape(len(order)), 0xFF, dtype=torch.uint8, device=device)
    table = torch.full((len(requests), max(num_blocks)), -1, dtype=torch.int32)
    for b, (seq_len, _) in enumerate(requests):
        start = sum(num_blocks[:b])
        table[b, : num_blocks[b]] = order[start : start + num_blocks[b]]
        positions = torch.arange(seq_len)
        slots = (
            table[b].long()[positions // layout.block_size] * layout.block_size
            + positions % layout.block_size
        )
        rows = randn(device, seq_len, 2 * layout.num_kv_heads, layout.head_dim, dtype=dtype, seed=b)
        k, v = rows.split(layout.num_kv_heads, dim=1)
        kv_write.reference(
            k, v, cache, slots.to(device), layout=layout, k_scale=options.k_scale, v_scale=options.v_scale
        )
    return cache, table.to(device)


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {}

    def add(**chosen) -> None:
        name = "_".join(
            f"{key}-{value}" if isinstance(value, (int, bool)) else value for key, value in chosen.items()
        )
        found[f"attention_{name}"] = partial(attention, **chosen)

    for batch in ("decode", "prefill", "mixed"):
        for dtype in DTYPES:
            add(batch=batch, dtype=dtype)
        add(batch=batch, head_dim=128, block_size=128)
        add(batch=batch, invariant=True, head_dim=128)
    for option in ("window", "softcap", "sinks", "all"):
        add(batch="mixed", option=option, group=3)
    add(batch="mixed", option="all", invariant=True, group=3)
    add(batch="segments")
    add(batch="long", option="window_1100", split_len=4, head_dim=128)
    add(batch="long", option="window_1100", split_len=4, invariant=True, head_dim=128)
    for kv_dtype in ("fp8_e4m3", "int8"):
        add(batch="mixed", kv_dtype=kv_dtype, head_dim=128)
        add(batch="decode", kv_dtype=kv_dtype, head_dim=128, block_size=128)
    add(batch="decode", kv_dtype="float16", head_dim=128)
    for head_dim, group in ((16, 1), (80, 7), (256, 2)):
        add(batch="prefill", head_dim=head_dim, group=group)
        add(batch="decode", head_dim=head_dim, group=group)
    add(batch="mixed", dtype="f32", kv_dtype="bfloat16")
    for dtype in ("bf16", "f32"):
        for option in ("plain", "all", "window_1100"):
            found[f"attention_any_schedule_{dtype}_{option}"] = partial(
                any_schedule, dtype=dtype, option=option
            )
    return found


CASES = _cases()
