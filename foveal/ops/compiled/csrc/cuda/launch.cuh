// Tensors at the door of a CUDA kernel, and its launch. Included by the files `op.cu`.
#pragma once

#include "cuda/stream.cuh"
#include "tensor.h"

#if defined(__CUDACC__)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace foveal::cuda {

// Makes a tensor's device the current one, and launches on that device's current stream.
class Device : public Stream {
 public:
#if defined(__CUDACC__)
  explicit Device(const Tensor& x) : Stream{current_stream(x)}, guard_(x.get_device_index()) {}

 private:
  static cudaStream_t current_stream(const Tensor& x) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
  }

  torch::stable::accelerator::DeviceGuard guard_;
#else
  explicit Device(const Tensor&) {}
#endif
};

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
