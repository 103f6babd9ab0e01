// Norms, rotation and cache write of some rows of heads: the bits of rotary_kv_write.cpp, head by head.
#include "linear.h"
#include "rotary_heads.h"

namespace minivllm::MINIVLLM_ISA {
namespace {

// Rows [first_row, first_row + num_rows) of head number `head` of all that a projection has. x: where they lie, `stride`
// elements apart; they may be changed there.
template <class T>
void finish_head(const LinearCall& call, T* x, int64_t stride, int64_t head, int64_t first_row, int64_t num_rows) {
    const HeadsEnd& end = *call.heads;
    const KvLayout& layout = end.write.layout;
    const auto turn = [&](T* to, int64_t to_stride, const void* norm) {
        const HeadRow<T> rows{x, stride, num_rows, static_cast<const T*>(norm), end.eps};
        rotate_row(to, to_stride, rows, layout.head_dim, end.rot_dim / 2,
                   [&](int64_t row) { return end.cos_sin + end.positions[first_row + row] * end.rot_dim; });
    };
    if (head < end.num_q_heads) {
        T* out = static_cast<T*>(call.out) + first_row * call.out_stride + head * layout.head_dim;
        return turn(out, call.out_stride, end.q_norm);
    }
    const bool is_key = head < end.num_q_heads + layout.num_kv_heads;
    if (end.kept != nullptr) {
        const int64_t row = 2 * layout.num_kv_heads * layout.head_dim;
        T* kept = static_cast<T*>(end.kept) + first_row * row + (head - end.num_q_heads) * layout.head_dim;
        if (is_key) return turn(kept, row, end.k_norm);
        for (int64_t r = 0; r < num_rows; ++r)
            std::memcpy(kept + r * row, x + r * stride, size_t(layout.head_dim) * sizeof(T));
        return;
    }
    if (is_key) turn(x, stride, end.k_norm);  // all before the first is written: what was just stored loads slowly
    KvWrite write = end.write;
    write.k_token_stride = write.v_token_stride = stride * int64_t(sizeof(T));
    write.k = is_key ? reinterpret_cast<const char*>(x - first_row * stride) : nullptr;
    write.v = is_key ? nullptr : reinterpret_cast<const char*>(x - first_row * stride);
    kv_write_kernels.head_rows(write, (head - end.num_q_heads) % layout.num_kv_heads, first_row, first_row + num_rows);
}

void finish_heads(const LinearCall& call, void* rows, int64_t stride, int64_t column, int64_t num_columns,
                  int64_t first_row, int64_t num_rows) {
    const int64_t head_dim = call.heads->write.layout.head_dim;
    with_dtype(call.out_dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        for (int64_t i = 0; i < num_columns; i += head_dim)
            finish_head(call, static_cast<T*>(rows) + i, stride, (column + i) / head_dim, first_row, num_rows);
    });
}

}  // namespace

const HeadsKernels heads_kernels = {&finish_heads};

}  // namespace minivllm::MINIVLLM_ISA
