// Every error of the runtime becomes an exception that names the call.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace minivllm::cuda {

inline void check(cudaError_t error, const std::string& what) {
    if (error != cudaSuccess)
        throw std::runtime_error(what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

}  // namespace minivllm::cuda
