// A walk of many rows on AMX: prompts, and what the members of a group share. Every row gets the bits that
// Walk<AmxMath> would give it. Included by attention.cpp only.
//
// 32 rows, a block, take the steps of a stretch before the next block does: what they need of their own stays in the
// nearest cache, and the stretch's keys and values in the second, whither the next stretch's are fetched meanwhile.
// Softmax and tile products take turns row by row: while the weights of one step are computed, AMX adds the values of
// the step before it and computes the scores of the one after it, so that neither kind of unit waits for the other.
#pragma once

#include "attention_amx.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// Lane i: the largest of vector i.
MINIVLLM_INLINE Vec max_of_each(const Vec (&rows)[16]) {
    __m512 v[4];
    for (int j = 0; j < 4; ++j) {  // row 4 * quarter + j in each quarter
        const __m512 a = rows[j].v, b = rows[4 + j].v, c = rows[8 + j].v, d = rows[12 + j].v;
        const __m512 ab = _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        const __m512 cd = _mm512_max_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
        v[j] = _mm512_max_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    }
    const __m512 left = _mm512_max_ps(_mm512_shuffle_ps(v[0], v[1], 0x44), _mm512_shuffle_ps(v[0], v[1], 0xee));
    const __m512 right = _mm512_max_ps(_mm512_shuffle_ps(v[2], v[3], 0x44), _mm512_shuffle_ps(v[2], v[3], 0xee));
    return {_mm512_max_ps(_mm512_shuffle_ps(left, right, 0x88), _mm512_shuffle_ps(left, right, 0xdd))};
}

class WideWalk {
public:
    WideWalk(const Attention& a, const Rows& rows) : a_(a), rows_(rows), head_dim_(a.layout.head_dim) {
        num_k_ = int((head_dim_ + 31) / 32);
        const int64_t padded = (rows.count + kBlock - 1) / kBlock * kBlock;
        const int64_t segment_bytes = a.layout.type == KvType::bf16 ? 0 : kSegment * head_dim_ * 2;
        const int64_t row_bytes = head_dim_ * 8 + num_k_ * 64 + 2 * (kLanes + 1) * 4 + 8;
        const size_t bytes = size_t(padded * row_bytes + (2 * kBlock * kStep + 2 * kBlock + 2 * kStep) * 4 +
                                    kStep * head_dim_ * 2 + 2 * segment_bytes) + AmxTiles::bytes(a) + 4096;
        char* p = static_cast<char*>(thread_scratch(1, bytes));
        auto take = [&p](int64_t n) { char* taken = p; p += (n + 63) / 64 * 64; return taken; };
        for (float*& scores : scores_) scores = reinterpret_cast<float*>(take(kBlock * kStep * 4));
        for (int i = 0; i < 2; ++i) {
            seg_sum_[i] = reinterpret_cast<float*>(take(padded * kLanes * 4));
            seg_max_[i] = reinterpret_cast<float*>(take(padded * 4));
        }
        seg_out_ = reinterpret_cast<float*>(take(padded * head_dim_ * 4));
        bias_ = reinterpret_cast<float*>(take(kBlock * 4));
        kept_ = reinterpret_cast<float*>(take(kBlock * 4));
        k_scales_ = reinterpret_cast<float*>(take(kStep * 4));
        v_scales_ = reinterpret_cast<float*>(take(kStep * 4));
        q_ = reinterpret_cast<bf16*>(take(padded * num_k_ * 64));
        cut_ = reinterpret_cast<bf16*>(take(kStep * head_dim_ * 2));
        out_ = reinterpret_cast<float*>(take(padded * head_dim_ * 4));
        max_ = reinterpret_cast<float*>(take(padded * 4));
        sum_ = reinterpret_cast<float*>(take(padded * 4));
        keys_.own = reinterpret_cast<bf16*>(take(segment_bytes));
        values_.own = reinterpret_cast<bf16*>(take(segment_bytes));
        values_.offset = a.layout.half_bytes();
        tiles_ = AmxTiles(a, take(int64_t(AmxTiles::bytes(a))));
    }

    // next: where this thread will probably go on, or null.
    void run(const Path& path, const Path* next) {
        path_ = path;
        next_path_ = next;
        find_tiles();
        shape_tiles(16);
        Item now = first_item(), before{};
        if (now.exists) add_scores(now);
        while (now.exists) {
            const Item after = item_after(now);
            if (before.exists && pending_ != 0) raise(before);
            begin_softmax(now);
            pace(now, before, after);
            if (before.exists) add_values(before);
            if (after.exists) add_scores(after);
            while (row_ < end_row_) weigh(row_++);
            before = now;
            now = after;
        }
        if (before.exists) {
            if (pending_ != 0) raise(before);
            row_ = end_row_ = 0;
            add_values(before);
        }
        _tile_release();
    }

private:
    static constexpr int64_t kBlock = 32;
    // Positions. Blocks of the cache lie a power of two apart as a rule, so that a head's share the same sets of the
    // second cache: two stretches take half of its ways.
    static constexpr int64_t kStretch = 256;
    static_assert(kSegment % kStretch == 0 && kStretch % kStep == 0);

    // A step of a block.
    struct Item {
        bool exists;
        int parity;                    // whose scores_ it uses
        bool is_first, is_last;        // of its block in the segment
        bool is_whole;                 // all rows see all of its tiles
        int64_t block, block_end;      // rows
        int64_t stretch, segment;      // positions: where they begin
        int64_t begin, end;            // the step's first, and what the block sees of the segment
        int first_tile, end_tile;      // of the step
    };

    // The tiles of a segment as bf16.
    struct Side {
        bf16* own = nullptr;   // [kSegment / kTile] tiles, for codes
        int64_t offset = 0;    // from a key tile
        int64_t segment = -1;
        uint32_t widened = 0;
    };

    // ---- which steps there are ----

    Item first_item() const {
        return start_block(Item{}, 0, path_.begin / kStretch * kStretch);
    }

    Item item_after(const Item& item) const {
        Item next = item;
        next.parity ^= 1;
        next.begin += kStep;
        if (next.begin < next.end && next.begin < item.stretch + kStretch) return finish_item(next);
        return start_block(next, item.block + kBlock, item.stretch);
    }

    // The first step of the first block from `block` on that sees something of the stretch, or of one after it.
    Item start_block(Item item, int64_t block, int64_t stretch) const {
        for (; stretch < path_.end; stretch += kStretch, block = 0)
            for (; block < rows_.count; block += kBlock) {
                item.block = block;
                item.block_end = lesser(block + kBlock, rows_.count);
                item.stretch = stretch;
                item.segment = stretch / kSegment * kSegment;
                const int64_t from = greater(rows_.begin[block], stretch);
                item.end = lesser(rows_.end[item.block_end - 1], item.segment + kSegment);
                if (from >= lesser(item.end, stretch + kStretch)) continue;
                item.exists = true;
                item.begin = from / kStep * kStep;
                return finish_item(item);
            }
        item.exists = false;
        return item;
    }

    Item finish_item(Item item) const {
        const int64_t from = greater(rows_.begin[item.block] - item.begin, 0);
        item.first_tile = int(from / kTile);
        item.end_tile = int((lesser(item.end - item.begin, kStep) + kTile - 1) / kTile);
        item.is_first = item.begin <= greater(rows_.begin[item.block], item.segment);
        item.is_last = item.begin + kStep >= item.end;
        item.is_whole = rows_.begin[item.block_end - 1] <= item.begin + item.first_tile * kTile &&
                        rows_.end[item.block] >= item.begin + item.end_tile * kTile;
        return item;
    }

    // The path's key tiles; those before its rows' windows are left out.
    void find_tiles() {
        const int64_t size = a_.layout.block_size, first = rows_.begin[0] / size * size;
        key_tiles_ = static_cast<const char**>(thread_scratch(2, size_t((path_.end / kTile + 1) * 8)));
        for (int64_t p = first; p < path_.end;) {
            const char* tile = a_.kv_cache + a_.layout.key_tile(path_.blocks[p / size], path_.kv_head, 0);
            for (int64_t end = p + size; p < end && p < path_.end; p += kTile, tile += a_.layout.tile_bytes())
                key_tiles_[p / kTile] = tile;
        }
    }
    const char* key_tile(int64_t position) const { return key_tiles_[position / kTile]; }

    const bf16* tile_of(Side& side, const Item& item, int t) const {
        const int64_t p = item.begin + t * kTile;
        const char* tile = key_tile(p) + side.offset;
        if (!tiles_.are_bytes()) return reinterpret_cast<const bf16*>(tile);
        if (side.segment != item.segment) side.segment = item.segment, side.widened = 0;
        const int64_t i = (p - item.segment) / kTile;
        bf16* own = side.own + i * kTile * head_dim_;
        if ((side.widened >> i & 1) == 0) tiles_.widen(own, tile);
        side.widened |= 1u << i;
        return own;
    }

    // Into the second cache, what blocks will need of the next stretch, each its share; and of what a walk begins with,
    // the first block one step ahead.
    void look_ahead(const Item& item, int64_t turns) {
        const int64_t block = item.block / kBlock, num_blocks = (rows_.count + kBlock - 1) / kBlock;
        const int64_t stretch = item.stretch + kStretch, offset = item.begin - item.stretch;
        ahead_.stop();
        early_.stop();
        if (stretch < path_.end) fetch_step(ahead_, path_, stretch + offset, block, num_blocks, turns);
        else if (next_path_ != nullptr)
            fetch_step(ahead_, *next_path_, next_path_->begin / kStretch * kStretch + offset, block, num_blocks, turns);
        if (block == 0 && item.stretch == path_.begin / kStretch * kStretch && offset + kStep < kStretch)
            fetch_step(early_, path_, item.begin + kStep, 0, 1, turns);
    }

    void fetch_step(Ahead<_MM_HINT_T1>& ahead, const Path& path, int64_t p, int64_t part, int64_t num_parts,
                    int64_t turns) const {
        const KvLayout& layout = a_.layout;
        const int64_t from = layout.tile_bytes() * part / num_parts / 64 * 64;
        const int64_t bytes = layout.tile_bytes() * (part + 1) / num_parts - from;
        const char* places[2 * kStepTiles];
        int n = 0;
        for (const int64_t end = lesser(p + kStep, path.end); p < end; p += kTile) {
            const int64_t block = path.blocks[p / layout.block_size];
            places[n] = a_.kv_cache + layout.key_tile(block, path.kv_head, p % layout.block_size) + from;
            places[n + 1] = places[n] + layout.half_bytes();
            n += 2;
        }
        ahead.start(places, n, bytes, turns);
    }

    // ---- products, and rows of the softmax between them ----

    // How many rows to weigh, and what to fetch, after each four products.
    void pace(const Item& now, const Item& before, const Item& after) {
        int sites = 0;
        if (before.exists) sites += (before.end_tile - before.first_tile) * int((head_dim_ + 31) / 32);
        if (after.exists) sites += (after.end_tile - after.first_tile) * num_k_;
        row_ = 0;
        end_row_ = int(now.block_end - now.block);
        rows_a_turn_ = sites == 0 ? 0 : (end_row_ + sites - 1) / sites;
        look_ahead(now, sites);
    }

    MINIVLLM_INLINE void weigh_some() {
        ahead_.turn();
        early_.turn();
        for (int i = 0; i < rows_a_turn_ && row_ < end_row_; ++i) weigh(row_++);
    }

    // A block's, when it starts; those of the next block are fetched meanwhile.
    void read_queries(const Item& item) {
        for (int64_t r = item.block; r < item.block_end; ++r)
            read_query(q_ + r / 16 * num_k_ * 512 + r % 16 * 32, a_, rows_.token[r], rows_.head[r]);
        for (int64_t r = item.block_end; r < lesser(item.block_end + kBlock, rows_.count); ++r) {
            const bf16* q = static_cast<const bf16*>(a_.q) + rows_.token[r] * a_.q_token_stride +
                            rows_.head[r] * a_.q_head_stride;
            for (int64_t d = 0; d < head_dim_; d += 32) _mm_prefetch(q + d, _MM_HINT_T1);
        }
    }

    // Keys and values pass the nearest cache by: what rows have of their own stays there.
    // Tiles 0 to 3 hold sums, 4 and 5 queries, 6 and 7 keys.
    void add_scores(const Item& item) {
        if (item.is_first && rows_.begin[item.block] >= item.segment) read_queries(item);
        const bf16* q = q_ + item.block * num_k_ * 32;
        for (int t = item.first_tile; t < item.end_tile; ++t) {
            const bf16 *key = tile_of(keys_, item, t), *right = key + 16 * head_dim_;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int k = 0; k < num_k_; ++k) {
                _tile_stream_loadd(6, tiles_.key_rows(key, k), 64);
                _tile_loadd(4, q + k * 512, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, q + (num_k_ + k) * 512, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_stream_loadd(7, tiles_.key_rows(right, k), 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
                weigh_some();
            }
            float* to = scores_[item.parity] + t * kTile;
            _tile_stored(0, to, kStep * 4);
            _tile_stored(1, to + 16, kStep * 4);
            _tile_stored(2, to + 16 * kStep, kStep * 4);
            _tile_stored(3, to + 16 * kStep + 16, kStep * 4);
        }
    }

    void add_values(const Item& item) {
        const bf16* values[kStepTiles];
        bool is_cut = false;
        for (int t = item.first_tile; t < item.end_tile; ++t) {
            values[t] = tile_of(values_, item, t);
            if (sees_part(item, t)) {
                const int64_t p = item.begin + t * kTile, last = item.block_end - 1;
                bf16* own = cut_ + t * kTile * head_dim_;
                is_cut |= tiles_.keep_visible(own, values[t], rows_.begin[item.block] - p, rows_.end[last] - p, true);
                values[t] = own;
            }
        }
        int g = 0;
        const int groups = int(head_dim_ / 16);
        for (; g + 2 <= groups; g += 2) add_group<2>(item, values, g);
        if (g < groups) add_group<1>(item, values, g);
        if (is_cut) add_infinite(item);
        if (item.is_last) end_segment(item);
    }

    bool sees_part(const Item& item, int t) const {
        const int64_t p = item.begin + t * kTile;
        return rows_.begin[item.block_end - 1] > p || rows_.end[item.block] < p + kTile;
    }

    // n groups of 16 dimensions from g on. Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 values.
    template <int n>
    MINIVLLM_INLINE void add_group(const Item& item, const bf16* const* tiles, int g) {
        const int64_t stride = head_dim_ * 4;
        float *out = seg_out_ + item.block * head_dim_ + g * 16, *lower = out + 16 * head_dim_;
        const bf16* weights = reinterpret_cast<const bf16*>(scores_[item.parity]);
        if (item.is_first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, out, stride);
            _tile_loadd(2, lower, stride);
            if (n == 2) {
                _tile_loadd(1, out + 16, stride);
                _tile_loadd(3, lower + 16, stride);
            }
        }
        for (int t = item.first_tile; t < item.end_tile; ++t) {
            const bf16* values = tiles[t] + g * 512;
            _tile_stream_loadd(6, values, 64);
            _tile_loadd(4, weights + t * 32, kStep * 4);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, weights + 16 * kStep * 2 + t * 32, kStep * 4);
            _tile_dpbf16ps(2, 5, 6);
            if (n == 2) {
                _tile_stream_loadd(7, values + 512, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            weigh_some();
        }
        _tile_stored(0, out, stride);
        _tile_stored(2, lower, stride);
        if (n == 2) {
            _tile_stored(1, out + 16, stride);
            _tile_stored(3, lower + 16, stride);
        }
    }

    void add_infinite(const Item& item) const {
        const bf16* weights = reinterpret_cast<const bf16*>(scores_[item.parity]);
        for (int t = item.first_tile; t < item.end_tile; ++t)
            for (int64_t r = item.block; r < item.block_end && sees_part(item, t); ++r) {
                const int64_t p = item.begin + t * kTile, i = r - item.block;
                tiles_.add_infinite(seg_out_ + r * head_dim_, weights + i * 2 * kStep + t * 32, key_tile(p),
                                    rows_.begin[r] - p, rows_.end[r] - p);
            }
    }

    // ---- softmax ----

    // All of it that needs the maxima.
    void begin_softmax(const Item& item) {
        scores_now_ = scores_[item.parity];
        item_ = &item;
        factor_ = a_.scale * a_.k_scale * kLog2e;
        if (!is_plain(a_)) finish_scores(item);
        seen_ = ~0u;
        if (!item.is_whole) mask_scores(item);
        sums_ = seg_sum_[item.segment / kSegment % 2] + item.block * kLanes;
        float* maxima = seg_max_[item.segment / kSegment % 2] + item.block;
        if (item.is_first) {
            std::memset(sums_, 0, size_t(kBlock * kLanes * 4));
            for (int64_t i = 0; i < kBlock; ++i) maxima[i] = kMasked;
        }
        pending_ = 0;
        for (int half = 0; half < 2 && item.block + 16 * half < item.block_end; ++half) {
            const Vec step_max = max_of_half(item, half) * set1(factor_), max = load(maxima + 16 * half);
            const uint32_t seen = seen_ >> (16 * half) & 0xffff;
            const uint32_t rises = lanes_less(max + set1(kRise), step_max) & seen;
            const Vec new_max{_mm512_mask_mov_ps(max.v, __mmask16(rises), step_max.v)};
            store(bias_ + 16 * half, {_mm512_maskz_sub_ps(__mmask16(seen), _mm512_setzero_ps(), new_max.v)});
            store(maxima + 16 * half, new_max);
            if (rises == 0 || item.is_first) continue;
            store(kept_ + 16 * half, exp2(max - new_max));
            pending_ |= rises << (16 * half);
        }
        for (uint32_t rest = pending_; rest != 0; rest &= rest - 1) {
            const int i = __builtin_ctz(rest);
            store(sums_ + i * kLanes, load(sums_ + i * kLanes) * set1(kept_[i]));
        }
    }

    Vec max_of_half(const Item& item, int half) const {
        Vec largest[16];
        const float* row = scores_now_ + half * 16 * kStep;
        for (int i = 0; i < 16; ++i, row += kStep) {
            Vec m = load(row + item.first_tile * kTile);
            for (int c = 2 * item.first_tile + 1; c < 2 * item.end_tile; ++c) m = max(load(row + c * kLanes), m);
            largest[i] = m;
        }
        return max_of_each(largest);
    }

    // What a new maximum makes of the output so far.
    void raise(const Item& item) const {
        for (uint32_t rest = pending_; rest != 0; rest &= rest - 1) {
            const int i = __builtin_ctz(rest);
            float* out = seg_out_ + (item.block + i) * head_dim_;
            for (int64_t d = 0; d < head_dim_; d += kLanes) store(out + d, load(out + d) * set1(kept_[i]));
        }
    }

    void finish_scores(const Item& item) {
        factor_ = 1;
        if (a_.layout.type == KvType::int8) {
            const char* tiles[kStepTiles];
            for (int t = item.first_tile; t < item.end_tile; ++t) tiles[t] = key_tile(item.begin + t * kTile);
            load_scales(a_, tiles, item.first_tile, item.end_tile, k_scales_, v_scales_);
        }
        for (int64_t r = item.block; r < item.block_end; ++r) {
            float* row = scores_now_ + (r - item.block) * kStep;
            for (int c = 2 * item.first_tile; c < 2 * item.end_tile; ++c)
                store(row + c * kLanes, finished_score(a_, load(row + c * kLanes), c, rows_.head[r],
                                                       item.begin - rows_.position[r], k_scales_));
        }
    }

    int seen_from(const Item& item, int64_t r) const { return int(greater(rows_.begin[r] - item.begin, 0)); }
    int seen_to(const Item& item, int64_t r) const { return int(lesser(rows_.end[r] - item.begin, kStep)); }

    void mask_scores(const Item& item) {
        seen_ = 0;
        for (int64_t r = item.block; r < item.block_end; ++r) {
            const int from = seen_from(item, r), to = seen_to(item, r);
            float* row = scores_now_ + (r - item.block) * kStep;
            seen_ |= uint32_t(from < to) << (r - item.block);
            for (int c = 2 * item.first_tile; c < 2 * item.end_tile; ++c)
                if (from > c * kLanes || to < (c + 1) * kLanes)
                    store(row + c * kLanes, where_seen(load(row + c * kLanes), c, from, to, set1(kMasked)));
        }
    }

    // A row's scores to weights, rounded, in their place.
    MINIVLLM_INLINE void weigh(int i) {
        if (item_->end_tile - item_->first_tile == kStepTiles && a_.layout.type != KvType::int8)
            weigh_tiles<true>(i, 0, kStepTiles);
        else
            weigh_part(i);
    }
    __attribute__((noinline)) void weigh_part(int i) { weigh_tiles<false>(i, item_->first_tile, item_->end_tile); }

    template <bool is_simple>
    MINIVLLM_INLINE void weigh_tiles(int i, int first, int end) {
        float* row = scores_now_ + i * kStep;
        const Vec bias = set1(bias_[i]), factor = set1(factor_);
        Vec total[2] = {zero(), zero()};
        for (int t = first; t < end; ++t) {
            Vec left = amx_weight(fma(load(row + t * kTile), factor, bias));
            Vec right = amx_weight(fma(load(row + t * kTile + kLanes), factor, bias));
            total[0] = total[0] + left;
            total[1] = total[1] + right;
            if (!is_simple && a_.layout.type == KvType::int8) {
                const int64_t r = item_->block + i;
                const int from = seen_from(*item_, r), to = seen_to(*item_, r);
                left = scaled_weight(left, 2 * t, from, to, v_scales_);
                right = scaled_weight(right, 2 * t + 1, from, to, v_scales_);
            }
            round_weights(reinterpret_cast<bf16*>(row), 32, t, left, right);
        }
        float* sum = sums_ + i * kLanes;
        store(sum, load(sum) + (total[0] + total[1]));
    }

    // ---- ends ----

    void end_segment(const Item& item) {
        const int64_t segment_end = item.segment + kSegment;
        const bool leaves = path_.ending == Ending::shared && path_.end <= segment_end;
        const bool stays_open = leaves && path_.end < segment_end;
        const float *sums = seg_sum_[item.segment / kSegment % 2], *maxima = seg_max_[item.segment / kSegment % 2];
        for (int64_t r = item.block; r < item.block_end; ++r) {
            float *out = out_ + r * head_dim_, *seg_out = seg_out_ + r * head_dim_;
            if (leaves) leave_segment(r, seg_out, sums + r * kLanes, maxima[r]);
            if (!stays_open && rows_.begin[r] < segment_end && rows_.end[r] > item.segment) {
                const float sum = reduce_add(load(sums + r * kLanes));
                const bool is_only = rows_.begin[r] >= item.segment;
                const bool ends = path_.ending == Ending::output && rows_.end[r] <= segment_end;
                if (is_only && ends) {
                    store_output<bf16>(a_, rows_.token[r], rows_.head[r], seg_out, maxima[r], sum);
                    continue;
                }
                if (is_only) {
                    std::memcpy(out, seg_out, size_t(head_dim_ * 4));
                    max_[r] = maxima[r], sum_[r] = sum;
                } else {
                    merge_segment(out, max_[r], sum_[r], seg_out, maxima[r], sum, head_dim_);
                }
                if (ends) store_output<bf16>(a_, rows_.token[r], rows_.head[r], out, max_[r], sum_[r]);
            }
            if (leaves) leave_merged(r);
        }
    }

    // What a row needs to go on with its own keys.
    void leave_segment(int64_t r, const float* seg_out, const float* seg_sum, float seg_max) const {
        const CarriedRow to(rows_.carried[r], head_dim_);
        std::memcpy(to.seg_out, seg_out, size_t(head_dim_ * 4));
        std::memcpy(to.seg_sum, seg_sum, size_t(kLanes * 4));
        *to.seg_max = seg_max;
    }
    void leave_merged(int64_t r) const {
        const CarriedRow to(rows_.carried[r], head_dim_);
        std::memcpy(to.out, out_ + r * head_dim_, size_t(head_dim_ * 4));
        *to.max = max_[r], *to.sum = sum_[r];
    }

    const Attention& a_;
    const Rows& rows_;
    const int64_t head_dim_;
    int num_k_ = 0;
    Path path_{};
    const Path* next_path_ = nullptr;
    Ahead<_MM_HINT_T1> ahead_, early_;
    AmxTiles tiles_;
    Side keys_, values_;
    const char** key_tiles_ = nullptr;  // of the path, a tile of positions each
    float *seg_out_ = nullptr, *seg_sum_[2] = {}, *seg_max_[2] = {};  // of a segment; a block may be in two, one apart
    float* scores_[2] = {};  // [kBlock, kStep], then weights: a row's where its scores were
    float *bias_ = nullptr, *kept_ = nullptr, *k_scales_ = nullptr, *v_scales_ = nullptr;
    bf16 *q_ = nullptr, *cut_ = nullptr;
    float *out_ = nullptr, *max_ = nullptr, *sum_ = nullptr;  // of the segments merged so far, a row each

    // The softmax at hand.
    const Item* item_ = nullptr;
    float *scores_now_ = nullptr, *sums_ = nullptr;
    float factor_ = 1;
    uint32_t seen_ = 0, pending_ = 0;  // rows that see something; rows whose output a new maximum changes
    int row_ = 0, end_row_ = 0, rows_a_turn_ = 0;
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
