// window_scores, window_sum and their gradients on a GPU. Neighbours read the same cells, which the L1 cache keeps.
#include "window.h"

#include "cuda/launch.cuh"
#include "doors.h"

namespace foveal::cuda {
namespace {

constexpr int threads = 128;

// A map (B, H, W, heads, channels): strides in elements, channels dense.
template <class T>
struct HeadCells {
  T* cells;
  int64_t batch, row, column, head;

  __device__ __forceinline__ T* at(int64_t b, int64_t i, int64_t j, int64_t h) const {
    return cells + b * batch + i * row + j * column + h * head;
  }
};

struct WindowShape {
  int64_t batch, height, width, heads, d;
  int size;
};

// Calls visit(image, row, column, head, group) for the work that falls to this thread: `groups` items for each head of
// each cell. Rows are blocks; the items of a row lie side by side.
template <class F>
__device__ __forceinline__ void for_items(const WindowShape& shape, int groups, const F& visit) {
  const int heads = int(shape.heads);
  for (int64_t row = blockIdx.y; row < shape.batch * shape.height; row += gridDim.y) {
    const int64_t image = row / shape.height, i = row % shape.height;
    for (int64_t item = int64_t(blockIdx.x) * threads + threadIdx.x; item < shape.width * heads * groups;
         item += int64_t(gridDim.x) * threads) {
      const int64_t pair = item / groups;
      visit(image, int(i), int(pair / heads), int(pair % heads), int(item % groups));
    }
  }
}

// out[cell] = left . right[cell], and `outside` for the cells outside of the map. A thread takes one row of a window, of
// up to `run` cells at a time.
template <class T, int n, int run>
__global__ void FOVEAL_OCCUPANCY(threads, 6)
window_dot(WindowShape shape, HeadCells<const T> left, HeadCells<const T> right, T* out, float outside) {
  const int size = shape.size, radius = size / 2, height = int(shape.height), width = int(shape.width);
  for_items(shape, size, [&](int64_t image, int i, int j, int h, int dy) {
    const T* const query = left.at(image, i, j, h);
    const int y = i + dy - radius;
    T* const to = out + (((image * height + i) * width + j) * shape.heads + h) * size * size + dy * size;
    for (int first = 0; first < size; first += run) {
      Floats<run> sums = {};
#pragma unroll 2
      for (int64_t c = 0; y >= 0 && y < height && c < shape.d; c += n) {
        const Floats<n> q = load<n>(query + c);
#pragma unroll
        for (int m = 0; m < run; ++m) {
          const int z = j + first + m - radius;
          if (first + m >= size || z < 0 || z >= width) continue;
          const Floats<n> k = load<n>(right.at(image, y, z, h) + c);
#pragma unroll
          for (int e = 0; e < n; ++e) sums[m] += q[e] * k[e];
        }
      }
#pragma unroll
      for (int m = 0; m < run; ++m) {
        const int z = j + first + m - radius;
        if (first + m >= size) continue;
        const bool inside = y >= 0 && y < height && z >= 0 && z < width;
        store(to + first + m, Floats<1>{inside ? sums[m] : outside});
      }
    }
  });
}

// out = sum of left[cell] * right[cell] or, collecting, the sum in which every right goes back to the cells that it was
// weighted for: seen from such a cell, the window's cell lies at the opposite offset. A thread takes n channels.
template <class T, int n, bool collect>
__global__ void FOVEAL_OCCUPANCY(threads, 6)
window_weigh(WindowShape shape, HeadCells<const T> left, HeadCells<const T> right, T* out) {
  const int size = shape.size, radius = size / 2, groups = int(shape.d / n);
  const int height = int(shape.height), width = int(shape.width);
  for_items(shape, groups, [&](int64_t image, int i, int j, int h, int group) {
    Floats<n> sum = {};
    const T* const own = left.at(image, i, j, h);
    for (int dy = 0; dy < size; ++dy) {
      const int y = i + dy - radius;
      if (y < 0 || y >= height) continue;
#pragma unroll 3
      for (int dx = 0; dx < size; ++dx) {
        const int z = j + dx - radius, cell = dy * size + dx;
        if (z < 0 || z >= width) continue;
        const float weight = load<1>(collect ? left.at(image, y, z, h) + (size * size - 1 - cell) : own + cell)[0];
        const Floats<n> value = load<n>(right.at(image, y, z, h) + int64_t(group) * n);
#pragma unroll
        for (int e = 0; e < n; ++e) sum[e] += weight * value[e];
      }
    }
    store(out + (((image * height + i) * width + j) * shape.heads + h) * shape.d + int64_t(group) * n, sum);
  });
}

enum class Product { dot, weigh, collect };

template <class T>
HeadCells<const T> head_cells(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// The product of two maps, into a new one with this many channels. `d` is that of keys or values.
Tensor product(Product kind, const Tensor& left, const Tensor& right, int64_t window_size, int64_t channels,
               double outside = 0) {
  const Device device(right);
  const Tensor dense_left = with_dense_rows(left), dense_right = with_dense_rows(right);
  const WindowShape shape{right.size(0), right.size(1), right.size(2), right.size(3), right.size(4), int(window_size)};
  Tensor out = empty(right, {shape.batch, shape.height, shape.width, shape.heads, channels}, right.scalar_type());
  if (out.numel() == 0) return out;
  with_type(right, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto by_groups = [&](auto count) {
      constexpr int n = count.value;
      const int64_t groups = kind == Product::dot ? window_size : shape.d / n;
      const dim3 grid{unsigned(ceil_div(shape.width * shape.heads * groups, threads)), clamped(shape.batch * shape.height)};
      const auto a = head_cells<T>(dense_left), b = head_cells<T>(dense_right);
      T* const to = mutable_data<T>(out);
      if (kind == Product::dot) {
        device.launch(window_size == 3 ? window_dot<T, n, 3> : window_dot<T, n, 4>, grid, threads, 0, shape, a, b, to,
                      float(outside));
      } else {
        device.launch(kind == Product::collect ? window_weigh<T, n, true> : window_weigh<T, n, false>, grid, threads, 0,
                      shape, a, b, to);
      }
    };
    constexpr int n = 4;  // 8 bytes of half types, 16 of float
    const bool wide =
        shape.d % n == 0 && aligned<n>(dense_right) && (kind != Product::dot || aligned<n>(dense_left));
    wide ? by_groups(Count<n>()) : by_groups(Count<1>());
  });
  return out;
}

Tensor scores(const Tensor& q, const Tensor& k, int64_t window_size) {
  check_window("q", q, "k", k, window_size);
  return product(Product::dot, q, k, window_size, window_size * window_size, -__builtin_inf());
}

std::tuple<Tensor, Tensor> scores_gradients(const Tensor& grad, const Tensor& q, const Tensor& k, int64_t window_size,
                                            int64_t wanted) {
  check_window("q", q, "k", k, window_size);
  check_window("q", q, "grad", grad, window_size, true);
  const int64_t d = q.size(4);
  return {wanted & 1 ? product(Product::weigh, grad, k, window_size, d) : no_gradient(grad),
          wanted & 2 ? product(Product::collect, grad, q, window_size, d) : no_gradient(grad)};
}

Tensor sum(const Tensor& weights, const Tensor& v, int64_t window_size) {
  check_window("v", v, "weights", weights, window_size, true);
  return product(Product::weigh, weights, v, window_size, v.size(4));
}

std::tuple<Tensor, Tensor> sum_gradients(const Tensor& grad, const Tensor& weights, const Tensor& v,
                                         int64_t window_size, int64_t wanted) {
  check_window("v", v, "weights", weights, window_size, true);
  check_window("v", v, "grad", grad, window_size);
  return {wanted & 1 ? product(Product::dot, grad, v, window_size, window_size * window_size) : no_gradient(grad),
          wanted & 2 ? product(Product::collect, weights, grad, window_size, v.size(4)) : no_gradient(grad)};
}

}  // namespace
}  // namespace foveal::cuda

FOVEAL_CUDA_LIBRARY(m) {
  m.impl("window_scores", TORCH_BOX(&foveal::cuda::scores));
  m.impl("window_scores_backward", TORCH_BOX(&foveal::cuda::scores_gradients));
  m.impl("window_sum", TORCH_BOX(&foveal::cuda::sum));
  m.impl("window_sum_backward", TORCH_BOX(&foveal::cuda::sum_gradients));
}
