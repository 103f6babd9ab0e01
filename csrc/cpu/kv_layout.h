// Where keys and values lie in the paged cache: [num_blocks, (K, V), num_kv_heads, block_size / 32, tile bytes].
//
// A tile is 32 consecutive tokens of one head, in the order the attention kernels read. minivllm/ops/kv_layout.py
// says the same in torch. With t the token of the tile and d the dimension, elements go
//   f32, f16   K [d][t]                                        V [t][d]
//   bf16       K [t/16][d/2][t%16][d%2]                        V [d/16][t/2][d%16][t%2]
//              (both are AMX's second operand: 16 rows of 16 pairs are one tile register)
//   fp8, int8  the order of bf16, each 64 elements [row][quarter][8] of it stored [quarter][row][8], so that two
//              unpack instructions give back both rows; int8 has 32 float32 scales, one a token, at the tile's end.
// int8 codes are a sign bit and seven bits of magnitude, so that one table serves both types.
#pragma once

#include <cstdint>

namespace minivllm {

enum class KvType : int { f32 = 0, bf16 = 1, f16 = 2, fp8_e4m3 = 3, int8 = 4 };  // as in minivllm/ops/kv_layout.py

constexpr int64_t kKvTile = 32;       // tokens; block_size is a multiple
constexpr int64_t kHeadDimStep = 16;  // head_dim is a multiple, and at most the next
constexpr int64_t kMostHeadDim = 1024;

struct KvLayout {
    KvType type;
    int64_t num_kv_heads, head_dim, block_size;

    int64_t element_bytes() const {
        return type == KvType::f32 ? 4 : type == KvType::fp8_e4m3 || type == KvType::int8 ? 1 : 2;
    }
    int64_t data_bytes() const { return kKvTile * head_dim * element_bytes(); }  // of a tile, without its scales
    int64_t tile_bytes() const { return data_bytes() + (type == KvType::int8 ? kKvTile * 4 : 0); }
    int64_t head_bytes() const { return block_size / kKvTile * tile_bytes(); }
    int64_t half_bytes() const { return num_kv_heads * head_bytes(); }  // from a key to its value
    int64_t block_bytes() const { return 2 * half_bytes(); }

    // The key tile that holds a block's token; the value tile lies half_bytes() behind it.
    int64_t key_tile(int64_t block, int64_t kv_head, int64_t token_of_block) const {
        return block * block_bytes() + kv_head * head_bytes() + token_of_block / kKvTile * tile_bytes();
    }
};

}  // namespace minivllm
