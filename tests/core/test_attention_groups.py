"""KV cache groups: full attention and sliding windows over one pool of blocks."""

from __future__ import annotations

import random
from itertools import repeat

import pytest

from minivllm.core.attention_groups import AttentionGroups
from minivllm.core.block_pool import BlockPool
from minivllm.core.kv_cache_manager import KVCacheManager
from minivllm.core.kv_cache_utils import make_block_hasher
from minivllm.core.request import Request
from minivllm.exceptions import ConfigError
from minivllm.messages.kv_cache import KVCacheGroup, blocks_of_request, longest_request, num_tokens_held
from minivllm.messages.kv_events import BlockRemoved, BlockStored
from tests.core.requests import make_request, make_scheduler
from tests.fakes import Driver

BLOCK = 4


def groups(*windows: int | None) -> tuple[KVCacheGroup, ...]:
    return tuple(KVCacheGroup((layer,), window) for layer, window in enumerate(windows))


# What a prefix hit is


def has_what_it_reads(cached: list[bool], window: int | None, hit: int) -> bool:
    """Whether one group has all that attention of the tokens after the hit reads."""
    first_token = 0 if window is None else max(0, hit * BLOCK - window + 1)
    return all(cached[first_token // BLOCK : hit])


@pytest.mark.parametrize("windows", [(None,), (6,), (1,), (None, 6), (9, None, 6, 9), (5, 13), (2, 7, 1, None, None)])
def test_the_hit_is_the_longest_prefix_that_every_group_has_as_far_as_it_needs_it(windows):
    pick = random.Random(str(windows))
    agreement = AttentionGroups(groups(*windows), BLOCK)

    def check(num_blocks: int) -> None:
        cached = [[pick.random() < 0.75 for _ in range(num_blocks)] for _ in windows]
        hits = (hit for hit in range(num_blocks + 1) if all(map(has_what_it_reads, cached, windows, repeat(hit))))
        assert agreement.longest_hit(num_blocks, lambda g, i: all(cached[each][i] for each in g)) == max(hits)

    for _ in range(300):
        check(pick.randrange(9))


# What a request holds


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 11])
@pytest.mark.parametrize("step", [1, 3, 4, 16])
def test_a_request_never_holds_more_than_it_is_said_to_need(window: int, step: int):
    group = KVCacheGroup((0,), window)
    manager = KVCacheManager(64, BLOCK, groups=(group,), step_tokens=step)
    request = Request.from_message(make_request(prompt=50))
    manager.admit(request, manager.find_cached_prefix(request), 50)
    most, computed = 0, 0
    while computed < 50:
        computed = min(50, computed + step)
        assert manager.extend(request, computed) is not None
        most = max(most, manager.pool.num_held_blocks)
        request.num_computed_tokens = request.num_confirmed_tokens = computed
        manager.cache_confirmed_blocks(request)
        manager.check_integrity()
        (table,) = manager.block_ids(request)
        num_passed = max(0, computed - window + 1) // BLOCK
        assert table[:num_passed] == [0] * num_passed and 0 not in table[num_passed:]
    assert most <= group.most_blocks(50, step, BLOCK)
    manager.free(request)
    assert manager.pool.num_held_blocks == 0


def test_a_prompt_of_32k_over_a_window_of_512_holds_a_few_blocks():
    """With blocks of 128: 256 in a full group; in a window's, 20 while chunks of 2048 are computed, then 5."""

    def held(*windows: int | None) -> tuple[int, int]:
        """The most while the prompt is computed, and behind it."""
        scheduler = make_scheduler(
            max_num_batched_tokens=2048, max_model_len=32800, num_blocks=600, block_size=128,
            kv_cache_groups=groups(*windows), enable_prefix_caching=False,
        )  # fmt: skip
        driver, pool = Driver(scheduler), scheduler.kv_cache.pool
        driver.worker._check_readable = lambda *_: None  # quadratic in the prompt; the walks check it
        driver.add(make_request(prompt=[7] * 32768, max_tokens=8))
        run, during = driver.worker.run, []
        driver.worker.run = lambda plan: during.append(pool.num_held_blocks) or run(plan)
        for _ in range(18):
            driver.step()
        return max(during), pool.num_held_blocks

    assert (held(None), held(512), held(None, 512)) == ((257, 257), (20, 5), (256 + 20, 257 + 5))


def test_long_prompts_that_would_not_fit_with_full_attention_run_side_by_side():
    def most_running(windows: tuple[int | None, ...]) -> int:
        scheduler = make_scheduler(
            max_num_batched_tokens=16, max_model_len=200, num_blocks=60, kv_cache_groups=groups(*windows)
        )
        driver = Driver(scheduler)
        for name in "abcd":
            driver.add(make_request(name, [ord(name)] * 180, max_tokens=10))
        most = 0
        while scheduler.has_requests():
            driver.step()
            most = max(most, len(scheduler.running))
        return most

    assert most_running((None,)) == 1
    assert most_running((8,)) == 4


def test_one_kind_of_layer_is_one_group_without_a_null_block():
    manager = KVCacheManager(8, BLOCK)
    assert manager.pool.null is None and manager.pool.num_free_blocks == 8
    request = Request.from_message(make_request(prompt=8))
    assert manager.admit(request, manager.find_cached_prefix(request), 8) == [[0, 1]]


# The prefix cache


class Cached:
    """A manager over a full group and a window of 6 tokens, and one request of 24 tokens computed and freed."""

    def __init__(self, *, num_blocks: int = 64, windows: tuple[int | None, ...] = (None, 6), **options) -> None:
        self.manager = KVCacheManager(num_blocks, BLOCK, groups=groups(*windows), step_tokens=8, **options)
        self.hasher = make_block_hasher(BLOCK)
        self.first = self.request("first", 24)
        self.manager.admit(self.first, self.manager.find_cached_prefix(self.first), 24)
        for num_tokens in (8, 16, 24):
            self.manager.extend(self.first, num_tokens)
            self.first.num_computed_tokens = self.first.num_confirmed_tokens = num_tokens
            self.manager.cache_confirmed_blocks(self.first)
        self.manager.free(self.first)
        self.manager.check_integrity()

    def request(self, name: str, num_tokens: int) -> Request:
        return Request.from_message(make_request(name, num_tokens), self.hasher)

    def hit(self, num_tokens: int) -> int:
        return self.manager.find_cached_prefix(self.request("again", num_tokens)).num_blocks

    def evict(self, group: int, index: int) -> None:
        """As if the block had been handed out again."""
        name = self.first.block_hashes[index] + bytes([group])
        self.manager.pool._forget_content(self.manager.pool.get_cached_block(name))


def test_blocks_that_a_window_has_passed_stay_findable_until_they_are_reused():
    cached = Cached()
    assert [cached.hit(n) for n in (30, 24, 17, 9, 4)] == [6, 5, 4, 2, 0]


def test_a_window_needs_only_the_last_blocks_of_a_prefix():
    cached = Cached()
    for index in (0, 1, 2):
        cached.evict(1, index)
    assert cached.hit(30) == 6 and cached.hit(24) == 5  # 6 tokens reach back over two blocks
    assert cached.hit(17) == 0  # block 2 is missing: nothing shorter will do either
    cached.evict(1, 5)
    assert cached.hit(30) == 5
    cached.evict(1, 3)
    assert cached.hit(30) == 0


def test_without_the_first_block_of_a_full_group_nothing_is_found():
    cached = Cached()
    cached.evict(0, 0)
    assert cached.hit(30) == 0


def test_a_hit_brings_the_blocks_of_each_group_and_nulls_for_what_was_passed():
    cached = Cached()
    again = cached.request("again", 30)
    prefix = cached.manager.find_cached_prefix(again)
    assert [len(blocks) for blocks in prefix.found] == [6, 2]
    full, window = cached.manager.admit(again, prefix, 30)
    assert window[:4] == [0] * 4 and len(set(window[4:]) | set(full)) == len(window) - 4 + len(full)
    cached.manager.check_integrity()


def test_equal_tokens_have_a_block_in_each_group_and_never_stand_in_for_each_other():
    cached = Cached(windows=(None, None))
    names = [block.block_hash for block in cached.manager.pool.blocks if block.block_hash is not None]
    assert len(names) == 12 and {name[:-1] for name in names} == set(cached.first.block_hashes)
    for index in range(6):
        cached.evict(1, index)
    assert cached.hit(30) == 0


def test_events_tell_each_groups_blocks_apart():
    cached = Cached(num_blocks=14, record_events=True)
    stored = [event for event in cached.manager.take_events() if isinstance(event, BlockStored)]
    assert {event.group_idx for event in stored} == {0, 1}
    told = [(event.group_idx, each) for event in stored for each in event.block_hashes]
    assert sorted(told) == sorted((group, each) for group in (0, 1) for each in cached.first.block_hashes)
    cached.manager.pool.allocate(13)
    removed = [event for event in cached.manager.take_events() if isinstance(event, BlockRemoved)]
    assert sorted(told) == sorted((event.group_idx, each) for event in removed for each in event.block_hashes)


def test_reset_forgets_all_groups_and_leaves_the_null_block_alone():
    cached = Cached()
    assert cached.manager.pool.reset_prefix_cache()
    assert cached.hit(30) == 0
    cached.manager.check_integrity()
    assert cached.manager.pool.usage == 0


def test_the_null_block_is_never_handed_out():
    pool = BlockPool(5, has_null=True)
    assert 0 not in [block.block_id for block in pool.allocate(4)]
    assert pool.usage == 1
    pool.check_integrity()


def test_a_shared_prefix_is_computed_once_by_requests_that_arrive_together():
    driver = Driver(make_scheduler(kv_cache_groups=groups(None, 6), max_num_batched_tokens=32))
    for name in "abc":
        driver.add(make_request(name, 29, max_tokens=4))
    driver.run()
    assert [driver.answers[name].num_cached_tokens for name in "abc"] == [0, 28, 28]


def test_a_preempted_request_finds_what_its_windows_left_behind():
    driver = Driver(make_scheduler(num_blocks=30, max_model_len=56, kv_cache_groups=groups(None, 6)))
    for name in "ab":
        driver.add(make_request(name, [ord(name)] * 32, max_tokens=24))
    answers = driver.run()
    assert any(plan.preempted_req_ids for plan in driver.plans)
    assert all(len(answer.token_ids) == 24 for answer in answers.values())


# Sizes


def test_a_cache_too_small_for_one_request_is_refused_with_the_length_that_fits():
    changes = {"max_num_batched_tokens": 8, "max_num_seqs": 4, "kv_cache_groups": groups(None, 6)}
    # 16 full blocks, and 4 for the 13 tokens of a window of 6 and a step of 8, and the null block
    assert make_scheduler(num_blocks=21, **changes)
    with pytest.raises(ConfigError, match="lower --max-model-len to 60"):
        make_scheduler(num_blocks=20, **changes)


def test_what_one_request_needs_and_what_the_cache_holds():
    both = groups(None, 6)
    assert blocks_of_request(both, 64, 8, BLOCK) == 16 + 4
    assert blocks_of_request(both, 8, 8, BLOCK) == 2 + 2
    assert longest_request(both, 21, 8, BLOCK, limit=1000) == 64
    assert longest_request(groups(6), 5, 8, BLOCK, limit=1000) == 1000
    assert longest_request(groups(6), 4, 8, BLOCK, limit=1000) == 12
    assert longest_request(groups(None), 0, 8, BLOCK, limit=1000) == 0
    assert num_tokens_held(groups(None), 10, 63, 8, BLOCK) == 40
    assert num_tokens_held(both, 41, 64, 8, BLOCK) == 128
