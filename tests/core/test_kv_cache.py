"""Block hashes, the free list, the pool and the block tables, without a scheduler."""

from __future__ import annotations

from array import array
from hashlib import sha256

import msgspec
import pytest

from minivllm.core.block_pool import BlockPool
from minivllm.core.kv_cache_manager import CachedPrefix, KVCacheManager
from minivllm.core.kv_cache_utils import (
    BLOCK_HASHES,
    FreeKVCacheBlockQueue,
    KVCacheBlock,
    extra_keys,
    hash_block,
    make_block_hasher,
    root_hash,
)
from minivllm.core.request import Request
from minivllm.messages.engine import LoRAIdentity
from minivllm.messages.kv_events import BlockStored
from minivllm.messages.stats import BLOCK_CACHED, BLOCK_EMPTY, BLOCK_HELD, BLOCK_SHARED
from tests.core.requests import make_request

BLOCK = 4
NOTHING_CACHED = CachedPrefix(0, [[]])


def hashes(prompt: list[int] | int = 4, **fields) -> list[bytes]:
    return Request.from_message(make_request(prompt=prompt, **fields), make_block_hasher(BLOCK)).block_hashes


def ids(blocks) -> list[int]:
    return [block.block_id for block in blocks]


# Hashes


def test_only_full_blocks_are_hashed():
    assert [len(hashes(list(range(n)))) for n in (3, 4, 7, 8)] == [0, 1, 1, 2]


def test_a_block_hash_names_the_whole_prefix():
    one, other = hashes([1, 2, 3, 4, 5, 6, 7, 8]), hashes([9, 2, 3, 4, 5, 6, 7, 8])
    assert one[1] != other[1]
    assert one == hashes([1, 2, 3, 4, 5, 6, 7, 8, 9])


def test_the_chain_is_sha256_over_parent_and_tokens():
    first = hash_block(root_hash(), [1, 2, 3, 4])
    assert hashes([1, 2, 3, 4, 5, 6, 7, 8]) == [first, hash_block(first, [5, 6, 7, 8])]
    assert first == sha256(root_hash() + array("I", [1, 2, 3, 4]).tobytes()).digest()


@pytest.mark.parametrize("algorithm", BLOCK_HASHES)
def test_every_algorithm_separates_what_must_be_separate(algorithm: str):
    def chain(prompt: list[int], secret: bytes = b"s", **fields) -> list[bytes]:
        hasher = make_block_hasher(BLOCK, algorithm, secret)
        return Request.from_message(make_request(prompt=prompt, **fields), hasher).block_hashes

    prompt = list(range(8))
    chains = [
        chain(prompt),
        chain([9, *prompt[1:]]),
        chain(prompt, cache_salt="x"),
        chain(prompt, secret=b"another engine's"),
    ]
    assert len({block_hash for each in chains for block_hash in each}) == 8
    assert chain(prompt) == chains[0]
    assert chain([*prompt, 1, 2, 3, 4])[:2] == chains[0]


def test_a_cache_salt_changes_every_hash_of_the_chain():
    prompt = list(range(8))
    plain, salted, other = hashes(prompt), hashes(prompt, cache_salt="x"), hashes(prompt, cache_salt="y")
    assert not set(plain) & set(salted) and not set(salted) & set(other)
    assert salted == hashes(prompt, cache_salt="x")


def test_an_adapter_names_every_block_and_another_load_of_its_name_is_another():
    def loaded(load_id: str, name: str = "sql") -> list[bytes]:
        return hashes(list(range(8)), lora=LoRAIdentity(name, load_id))

    chains = [hashes(list(range(8))), loaded("1"), loaded("2"), loaded("1", "sqlx"), loaded("x1", "sql")]
    assert len({block_hash for each in chains for block_hash in each}) == 10
    assert loaded("1") == chains[1]
    request = Request.from_message(make_request(prompt=list(range(8)), lora=LoRAIdentity("sql", "1"), cache_salt="s"))
    assert extra_keys(request, 0, 4) == (("lora", "sql", "1"), ("cache_salt", "s"))
    assert extra_keys(request, 4, 8) == (("lora", "sql", "1"),)


def test_what_one_key_holds_never_reads_as_two():
    salted = hashes([1, 2, 3, 4], cache_salt="('lora', 'a', 'b')")
    assert salted != hashes([1, 2, 3, 4], lora=LoRAIdentity("a", "b"))
    one, other = LoRAIdentity("a", "b', 'c"), LoRAIdentity("a', 'b", "c")
    assert hashes([1, 2, 3, 4], lora=one) != hashes([1, 2, 3, 4], lora=other)


def test_vectors_name_the_blocks_they_are_in_by_their_bytes():
    vectors = list(range(20, 30))
    chain = hashes(vectors=vectors)
    assert len(chain) == 2 and chain == hashes(vectors=vectors)
    assert hashes(vectors=[*vectors[:4], *vectors[5:], 1])[0] == chain[0]
    assert not set(hashes(vectors=[99, *vectors[1:]])) & set(chain)
    assert not set(hashes([0] * 10)) & set(chain)  # zeros stand in the place of tokens


def test_a_block_of_vectors_and_tokens_is_named_by_both():
    def mixed(num_vectors: int, prior: tuple[int, ...]) -> list[bytes]:
        return hashes(vectors=[7] * num_vectors, prior=prior)

    chains = [mixed(3, (0,)), mixed(2, (0, 0)), mixed(3, (1,)), mixed(4, ()), mixed(1, (0, 0, 0))]
    assert len({block_hash for each in chains for block_hash in each}) == 5
    grown = Request.from_message(make_request(vectors=[7] * 3), make_block_hasher(BLOCK))
    for token in (0, 5, 5, 5, 5):
        grown.append_output_tokens([token])
    assert grown.block_hashes == mixed(3, (0, 5, 5, 5, 5)) and grown.block_hashes[0] == chains[0][0]


def test_the_dtype_of_vectors_is_part_of_the_name():
    request = make_request(vectors=[5] * 4)
    embeds = msgspec.structs.replace(request.prompt_embeds, dtype="bfloat16")
    other = msgspec.structs.replace(request, prompt_embeds=embeds)
    hasher = make_block_hasher(BLOCK)
    assert Request.from_message(request, hasher).block_hashes != Request.from_message(other, hasher).block_hashes


def test_events_tell_what_separates_equal_tokens():
    hasher = make_block_hasher(BLOCK)
    manager = KVCacheManager(8, BLOCK, record_events=True)
    for i, fields in enumerate(({}, {"cache_salt": "s"}, {"vectors": [9] * 8})):
        request = Request.from_message(make_request(str(i), **({"prompt": [0] * 8} | fields)), hasher)
        manager.admit(request, manager.find_cached_prefix(request), 8)
        request.num_confirmed_tokens = 8
        manager.cache_confirmed_blocks(request)
        manager.free(request)
    plain, salted, vectors = [event.extra_keys for event in manager.take_events() if isinstance(event, BlockStored)]
    assert plain is None and salted == [(("cache_salt", "s"),), None]
    digest = sha256(bytes([9] * 16)).hexdigest()
    assert vectors == [(("prompt_embeds", "float16", digest),)] * 2


def test_an_empty_salt_is_a_salt():
    assert hashes([1, 2, 3, 4], cache_salt="") != hashes([1, 2, 3, 4])


def test_appended_tokens_extend_the_chain_as_a_longer_prompt_would():
    request = Request.from_message(make_request(prompt=[1, 2, 3]), make_block_hasher(BLOCK))
    for token in (4, 5, 6, 7, 8):
        request.append_output_tokens([token])
    assert request.block_hashes == hashes([1, 2, 3, 4, 5, 6, 7, 8])


def test_prior_output_hashes_like_prompt():
    assert hashes([1, 2], prior=(3, 4)) == hashes([1, 2, 3, 4])


# The free list


def test_the_free_list_gives_up_any_block_and_keeps_its_order():
    blocks = [KVCacheBlock(i) for i in range(5)]
    queue = FreeKVCacheBlockQueue(blocks)
    queue.remove(blocks[2])
    assert ids(queue.popleft_n(2)) == [0, 1]
    queue.prepend([blocks[2]])
    queue.extend([blocks[0]])
    assert ids(queue) == [2, 3, 4, 0] and queue.num_free_blocks == 4


def test_the_free_list_refuses_what_it_holds_and_what_it_lacks():
    blocks = [KVCacheBlock(i) for i in range(2)]
    queue = FreeKVCacheBlockQueue(blocks)
    with pytest.raises(AssertionError, match="already"):
        queue.extend([blocks[0]])
    queue.remove(blocks[0])
    with pytest.raises(AssertionError, match="not in the free list"):
        queue.remove(blocks[0])
    with pytest.raises(AssertionError, match="3 blocks wanted"):
        queue.popleft_n(3)


# The pool


def test_unnamed_blocks_are_reused_before_cached_ones():
    pool = BlockPool(4)
    named, unnamed = pool.allocate(2)
    pool.cache(named, b"n")
    pool.free([named, unnamed])
    assert ids(pool.allocate(3)) == [unnamed.block_id, 2, 3]
    assert pool.get_cached_block(b"n") is named
    pool.check_integrity()


def test_the_tail_of_a_freed_chain_is_evicted_first():
    pool = BlockPool(3)
    chain = pool.allocate(3)
    for block, name in zip(chain, (b"0", b"1", b"2")):
        pool.cache(block, name)
    pool.free(chain)
    pool.allocate(1)
    assert [pool.get_cached_block(name) is not None for name in (b"0", b"1", b"2")] == [True, True, False]


def test_the_least_recently_freed_chain_is_evicted_first_and_a_hit_makes_it_recent():
    pool = BlockPool(3)
    old, middle, new = (pool.allocate(1) for _ in range(3))
    for blocks, name in ((old, b"old"), (middle, b"middle"), (new, b"new")):
        pool.cache(blocks[0], name)
        pool.free(blocks)
    pool.touch(old)
    pool.free(old)
    pool.allocate(2)
    assert pool.get_cached_block(b"old") is old[0]
    assert pool.get_cached_block(b"middle") is None and pool.get_cached_block(b"new") is None


def test_a_held_block_is_not_evicted():
    pool = BlockPool(2)
    held = pool.allocate(1)
    pool.cache(held[0], b"h")
    pool.touch(held)
    pool.free(held)
    assert pool.num_free_blocks == 1
    pool.allocate(1)
    assert pool.get_cached_block(b"h") is held[0]
    pool.check_integrity()


def test_of_two_blocks_with_equal_content_the_second_is_reused_first():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.cache(first, b"same")
    pool.cache(second, b"same")
    pool.check_integrity()
    pool.free([first])
    pool.free([second])
    assert pool.allocate(1) == [second]
    assert pool.get_cached_block(b"same") is first


def test_a_double_free_is_caught():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_reset_forgets_everything_and_is_refused_while_a_block_is_held():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.cache(blocks[0], b"x")
    assert not pool.reset_prefix_cache()
    pool.free(blocks)
    assert pool.reset_prefix_cache()
    assert pool.get_cached_block(b"x") is None
    pool.check_integrity()


def test_usage_counts_held_blocks_only():
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert pool.usage == 0.75
    pool.cache(blocks[0], b"x")
    pool.free(blocks)
    assert pool.usage == 0


def test_a_picture_of_the_pool_tells_free_cached_held_and_shared_blocks_apart():
    pool = BlockPool(5)
    cached, held, shared = pool.allocate(3)
    for block in (cached, shared):
        pool.cache(block, bytes([block.block_id]))
    pool.free([cached])
    pool.touch([shared])
    expected = [BLOCK_CACHED, BLOCK_HELD, BLOCK_SHARED, BLOCK_EMPTY, BLOCK_EMPTY]
    assert pool.states(limit=8) == (1, bytes(expected))
    assert pool.states(limit=3) == (2, bytes(expected[::2]))  # of a large pool, every second block
    with_null = BlockPool(3, has_null=True)
    assert with_null.states(limit=8) == (1, bytes([BLOCK_EMPTY] * 2))  # the null block is nobody's


# Block tables


def computed(manager: KVCacheManager, request: Request, num_tokens: int) -> None:
    """As if a step had computed and confirmed so many tokens."""
    request.num_computed_tokens = request.num_confirmed_tokens = num_tokens
    manager.cache_confirmed_blocks(request)
    manager.check_integrity()


def test_a_block_is_found_only_after_its_last_token_is_confirmed():
    manager = KVCacheManager(16, BLOCK)
    writer, reader = (
        Request.from_message(make_request(name, prompt=9), make_block_hasher(BLOCK)) for name in "ab"
    )
    manager.admit(writer, NOTHING_CACHED, writer.num_tokens)
    assert manager.find_cached_prefix(reader).num_blocks == 0
    computed(manager, writer, 7)
    assert manager.find_cached_prefix(reader).num_blocks == 1
    computed(manager, writer, 9)
    assert manager.find_cached_prefix(reader).num_blocks == 2


def test_a_hit_leaves_at_least_the_last_token_to_compute():
    manager = KVCacheManager(16, BLOCK)
    hasher = make_block_hasher(BLOCK)
    writer = Request.from_message(make_request("a", prompt=8), hasher)
    manager.admit(writer, NOTHING_CACHED, writer.num_tokens)
    computed(manager, writer, 8)
    assert manager.find_cached_prefix(Request.from_message(make_request("b", prompt=8), hasher)).num_blocks == 1
    assert manager.find_cached_prefix(Request.from_message(make_request("c", prompt=9), hasher)).num_blocks == 2


def test_blocks_lacking_counts_found_blocks_that_must_leave_the_free_list():
    manager = KVCacheManager(4, BLOCK)
    hasher = make_block_hasher(BLOCK)
    first = Request.from_message(make_request("a", prompt=9), hasher)
    manager.admit(first, NOTHING_CACHED, first.num_tokens)
    computed(manager, first, 9)
    manager.free(first)
    again = Request.from_message(make_request("b", prompt=16), hasher)
    prefix = manager.find_cached_prefix(again)
    assert prefix.num_blocks == 2
    assert manager.num_blocks_lacking(again.num_tokens, prefix) == 0  # 2 found and free, 2 new: all 4
    manager.pool.allocate(1)
    assert manager.num_blocks_lacking(again.num_tokens, prefix) == 1


def test_extend_gives_nothing_within_a_block_and_none_when_the_pool_is_empty():
    manager = KVCacheManager(2, BLOCK)
    request = Request.from_message(make_request("a", prompt=3))
    manager.admit(request, NOTHING_CACHED, request.num_tokens)
    assert manager.extend(request, 4) == []
    assert manager.extend(request, 5) == [[1]]
    assert manager.extend(request, 9) is None
    assert manager.block_ids(request) == [[0, 1]]
