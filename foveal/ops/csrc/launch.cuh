// Tensors at the door of a CUDA kernel, and its launch. Included by the files `op.cu`.
#pragma once

#include <algorithm>

#include "device.cuh"
#include "tensor.h"

#if defined(__CUDACC__)
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#else
#include "emulated_launch.h"
#endif

namespace foveal::cuda {

#if defined(__CUDACC__)

// Makes a tensor's device the current one, and launches on that device's current stream.
class Device {
 public:
  explicit Device(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // kernel(arguments...) with `shared` bytes of shared memory a block. A grid without blocks does nothing.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments&&... arguments) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (shared > 48 << 10) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    }
    kernel<<<grid, block, shared, stream_>>>(Parameters(arguments)...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

#endif

// Call `function(Type<T>())` with the C++ type that the GPU kernels know a tensor's values by.
template <class F>
auto with_type(const Tensor& x, F&& function) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return function(Type<float>());
    case ScalarType::Half: return function(Type<float16>());
    case ScalarType::BFloat16: return function(Type<bfloat16>());
    default: STD_TORCH_CHECK(false, "foveal's CUDA kernels serve float32, float16 and bfloat16");
  }
}

template <int n>
struct Count {
  static constexpr int value = n;
};

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* mutable_data(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The second and the third side of a grid hold at most so many blocks; kernels step on by the grid's size.
constexpr int64_t max_blocks = 65535;
inline unsigned clamped(int64_t blocks) { return unsigned(std::min(blocks, max_blocks)); }

// Whether every row of channels of a map begins at a multiple of n values, so that kernels may load n at once.
template <int n>
bool aligned(const Tensor& x) {
  bool result = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % (n * x.element_size()) == 0;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) result = result && (x.stride(i) % n == 0 || x.size(i) <= 1);
  return result;
}

}  // namespace foveal::cuda

// The implementations for CUDA tensors: FOVEAL_CUDA_LIBRARY(m) { m.impl(name, TORCH_BOX(&function)); }
#define FOVEAL_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(foveal, CUDA, m)
