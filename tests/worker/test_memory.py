"""The arithmetic of the KV cache's size, and what is refused with which number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minivllm.config.cache import CacheConfig
from minivllm.exceptions import ConfigError
from minivllm.messages.kv_cache import KVCacheGroup, KVCacheSpec
from minivllm.worker.memory import GIB, Budget, describe, size_kv_cache

# 1 MiB a block over all layers: a GiB is 1024 blocks of 128 tokens.
SPEC = KVCacheSpec(block_size=128, block_bytes=1 << 16, num_layers=16, layout_id="tile32-bfloat16-v1")


def budget(limit: float = 16, available: float = 14, weights: float = 3, step: float = 1) -> Budget:
    return Budget(*(int(value * GIB) for value in (limit, available, weights, step)))


def size(max_model_len: int = 1024, *, is_auto: bool = False, given: Budget | None = None, **cache):
    return size_kv_cache(CacheConfig(**cache), SPEC, given or budget(), max_model_len, is_auto=is_auto)


def test_by_default_it_is_two_fifths_of_what_is_left():
    assert size(given=budget(available=9)).num_blocks == 2 * 1024  # 0.4 * (9 - 3 - 1)


def test_by_default_it_is_at_most_4_gib():
    assert size(given=budget(limit=64, available=60)).num_bytes == 4 * GIB


def test_bytes_win_over_the_share_and_are_cut_to_whole_blocks():
    found = size(kv_cache_memory_bytes=(100 << 20) + 5, gpu_memory_utilization=0.5)
    assert (found.num_blocks, found.num_bytes, found.num_tokens) == (100, 100 << 20, 12800)


def test_a_number_of_blocks_wins_over_both():
    assert (
        size(num_gpu_blocks_override=9, kv_cache_memory_bytes=GIB, gpu_memory_utilization=0.5).num_blocks == 9
    )


def test_the_share_is_of_the_limit_and_covers_weights_and_step():
    assert size(gpu_memory_utilization=0.5).num_bytes == 4 * GIB  # 16 / 2 - 3 - 1


def test_the_share_covers_what_the_process_already_holds():
    assert size(gpu_memory_utilization=0.5, given=replace(budget(), process_bytes=GIB)).num_bytes == 3 * GIB


def test_a_share_that_the_weights_use_up_is_refused():
    with pytest.raises(ConfigError, match=r"0\.2 of 16\.00 GiB.*3\.00 GiB of weights"):
        size(gpu_memory_utilization=0.2)


@pytest.mark.parametrize(
    "asked",
    [
        {"kv_cache_memory_bytes": 11 * GIB},
        {"num_gpu_blocks_override": 11 * 1024},
        {"gpu_memory_utilization": 1},
    ],
)
def test_a_cache_that_does_not_fit_the_machine_is_refused(asked: dict):
    with pytest.raises(ConfigError, match=r"--[a-z-]+ \d+ .*10\.00 GiB of 16\.00 GiB are left.*lower it"):
        size(**asked)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"20\.00 GiB for weights.*14\.00 GiB of 16\.00 GiB"):
        size(given=budget(weights=20))


def test_a_length_that_does_not_fit_is_refused_with_the_one_that_does():
    with pytest.raises(ConfigError, match=r"max_model_len 1153 needs .*--max-model-len 1152 or auto"):
        size(1153, num_gpu_blocks_override=9)
    assert size(1152, num_gpu_blocks_override=9).max_model_len == 1152


def test_auto_takes_the_length_that_fits_and_never_more_than_the_model_allows():
    assert size(5000, is_auto=True, num_gpu_blocks_override=9).max_model_len == 1152
    assert size(1000, is_auto=True, num_gpu_blocks_override=9).max_model_len == 1000


def test_no_block_at_all_is_refused_even_for_auto():
    with pytest.raises(ConfigError, match="larger --kv-cache-memory-bytes"):
        size(is_auto=True, kv_cache_memory_bytes=1000)


def test_concurrency_counts_whole_blocks():
    assert size(129, num_gpu_blocks_override=9).max_concurrency == 4.5


def test_the_log_line_shows_the_sum_the_tokens_and_the_concurrency():
    line = describe(size(1024, num_gpu_blocks_override=1024), budget())
    for part in (
        "weights 3.00 GiB",
        "KV cache 1.00 GiB",
        "= 5.00 GiB",
        "131,072 tokens",
        "128.00 requests of 1,024",
    ):
        assert part in line


# With windows -----------------------------------------------------------------

# Four layers of full attention and eight with a window of 512: a block has room for four of either.
GROUPS = (
    KVCacheGroup((0, 1, 2, 3), None),
    KVCacheGroup((4, 6, 8, 10), 512),
    KVCacheGroup((5, 7, 9, 11), 512),
)
WINDOWED = KVCacheSpec(
    block_size=128, block_bytes=1 << 18, num_layers=4, layout_id="nhd-v1", groups=GROUPS, step_tokens=1024
)


def windowed(max_model_len: int, *, is_auto: bool = False, **cache):
    return size_kv_cache(CacheConfig(**cache), WINDOWED, budget(), max_model_len, is_auto=is_auto)


def test_windows_count_once_they_are_full_whatever_the_length():
    # 512 - 1 + 1024 tokens lie in at most 13 blocks: a request of 32k takes 256 + 2 * 13, and one block is null.
    found = windowed(32768, num_gpu_blocks_override=283)
    assert found.max_concurrency == 1
    assert found.num_tokens == 32768
    with pytest.raises(ConfigError, match="max_model_len 32769 needs .*--max-model-len 32768 or auto"):
        windowed(32769, num_gpu_blocks_override=283)


def test_auto_takes_the_length_that_fits_beside_the_windows():
    assert windowed(131072, is_auto=True, num_gpu_blocks_override=283).max_model_len == 32768
    assert windowed(131072, is_auto=True, num_gpu_blocks_override=10).max_model_len == 3 * 128


def test_the_log_line_names_the_block_tables():
    line = describe(windowed(32768, num_gpu_blocks_override=565), budget())
    assert "65,536 tokens in 565 blocks of 128, 2.00 requests of 32,768 tokens at once" in line
    assert "block tables: 1 × 4 layers of full attention, 2 × 4 layers of window 512" in line
    assert "block tables" not in describe(size(1024), budget())
