// A walk of many rows on AMX: prompts, and what the members of a group share. Every row gets the bits that
// Walk<AmxMath> would give it. Included by attention.cpp only.
//
// 32 rows, a block, take the steps of a stretch before the next block does: what they need of their own stays in the
// nearest cache, and the stretch's keys and values in the second, whither the next stretch's are fetched meanwhile.
// Values are added once a stretch, so that outputs are seldom read and written again. While AMX computes the scores of
// one step, half of the rows of the step before it are weighed between the products, and the others after them:
// beside AMX the processor adds and multiplies floats by one of its two units only.
#pragma once

#include "attention_amx.h"
#include "attention_widened.h"

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
    // widened: this thread's, where the cache holds codes.
    WideWalk(const Attention& a, const Rows& rows, WidenedTiles& widened)
        : a_(a), rows_(rows), head_dim_(a.layout.head_dim), widened_(widened) {
        num_k_ = int((head_dim_ + 31) / 32);
        const int64_t padded = (rows.count + kBlock - 1) / kBlock * kBlock;
        const int64_t row_bytes = head_dim_ * 8 + num_k_ * 64 + (kLanes + 1) * 4 + 8;
        const size_t bytes = size_t(padded * row_bytes + kBlock * (2 * kScoreStride + kLanes + 2) * 4 +
                                    kStretch * (head_dim_ + kBlock) * 2) + AmxTiles::bytes(a) + 4096;
        char* p = static_cast<char*>(thread_scratch(1, bytes));
        auto take = [&p](int64_t n) { char* taken = p; p += (n + 63) / 64 * 64; return taken; };
        for (float*& scores : scores_) scores = reinterpret_cast<float*>(take(kBlock * kScoreStride * 4));
        weights_ = reinterpret_cast<bf16*>(take(kStretch * kBlock * 2));
        totals_ = reinterpret_cast<float*>(take(kBlock * kLanes * 4));
        seg_sum_ = reinterpret_cast<float*>(take(padded * kLanes * 4));
        seg_max_ = reinterpret_cast<float*>(take(padded * 4));
        seg_out_ = reinterpret_cast<float*>(take(padded * head_dim_ * 4));
        bias_ = reinterpret_cast<float*>(take(kBlock * 4));
        kept_ = reinterpret_cast<float*>(take(kBlock * 4));
        q_ = reinterpret_cast<bf16*>(take(padded * num_k_ * 64));
        cut_ = reinterpret_cast<bf16*>(take(kStretch * head_dim_ * 2));
        out_ = reinterpret_cast<float*>(take(padded * head_dim_ * 4));
        max_ = reinterpret_cast<float*>(take(padded * 4));
        sum_ = reinterpret_cast<float*>(take(padded * 4));
        tiles_ = AmxTiles(a, take(int64_t(AmxTiles::bytes(a))));
        for (float& one : ones_) one = 1;
    }

    // next: where this thread will probably go on, or null.
    void run(const Path& path, const Path* next) {
        path_ = path;
        next_path_ = next;
        stretch_ = path.ending == Ending::shared ? kShortStretch : kStretch;
        find_tiles();
        shape_tiles(16);
        Item now = first_item();
        if (now.exists) add_scores(now);
        while (now.exists) {
            const Item after = item_after(now);
            if (!now.is_next) begin_values(now);
            add_weights(now, after);
            if (!after.exists || !after.is_next) {
                add_values(now, now.end_tile);
                if (now.is_last) end_segment(now);
            }
            now = after;
        }
        _tile_release();
    }

private:
    static constexpr int64_t kBlock = 32;
    // Positions. Blocks of the cache lie a power of two apart as a rule, so that a head's share the same sets of the
    // second cache: two long stretches take all of its ways. Few rows come from memory as fast as they are multiplied, and
    // what is fetched for them must not drive out what they are at.
    static constexpr int64_t kStretch = 512, kShortStretch = 128;
    static constexpr int64_t kScoreStride = kStep + kLanes;  // rows a power of two apart would share few of L1's sets
    static constexpr float kLargeWeight = 128, kLargeMaximum = 1 << 20;  // see has_risen, has_small_maxima
    static_assert(kLargeWeight < 1 << int(kRise));
    static_assert(kSegment % kStretch == 0 && kStretch % kShortStretch == 0 && kShortStretch % kStep == 0);

    // A step of a block.
    struct Item {
        bool exists;
        int parity;                    // whose scores_ it uses
        bool is_first, is_last;        // of its block in the segment
        bool is_next;                  // of its block in the stretch: not the first
        bool is_whole;                 // all rows see all of its tiles
        int64_t block, block_end;      // rows
        int64_t stretch, segment;      // positions: where they begin
        int64_t begin, end;            // the step's first, and what the block sees of the segment
        int first_tile, end_tile;      // of the step
    };

    // ---- which steps there are ----

    Item first_item() const {
        return start_block(Item{}, 0, path_.begin / stretch_ * stretch_);
    }

    Item item_after(const Item& item) const {
        Item next = item;
        next.parity ^= 1;
        next.begin += kStep;
        next.is_next = true;
        if (next.begin < next.end && next.begin < item.stretch + stretch_) return finish_item(next);
        return start_block(next, item.block + kBlock, item.stretch);
    }

    // The first step of the first block from `block` on that sees something of the stretch, or of one after it.
    Item start_block(Item item, int64_t block, int64_t stretch) const {
        for (; stretch < path_.end; stretch += stretch_, block = 0)
            for (; block < rows_.count; block += kBlock) {
                item.block = block;
                item.block_end = lesser(block + kBlock, rows_.count);
                item.stretch = stretch;
                item.segment = stretch / kSegment * kSegment;
                const int64_t from = greater(rows_.begin[block], stretch);
                item.end = lesser(rows_.end[item.block_end - 1], item.segment + kSegment);
                if (from >= lesser(item.end, stretch + stretch_)) continue;
                item.exists = true;
                item.is_next = false;
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

    const bf16* keys_at(int64_t p) const {
        if (tiles_.are_bytes()) return widened_.keys(tiles_, p / kTile, key_tile(p));
        return reinterpret_cast<const bf16*>(key_tile(p));
    }
    const bf16* values_at(int64_t p) const {
        if (tiles_.are_bytes()) return widened_.values(tiles_, p / kTile, key_tile(p));
        return reinterpret_cast<const bf16*>(key_tile(p) + a_.layout.half_bytes());
    }

    // Into the second cache, what blocks will need of the next stretch, each its share; and of what a walk begins with,
    // the first block one step ahead.
    void look_ahead(const Item& item, int64_t turns) {
        const int64_t block = item.block / kBlock, num_blocks = (rows_.count + kBlock - 1) / kBlock;
        const int64_t stretch = item.stretch + stretch_, offset = item.begin - item.stretch;
        ahead_.stop();
        early_.stop();
        if (stretch < path_.end) fetch_step(ahead_, path_, stretch + offset, block, num_blocks, turns);
        else if (next_path_ != nullptr)
            fetch_step(ahead_, *next_path_, next_path_->begin / stretch_ * stretch_ + offset, block, num_blocks, turns);
        if (block == 0 && item.stretch == path_.begin / stretch_ * stretch_ && offset + kStep < stretch_)
            fetch_step(early_, path_, item.begin + kStep, 0, 1, turns);
    }

    void fetch_step(Ahead<_MM_HINT_T1>& ahead, const Path& path, int64_t p, int64_t part, int64_t num_parts,
                    int64_t turns) const {
        const KvLayout& layout = a_.layout;
        const bool is_widened = tiles_.are_bytes() && &path == &path_ && p < path.end &&
                                widened_.found_keys(p / kTile) != nullptr && widened_.found_values(p / kTile) != nullptr;
        const int64_t tile_bytes = is_widened ? kTile * head_dim_ * 2 : layout.tile_bytes();
        const int64_t from = tile_bytes * part / num_parts / 64 * 64;
        const int64_t bytes = tile_bytes * (part + 1) / num_parts - from;
        const char* places[2 * kStepTiles];
        int n = 0;
        for (const int64_t end = lesser(p + kStep, path.end); p < end; p += kTile) {
            const int64_t block = path.blocks[p / layout.block_size];
            const char* key = a_.kv_cache + layout.key_tile(block, path.kv_head, p % layout.block_size);
            const char* value = key + layout.half_bytes();
            if (is_widened) key = widened_.found_keys(p / kTile), value = widened_.found_values(p / kTile);
            if (key == nullptr || value == nullptr) break;
            places[n++] = key + from;
            places[n++] = value + from;
        }
        ahead.start(places, n, bytes, turns);
    }

    // ---- products, and rows of the softmax between them ----

    // What is done between the products of `after`'s scores.
    void pace(const Item& now, const Item& after) {
        int sites = 0;
        if (after.exists) sites += (after.end_tile - after.first_tile) * num_k_;
        row_ = 0;
        end_row_ = int(now.block_end - now.block);
        look_ahead(now, sites);
    }

    // After each four products.
    MINIVLLM_INLINE void take_turn() {
        ahead_.turn();
        early_.turn();
        for (int i = 0; i < 2 && next_query_ < end_query_; ++i) fetch_query(next_query_++);
        if (row_ < end_row_) weigh(row_++);
    }

    // A block's, when it starts; those of the next block are fetched meanwhile.
    void read_queries(const Item& item) {
        for (int64_t r = item.block; r < item.block_end; ++r)
            read_query(q_ + r / 16 * num_k_ * 512 + r % 16 * 32, 512, a_, rows_.token[r], rows_.head[r]);
        next_query_ = item.block_end;
        end_query_ = lesser(item.block_end + kBlock, rows_.count);
    }

    // What a row is read from and written to is fetched while products run, else its block would wait for memory.
    void fetch_query(int64_t r) const {
        const bf16* q = static_cast<const bf16*>(a_.q) + rows_.token[r] * a_.q_token_stride +
                        rows_.head[r] * a_.q_head_stride;
        for (int64_t d = 0; d < head_dim_; d += 32) _mm_prefetch(q + d, _MM_HINT_T1);
    }
    void fetch_output(int64_t r) const {
        const bf16* out = static_cast<const bf16*>(a_.out) + (rows_.token[r] * a_.num_heads + rows_.head[r]) * head_dim_;
        for (int64_t d = 0; d < head_dim_; d += 32) _mm_prefetch(out + d, _MM_HINT_T0);
    }

    // Keys and values pass the nearest cache by: what rows have of their own stays there.
    // Tiles 0 to 3 hold sums, 4 and 5 queries, 6 and 7 keys.
    void add_scores(const Item& item) {
        if (item.is_first && rows_.begin[item.block] >= item.segment) read_queries(item);
        const bf16* q = q_ + item.block * num_k_ * 32;
        for (int t = item.first_tile; t < item.end_tile; ++t) {
            const bf16 *key = keys_at(item.begin + t * kTile), *right = key + 16 * head_dim_;
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
                take_turn();
            }
            float* to = scores_[item.parity] + t * kTile;
            _tile_stored(0, to, kScoreStride * 4);
            _tile_stored(1, to + 16, kScoreStride * 4);
            _tile_stored(2, to + 16 * kScoreStride, kScoreStride * 4);
            _tile_stored(3, to + 16 * kScoreStride + 16, kScoreStride * 4);
        }
    }

    // ---- values: of a block's steps in a stretch, as many as there are before its output changes otherwise ----

    void begin_values(const Item& item) {
        is_fresh_ = item.is_first;
        first_value_ = tile_of_stretch(item, item.first_tile);
    }
    static int tile_of_stretch(const Item& item, int t) { return int((item.begin - item.stretch) / kTile) + t; }

    // Those before the item's tile `end`, that are not yet added.
    void add_values(const Item& item, int end) {
        const int first = first_value_, last = tile_of_stretch(item, end);
        if (first >= last) return;
        const bf16* values[kStretch / kTile];
        bool is_cut = false;
        for (int t = first; t < last; ++t) {
            const int64_t p = item.stretch + t * kTile;
            values[t] = values_at(p);
            if (sees_part(item, p) && !tiles_.is_finite(values[t])) {
                bf16* own = cut_ + t * kTile * head_dim_;
                is_cut |= tiles_.keep_visible(own, values[t], rows_.begin[item.block] - p,
                                              rows_.end[item.block_end - 1] - p, true);
                values[t] = own;
            }
        }
        int g = 0;
        const int groups = int(head_dim_ / 16), sites = (groups + 1) / 2 * (last - first);
        next_output_ = end_output_ = item.block_end;
        if (path_.ending == Ending::output && item.is_last && end == item.end_tile &&
            rows_.end[item.block_end - 1] <= item.segment + kSegment)
            next_output_ = item.block;
        outputs_a_turn_ = int((end_output_ - next_output_ + sites - 1) / sites);
        for (; g + 2 <= groups; g += 2) add_group<2>(item, values, first, last, g);
        if (g < groups) add_group<1>(item, values, first, last, g);
        if (is_cut) add_infinite(item, first, last);
        is_fresh_ = false;
        first_value_ = last;
    }

    bool sees_part(const Item& item, int64_t p) const {
        return rows_.begin[item.block_end - 1] > p || rows_.end[item.block] < p + kTile;
    }

    // n groups of 16 dimensions from g on. Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 values.
    template <int n>
    MINIVLLM_INLINE void add_group(const Item& item, const bf16* const* tiles, int first, int end, int g) {
        const int64_t stride = head_dim_ * 4;
        float *out = seg_out_ + item.block * head_dim_ + g * 16, *lower = out + 16 * head_dim_;
        if (is_fresh_) {
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
        for (int t = first; t < end; ++t) {
            const bf16 *values = tiles[t] + g * 512, *weights = weights_ + t * kBlock * kTile;
            _tile_stream_loadd(6, values, 64);
            _tile_loadd(4, weights, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, weights + 512, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (n == 2) {
                _tile_stream_loadd(7, values + 512, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            for (int i = 0; i < outputs_a_turn_ && next_output_ < end_output_; ++i) fetch_output(next_output_++);
        }
        _tile_stored(0, out, stride);
        _tile_stored(2, lower, stride);
        if (n == 2) {
            _tile_stored(1, out + 16, stride);
            _tile_stored(3, lower + 16, stride);
        }
    }

    void add_infinite(const Item& item, int first, int end) const {
        for (int t = first; t < end; ++t) {
            const int64_t p = item.stretch + t * kTile;
            for (int64_t r = item.block; r < item.block_end && sees_part(item, p); ++r)
                tiles_.add_infinite(seg_out_ + r * head_dim_, weights_ + t * kBlock * kTile + (r - item.block) * kTile,
                                    key_tile(p), rows_.begin[r] - p, rows_.end[r] - p);
        }
    }

    // ---- softmax ----

    // A step's scores to weights, while the scores of the one after it are computed.
    void add_weights(const Item& now, const Item& after) {
        scores_now_ = scores_[now.parity];
        weights_now_ = weights_ + tile_of_stretch(now, 0) * kBlock * kTile;
        item_ = &now;
        factor_ = score_factor(a_);
        factors_ = has_scales(a_) ? widened_.factors(now.begin / kTile) : nullptr;
        v_scales_ = has_scales(a_) ? widened_.v_scales(now.begin / kTile) : nullptr;
        is_simple_ = factors_ == nullptr && now.end_tile - now.first_tile == kStepTiles;
        if (!is_plain(a_)) finish_scores(now);
        const bool may_rise = now.is_first || !now.is_whole || !has_small_maxima(now);
        if (may_rise) find_maxima(now);
        pace(now, after);
        if (after.exists) add_scores(after);
        while (row_ < end_row_) weigh(row_++);
        if (!may_rise && has_risen()) {
            find_maxima(now);
            for (int i = 0; i < end_row_; ++i) weigh(i);
        }
        float* sums = seg_sum_ + now.block * kLanes;
        for (int i = 0; i < end_row_; ++i)
            store(sums + i * kLanes, load(sums + i * kLanes) + load(totals_ + i * kLanes));
    }

    // As rows hardly ever rise, whether one does is seen from its weights: no sum of them is large, and so no weight.
    bool has_risen() const {
        uint32_t large = 0;
        for (int i = 0; i < end_row_; ++i) large |= lanes_not_less(load(totals_ + i * kLanes), set1(kLargeWeight));
        return large != 0;
    }

    // Whether that is so for the maxima that the rows have, which stay: what is rounded of such numbers is small beside 1.
    bool has_small_maxima(const Item& item) {
        const float* maxima = seg_max_ + item.block;
        uint32_t large = 0;
        for (int half = 0; half < 2 && item.block + 16 * half < item.block_end; ++half) {
            const Vec bias = zero() - load(maxima + 16 * half);
            large |= lanes_not_less(max(bias, zero() - bias), set1(kLargeMaximum));
            store(bias_ + 16 * half, bias);
        }
        return large == 0;
    }

    // Where a row begins, or does not see all of the step, or has risen.
    void find_maxima(const Item& item) {
        seen_ = ~0u;
        if (!item.is_whole) mask_scores(item);
        float *sums = seg_sum_ + item.block * kLanes, *maxima = seg_max_ + item.block;
        if (item.is_first) {
            std::memset(sums, 0, size_t(kBlock * kLanes * 4));
            for (int64_t i = 0; i < kBlock; ++i) maxima[i] = kMasked;
        }
        const Vec masked = set1(factors_ == nullptr && factor_ < 1 ? kMasked * factor_ : kMasked);
        uint32_t pending = 0;  // rows whose output a new maximum changes
        for (int half = 0; half < 2 && item.block + 16 * half < item.block_end; ++half) {
            const Vec step_max = max_of_half(item, half), max = load(maxima + 16 * half);
            const uint32_t seen = seen_ >> (16 * half) & 0xffff;
            const uint32_t rises = lanes_less(max + set1(kRise), step_max) & seen;
            const Vec new_max{_mm512_mask_mov_ps(max.v, __mmask16(rises), step_max.v)};
            // Beside scores that are all below kMasked, as products that overflow are, what is masked would count most.
            const __mmask16 sunk = _mm512_mask_cmp_ps_mask(__mmask16(seen), new_max.v, masked.v, _CMP_LE_OQ);
            const __m512 bias = _mm512_maskz_sub_ps(__mmask16(seen), _mm512_setzero_ps(), new_max.v);
            store(bias_ + 16 * half, {_mm512_mask_mov_ps(bias, sunk, set1(-__builtin_inff()).v)});
            store(maxima + 16 * half, new_max);
            if (rises == 0 || item.is_first) continue;
            store(kept_ + 16 * half, exp2(max - new_max));
            pending |= rises << (16 * half);
        }
        if (pending == 0) return;
        add_values(item, item.first_tile);
        for (; pending != 0; pending &= pending - 1) {
            const int i = __builtin_ctz(pending);
            const Vec kept = set1(kept_[i]);
            float* out = seg_out_ + (item.block + i) * head_dim_;
            store(sums + i * kLanes, load(sums + i * kLanes) * kept);
            for (int64_t d = 0; d < head_dim_; d += kLanes) store(out + d, load(out + d) * kept);
        }
    }

    Vec max_of_half(const Item& item, int half) const {
        Vec largest[16];
        const float* row = scores_now_ + half * 16 * kScoreStride;
        for (int i = 0; i < 16; ++i, row += kScoreStride) {
            Vec m = set1(kMasked);
            if (factors_ == nullptr)
                for (int c = 2 * item.first_tile; c < 2 * item.end_tile; ++c) m = max(load(row + c * kLanes), m);
            else
                m = max_of_products(item, lesser(item.block + half * 16 + i, item.block_end - 1), row);
            largest[i] = m;
        }
        return max_of_each(largest) * set1(factors_ == nullptr ? factor_ : 1);
    }

    Vec max_of_products(const Item& item, int64_t r, const float* row) const {
        const int from = seen_from(item, r), to = seen_to(item, r);
        Vec m = set1(kMasked);
        for (int c = 2 * item.first_tile; c < 2 * item.end_tile; ++c) {
            const Vec score = load(row + c * kLanes) * load(factors_ + c * kLanes);
            const bool is_cut = from > c * kLanes || to < (c + 1) * kLanes;
            m = max(is_cut ? where_seen(score, c, from, to, set1(kMasked)) : score, m);
        }
        return m;
    }

    void finish_scores(const Item& item) {
        for (int64_t r = item.block; r < item.block_end; ++r) {
            float* row = scores_now_ + (r - item.block) * kScoreStride;
            for (int c = 2 * item.first_tile; c < 2 * item.end_tile; ++c) {
                const Vec factor = factors_ == nullptr ? set1(factor_) : load(factors_ + c * kLanes);
                store(row + c * kLanes, finished_score(a_, load(row + c * kLanes), factor, c, rows_.head[r],
                                                       item.begin - rows_.position[r]));
            }
        }
        factor_ = 1;
        if (factors_ != nullptr) factors_ = ones_;
    }

    int seen_from(const Item& item, int64_t r) const { return int(greater(rows_.begin[r] - item.begin, 0)); }
    int seen_to(const Item& item, int64_t r) const { return int(lesser(rows_.end[r] - item.begin, kStep)); }

    void mask_scores(const Item& item) {
        seen_ = 0;
        for (int64_t r = item.block; r < item.block_end; ++r) {
            const int from = seen_from(item, r), to = seen_to(item, r);
            float* row = scores_now_ + (r - item.block) * kScoreStride;
            seen_ |= uint32_t(from < to) << (r - item.block);
            if (factors_ != nullptr) continue;  // what they say of a key that a row does not see may be anything
            for (int c = 2 * item.first_tile; c < 2 * item.end_tile; ++c)
                if (from > c * kLanes || to < (c + 1) * kLanes)
                    store(row + c * kLanes, where_seen(load(row + c * kLanes), c, from, to, set1(kMasked)));
        }
    }

    // A row's scores to weights, rounded.
    MINIVLLM_INLINE void weigh(int i) {
        if (!(__builtin_fabsf(bias_[i]) < kRoundedFrom)) weigh_rounded(i);
        else if (is_simple_) weigh_tiles<false, false>(i, 0, kStepTiles);
        else weigh_otherwise(i);
    }
    __attribute__((noinline)) void weigh_rounded(int i) {
        const float factor = factor_, *const factors = factors_;
        float* row = scores_now_ + i * kScoreStride;
        for (int c = 2 * item_->first_tile; c < 2 * item_->end_tile; ++c) {
            const Vec each = factors == nullptr ? set1(factor) : load(factors + c * kLanes);
            store(row + c * kLanes, load(row + c * kLanes) * each);
        }
        factor_ = 1;
        if (factors != nullptr) factors_ = ones_;
        weigh_otherwise(i);
        factor_ = factor, factors_ = factors;
    }
    __attribute__((noinline)) void weigh_otherwise(int i) {
        const int first = item_->first_tile, end = item_->end_tile;
        if (factors_ == nullptr) weigh_tiles<false, false>(i, first, end);
        else if (item_->is_whole && end - first == kStepTiles) weigh_tiles<true, false>(i, 0, kStepTiles);
        else weigh_tiles<true, true>(i, first, end);
    }

    // is_cut: the row may not see all of the tiles, which has_scales alone has to know.
    template <bool has_scales, bool is_cut>
    MINIVLLM_INLINE void weigh_tiles(int i, int first, int end) {
        const float* row = scores_now_ + i * kScoreStride;
        const Vec bias = set1(bias_[i]);
        const int from = is_cut ? seen_from(*item_, item_->block + i) : 0;
        const int to = is_cut ? seen_to(*item_, item_->block + i) : 0;
        Vec total[2] = {zero(), zero()};
        for (int t = first; t < end; ++t) {
            const bool is_tile_cut = is_cut && (from > t * kTile || to < t * kTile + kTile);
            Vec x[2];
            for (int half = 0; half < 2; ++half) {
                const int c = 2 * t + half;
                const Vec factor = has_scales ? load(factors_ + c * kLanes) : set1(factor_);
                x[half] = fma(load(row + c * kLanes), factor, bias);
                if (is_tile_cut) x[half] = where_seen(x[half], c, from, to, set1(kMasked));
                x[half] = amx_weight(x[half]);
                total[half] = total[half] + x[half];
                if (is_tile_cut) x[half] = scaled_weight(x[half], c, from, to, v_scales_);
                else if (has_scales) x[half] = x[half] * load(v_scales_ + c * kLanes);
            }
            round_weights(weights_now_ + i * kTile, kBlock * kTile, t, x[0], x[1]);
        }
        store(totals_ + i * kLanes, total[0] + total[1]);
    }

    // ---- ends ----

    void end_segment(const Item& item) {
        const int64_t segment_end = item.segment + kSegment;
        const bool leaves = path_.ending == Ending::shared && path_.end <= segment_end;
        const bool stays_open = leaves && path_.end < segment_end;
        const float *sums = seg_sum_, *maxima = seg_max_;
        for (int64_t r = item.block; r < item.block_end; ++r) {
            float *out = out_ + r * head_dim_, *seg_out = seg_out_ + r * head_dim_;
            float max = maxima[r], sum = 0;
            if (stays_open) leave_segment(r, seg_out, sums + r * kLanes, max);
            if (stays_open || rows_.begin[r] >= segment_end || rows_.end[r] <= item.segment) {
                if (leaves && CarriedRow::has_merged(path_.end)) leave_merged(r, out, max_[r], sum_[r]);
                continue;
            }
            sum = reduce_add(load(sums + r * kLanes));
            const bool ends = path_.ending == Ending::output && rows_.end[r] <= segment_end;
            if (rows_.begin[r] < item.segment) {
                merge_segment(out, max_[r], sum_[r], seg_out, max, sum, head_dim_);
                seg_out = out, max = max_[r], sum = sum_[r];
            }
            if (ends) {
                store_output<bf16>(a_, rows_.token[r], rows_.head[r], seg_out, max, sum);
            } else if (leaves) {
                leave_merged(r, seg_out, max, sum);
            } else if (seg_out != out) {
                std::memcpy(out, seg_out, size_t(head_dim_ * 4));
                max_[r] = max, sum_[r] = sum;
            }
        }
    }

    // What a row needs to go on with its own keys: see CarriedRow.
    void leave_segment(int64_t r, const float* seg_out, const float* seg_sum, float seg_max) const {
        const CarriedRow to(rows_.carried[r], head_dim_);
        std::memcpy(to.seg_out, seg_out, size_t(head_dim_ * 4));
        std::memcpy(to.seg_sum, seg_sum, size_t(kLanes * 4));
        *to.seg_max = seg_max;
    }
    void leave_merged(int64_t r, const float* out, float max, float sum) const {
        const CarriedRow to(rows_.carried[r], head_dim_);
        std::memcpy(to.out, out, size_t(head_dim_ * 4));
        *to.max = max, *to.sum = sum;
    }

    const Attention& a_;
    const Rows& rows_;
    const int64_t head_dim_;
    int num_k_ = 0;
    int64_t stretch_ = kStretch;
    Path path_{};
    const Path* next_path_ = nullptr;
    Ahead<_MM_HINT_T1> ahead_, early_;
    AmxTiles tiles_;
    WidenedTiles& widened_;
    const char** key_tiles_ = nullptr;  // of the path, a tile of positions each
    float *seg_out_ = nullptr, *seg_sum_ = nullptr, *seg_max_ = nullptr;  // of a segment
    float* scores_[2] = {};     // of a step, [kBlock, kStep], rows kScoreStride apart
    bf16* weights_ = nullptr;   // of a block in a stretch, [kStretch / kTile][kBlock][kTile]
    float* totals_ = nullptr;   // of a step's weights, [kBlock, kLanes]
    float *bias_ = nullptr, *kept_ = nullptr;
    alignas(64) float ones_[kStep];
    bf16 *q_ = nullptr, *cut_ = nullptr;
    float *out_ = nullptr, *max_ = nullptr, *sum_ = nullptr;  // of the segments merged so far, a row each

    // The softmax at hand.
    const Item* item_ = nullptr;
    float* scores_now_ = nullptr;
    bf16* weights_now_ = nullptr;
    bool is_simple_ = false;  // whole tiles of keys without scales
    float factor_ = 1;
    const float *factors_ = nullptr, *v_scales_ = nullptr;  // of keys that have scales, [kStep]; else null
    uint32_t seen_ = 0;  // rows that see something
    int row_ = 0, end_row_ = 0;

    int64_t next_query_ = 0, end_query_ = 0, next_output_ = 0, end_output_ = 0;  // rows, to be fetched
    int outputs_a_turn_ = 0;

    // The values to add.
    bool is_fresh_ = false;  // to nothing yet
    int first_value_ = 0;    // a tile of the stretch
};

}  // namespace
}  // namespace minivllm::MINIVLLM_ISA
