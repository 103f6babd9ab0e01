"""The small parts of the KV cache: block hashes, a block's bookkeeping, and the list of free blocks."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from minivllm.core.request import Request


def _sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _load_xxhash() -> Callable[[bytes], bytes]:
    import xxhash

    return xxhash.xxh3_128_digest


# --prefix-caching-hash-algo, to what makes its hash. sha256 (32 bytes): nobody can make two prefixes collide.
# xxhash (16 bytes): they do not collide by chance, but who knows the root could make them.
BLOCK_HASHES: dict[str, Callable[[], Callable[[bytes], bytes]]] = {
    "sha256": lambda: _sha256,
    "xxhash": _load_xxhash,
}


def root_hash(digest: Callable[[bytes], bytes] = _sha256, secret: bytes = b"") -> bytes:
    """The parent of every first block."""
    return digest(b"minivllm block chain 1" + secret)


def hash_block(
    parent: bytes,
    token_ids: Sequence[int],
    extra_keys: bytes = b"",
    digest: Callable[[bytes], bytes] = _sha256,
) -> bytes:
    """Name a full block by all that its KV depends on: every token up to its end, and who may share it.

    The hash of parent, the tokens (4 bytes each, little or big endian as the machine) and the extra keys; equal
    names mean equal prefixes, so nothing is compared again on a hit.

    Raises:
        OverflowError: a token id is negative or does not fit 32 bits.
    """
    return digest(parent + array("I", token_ids).tobytes() + extra_keys)


def make_block_hasher(
    block_size: int, algorithm: str = "sha256", secret: bytes = b""
) -> Callable[[Request], None]:
    """A function that appends to `request.block_hashes` what its full blocks still lack.

    secret: for an algorithm that is not collision resistant, random bytes that no client knows.
    """
    digest = BLOCK_HASHES[algorithm]()
    root = root_hash(digest, secret)

    def extend_block_hashes(request: Request) -> None:
        hashes, token_ids = request.block_hashes, request.all_token_ids
        start = len(hashes) * block_size
        while start + block_size <= len(token_ids):
            keys = extra_keys(request, start, start + block_size)
            written = ascii(keys).encode() if keys else b""  # quoted, so that no two lists of keys are written alike
            parent = hashes[-1] if hashes else root
            hashes.append(hash_block(parent, token_ids[start : start + block_size], written, digest))
            start += block_size
        request.num_tokens_to_next_hash = start + block_size

    return extend_block_hashes


def extra_keys(request: Request, start: int, stop: int) -> tuple[tuple[str, ...], ...]:
    """What separates equal tokens, of a block of the positions from start up to stop; each key has its kind first.

    The salt stands in the first block, and the chain passes it on. A prompt given as embeddings has no tokens: the
    zeros in their place mean what the vectors are, whose digest is SHA-256 whatever the chain's is, since the client
    chooses their bytes and this part of a name has no secret in it.
    """
    keys = []
    if request.lora is not None:
        keys.append(("lora", request.lora.name, request.lora.load_id))
    if request.cache_salt is not None and start == 0:
        keys.append(("cache_salt", request.cache_salt))
    embeds = request.prompt_embeds
    if embeds is not None and start < request.num_prompt_tokens:
        keys.append(("prompt_embeds", embeds.dtype, _sha256(embeds.rows(start, stop)).hex()))
    return tuple(keys)


class KVCacheBlock:
    """One block. Free exactly when `ref_cnt` is 0; a free block keeps its hash until it is handed out again."""

    __slots__ = ("block_id", "ref_cnt", "block_hash", "prev_free", "next_free")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_cnt = 0
        self.block_hash: bytes | None = None
        self.prev_free: KVCacheBlock | None = None
        self.next_free: KVCacheBlock | None = None

    def __repr__(self) -> str:
        name = self.block_hash.hex()[:8] if self.block_hash else None
        return f"KVCacheBlock({self.block_id}, ref_cnt={self.ref_cnt}, hash={name})"


class FreeKVCacheBlockQueue:
    """Free blocks in the order they will be reused; the links live in the blocks, so any one leaves in O(1).

    first ⇄ … ⇄ last        un-hashed blocks, then hashed ones, least recently freed first
    """

    def __init__(self, blocks: Sequence[KVCacheBlock]) -> None:
        self._head, self._tail = KVCacheBlock(-1), KVCacheBlock(-1)  # fakes: no end is ever None
        self._head.next_free, self._tail.prev_free = self._tail, self._head
        self.num_free_blocks = 0
        self.extend(blocks)

    def __iter__(self) -> Iterator[KVCacheBlock]:
        block = self._head.next_free
        while block is not self._tail:
            yield block
            block = block.next_free

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Take the n first. There must be so many."""
        assert n <= self.num_free_blocks, f"{n} blocks wanted, {self.num_free_blocks} free"
        taken = list(islice(self, n))
        for block in taken:
            self.remove(block)
        return taken

    def remove(self, block: KVCacheBlock) -> None:
        """Take out a block, wherever it is."""
        before, after = block.prev_free, block.next_free
        assert before is not None and after is not None, f"{block} is not in the free list"
        before.next_free, after.prev_free = after, before
        block.prev_free = block.next_free = None
        self.num_free_blocks -= 1

    def extend(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Add at the end: reused last."""
        self._insert(self._tail.prev_free, blocks)

    def prepend(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Add at the front, in this order: reused first."""
        self._insert(self._head, blocks)

    def _insert(self, left: KVCacheBlock, blocks: Sequence[KVCacheBlock]) -> None:
        right = left.next_free
        for block in blocks:
            assert block.next_free is None, f"{block} is in the free list already"
            left.next_free, block.prev_free = block, left
            left = block
        left.next_free, right.prev_free = right, left
        self.num_free_blocks += len(blocks)
