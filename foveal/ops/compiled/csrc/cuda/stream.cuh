// The launch of a kernel. Without PyTorch's headers, so that files of kernels alone compile in half the time.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"

namespace foveal::cuda {

#if defined(__CUDACC__)

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

struct Stream {
  cudaStream_t stream;

  // kernel(arguments...) with `shared` bytes of shared memory a block. A grid without blocks does nothing.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments&&... arguments) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (shared > 48 << 10) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    kernel<<<grid, block, shared, stream>>>(Parameters(arguments)...);
    check(cudaGetLastError());
  }
};

#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The second and the third side of a grid hold at most so many blocks; kernels step on by the grid's size.
constexpr int64_t max_blocks = 65535;
inline unsigned clamped(int64_t blocks) { return unsigned(std::min(blocks, max_blocks)); }

}  // namespace foveal::cuda
