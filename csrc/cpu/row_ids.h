// Rows of a matrix that a call names by number: whether they are there, asked before anything is read.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace minivllm {

// Throws std::out_of_range, Python's IndexError, for the first that is not.
inline void check_rows(const int64_t* rows, int64_t num_rows, int64_t n) {
    for (int64_t i = 0; i < num_rows; ++i)
        if (rows[i] < 0 || rows[i] >= n)
            throw std::out_of_range("row " + std::to_string(rows[i]) + " is outside the " + std::to_string(n) +
                                    " rows of the weight");
}

}  // namespace minivllm
