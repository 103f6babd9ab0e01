#include "read_memory.h"

#include <stdexcept>

#include "../bindings.h"

namespace minivllm {

MINIVLLM_BIND(read_memory, m) {
    m.def("read_memory", [](uintptr_t data, int64_t bytes) {
        if (data % 64 != 0 || bytes % 512 != 0)
            throw std::invalid_argument("read_memory reads whole turns of 512 bytes from a cache line on");
        return read_memory_kernels().read(ptr<const void>(data), bytes);
    }, release_gil);
}

}  // namespace minivllm
