// Tensors at the door of a kernel: PyTorch's stable ABI, for the files that are compiled once, of CPU and GPU.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "activation.h"
#include "common.h"
#include "map.h"

namespace foveal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: STD_TORCH_CHECK(false, "foveal's CPU kernels serve float32, float64 and bfloat16");
  }
}

inline Act act_named(const std::string& name) {
  if (name == "gelu") return Act::gelu;
  if (name == "gelu_tanh") return Act::gelu_tanh;
  if (name == "relu") return Act::relu;
  if (name == "silu") return Act::silu;
  STD_TORCH_CHECK(name == "identity", "no activation is called ", name);
  return Act::identity;
}

// The dtype in which tensors of x's dtype are computed.
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A dense copy in the given dtype, or x itself where it is that already.
inline Tensor dense(const Tensor& x, ScalarType dtype) {
  return torch::stable::contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& x, ScalarType dtype) {
  return x ? std::optional<Tensor>(dense(*x, dtype)) : std::nullopt;
}

// x itself where its last dimension is dense, else a dense copy.
inline Tensor with_dense_rows(const Tensor& x) {
  return x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

inline MapStrides map_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// Large results ask for huge pages: a fresh mapping of 4 KB pages takes longer to fault in than a kernel to fill.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  Tensor result = torch::stable::new_empty(like, shape, dtype);
#if !defined(FOVEAL_CUDA)
  ask_for_huge_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
#endif
  return result;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

// What a backward op returns for a gradient that nobody asked for.
inline Tensor no_gradient(const Tensor& grad) { return empty(grad, {0}, grad.scalar_type()); }

inline const void* pointer(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

}  // namespace foveal
