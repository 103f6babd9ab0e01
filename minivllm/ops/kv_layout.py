"""Where keys and values lie in the paged cache, and how its types store them.

The torch side of `csrc/cpu/kv_layout.h`, and of what GPUs read: sizes for everyone, reading and writing for the
references. Owns no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minivllm.config.cache import KV_TILE
from minivllm.config.hf_config import HEAD_DIM_STEP
from minivllm.ops import native
from minivllm.ops.op import OpSpec

# By name: the code of csrc/cpu/kv_layout.h, and the torch type of an element. An int8 is a sign bit and seven bits of
# magnitude, which torch has no type for.
KV_TYPES = {
    "float32": (0, torch.float32),
    "bfloat16": (1, torch.bfloat16),
    "float16": (2, torch.float16),
    "fp8_e4m3": (3, torch.uint8),
    "int8": (4, torch.uint8),
}
_FP8_MAX = 448.0


def native_why_not(spec: OpSpec) -> str | None:
    """None, or why no native kernel works on tiles of these sizes."""
    head_dim, block_size = spec.sizes.get("head_dim", HEAD_DIM_STEP), spec.sizes.get("block_size", KV_TILE)
    if head_dim % HEAD_DIM_STEP:
        return f"head_dim {head_dim} is not a multiple of {HEAD_DIM_STEP}"
    if block_size % KV_TILE:
        return f"block size {block_size} is not a multiple of the KV tile of {KV_TILE} tokens; try --block-size 128"
    return native.why_not(spec)


@dataclass(frozen=True)
class KvLayout:
    """One layer's cache: [num_blocks, (K, V), num_kv_heads, block_size / 32, tile_bytes] uint8.

    A tile is 32 tokens of one head, in the order the attention kernels read, which depends on the type. int8 keeps
    one float32 scale a token and head, of K and of V, at the tile's end.
    """

    dtype: str  # one of KV_TYPES
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens

    @property
    def tile(self) -> int:
        """Tokens whose elements lie together."""
        return KV_TILE

    @property
    def code(self) -> int:
        return KV_TYPES[self.dtype][0]

    @property
    def element_type(self) -> torch.dtype:
        return KV_TYPES[self.dtype][1]

    @property
    def layout_id(self) -> str:
        return f"tile{KV_TILE}-{self.dtype}-v1"

    @property
    def tile_bytes(self) -> int:
        return self._data_bytes + (4 * self.tile if self.dtype == "int8" else 0)

    @property
    def _data_bytes(self) -> int:
        return self.tile * self.head_dim * self.element_type.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer, keys and values together."""
        return torch.Size(self.shape(1)).numel()

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        return (num_blocks, 2, self.num_kv_heads, self.block_size // self.tile, self.tile_bytes)

    # For the references --------------------------------------------------------

    def write(
        self, cache: torch.Tensor, half: int, slots: torch.Tensor, rows: torch.Tensor, scale: float
    ) -> None:
        """rows: [n, num_kv_heads, head_dim], the keys (half 0) or values (half 1) of n slots, in place.

        scale: what fp8 codes count in.
        """
        blocks, tokens = slots // self.block_size, slots % self.block_size
        tiles, offsets = tokens // self.tile, tokens % self.tile
        stored, scales = self._encode(rows, scale)
        heads = torch.arange(self.num_kv_heads, device=cache.device)
        where = self._order(half).to(cache.device)[offsets]  # [n, head_dim]
        self._elements(cache, half)[
            blocks[:, None, None], heads[None, :, None], tiles[:, None, None], where[:, None, :]
        ] = stored
        if scales is not None:
            self._scales(cache, half)[blocks[:, None], heads, tiles[:, None], offsets[:, None]] = scales

    def read(self, cache: torch.Tensor, half: int, scale: float) -> torch.Tensor:
        """Keys or values of blocks [n, 2, …]: [n, num_kv_heads, block_size, head_dim] float32."""
        order = self._order(half).to(cache.device)
        codes = self._elements(cache, half)[..., order]  # [n, heads, tiles, 32, head_dim]
        if self.dtype == "fp8_e4m3":
            values = codes.view(torch.float8_e4m3fn).float() * scale
        elif self.dtype == "int8":
            values = self._int8_values(codes) * self._scales(cache, half)[..., None]
        else:
            values = codes.float()
        return values.flatten(2, 3)

    def _elements(self, cache: torch.Tensor, half: int) -> torch.Tensor:
        """[num_blocks, num_kv_heads, tiles, tile * head_dim], a view."""
        return cache[:, half, :, :, : self._data_bytes].view(self.element_type)

    def _scales(self, cache: torch.Tensor, half: int) -> torch.Tensor:
        """[num_blocks, num_kv_heads, tiles, tile] float32, a view."""
        return cache[:, half, :, :, self._data_bytes :].view(torch.float32)

    def _order(self, half: int) -> torch.Tensor:
        """[tile, head_dim]: where in a tile the element of a token and a dimension lies."""
        dim, lies = self.head_dim, torch.arange(KV_TILE * self.head_dim)
        if self.dtype in ("float32", "float16"):
            return lies.view(KV_TILE, dim) if half else lies.view(dim, KV_TILE).T
        if half:
            order = lies.view(dim // 16, 16, 16, 2).permute(1, 3, 0, 2).reshape(KV_TILE, dim)
        else:
            order = lies.view(2, dim // 2, 16, 2).permute(0, 2, 1, 3).reshape(KV_TILE, dim)
        if self.element_type.itemsize == 1:  # of each 64, [row][quarter][8] is stored as [quarter][row][8]
            order = order // 64 * 64 + order % 32 // 8 * 16 + order // 32 % 2 * 8 + order % 8
        return order

    def _encode(self, rows: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the type stores them, with a scale a row for int8 (NaN, and codes of 0, where a row is not finite)."""
        if self.dtype == "fp8_e4m3":
            scaled = (rows.float() / scale).clamp(-_FP8_MAX, _FP8_MAX)
            return scaled.to(torch.float8_e4m3fn).view(torch.uint8), None
        if self.dtype != "int8":
            return rows.to(self.element_type), None
        rows = rows.float()
        scales = rows.abs().amax(-1) / 127
        scales = torch.where(rows.isfinite().all(-1), scales, torch.nan)
        codes = (rows / scales[..., None]).round()
        codes = torch.where(scales[..., None] > 0, codes, 0)
        return self._int8_codes(codes), scales

    def _int8_codes(self, numbers: torch.Tensor) -> torch.Tensor:
        """Whole numbers in [-127, 127] as bytes."""
        return torch.where(numbers < 0, 128 - numbers, numbers).to(torch.uint8)

    def _int8_values(self, codes: torch.Tensor) -> torch.Tensor:
        magnitude = (codes & 0x7F).float()
        return torch.where(codes >= 0x80, -magnitude, magnitude)


@dataclass(frozen=True)
class RowLayout(KvLayout):
    """The same for GPUs: of each block, half and head, the tokens' rows one after another, then int8's scales.

    [num_blocks, (K, V), num_kv_heads, 1, block_size * head_dim elements]. int8 is two's complement here, which a GPU
    converts by itself.
    """

    @property
    def tile(self) -> int:
        return self.block_size

    @property
    def layout_id(self) -> str:
        return f"rows-{self.dtype}-v1"

    def _order(self, half: int) -> torch.Tensor:
        return torch.arange(self.block_size * self.head_dim).view(self.block_size, self.head_dim)

    def _int8_codes(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.to(torch.int8).view(torch.uint8)

    def _int8_values(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.int8).float()
