// Maps with heads at the door of a kernel.
#pragma once

#include <algorithm>
#include <numeric>

#include "tensor.h"
#include "window.h"

namespace foveal {

inline HeadMap head_map(const Tensor& x) {
  const int64_t size = x.element_size();
  return {static_cast<char*>(x.data_ptr()), x.stride(0) * size, x.stride(1) * size, x.stride(2) * size,
          x.stride(3) * size};
}

// As many tasks as keep all threads equally busy, and no image in two parts unless that needs it.
inline RowParts row_parts(int64_t batch, int64_t height, int64_t heads) {
  const int64_t step = thread_count() / std::gcd(thread_count(), heads);
  return {batch, height, heads, step * std::max<int64_t>(1, (batch + step - 1) / step)};
}

// Calls f(Type<A>()) with the type that tensors like x are computed in.
template <class F>
auto with_computed(const Tensor& x, const F& f) {
  return dtype_of(x) == Dtype::float64 ? f(Type<double>()) : f(Type<float>());
}

}  // namespace foveal
