// activate_and_pool and its gradient on a GPU. A thread owns n neighbouring channels, which it loads at once.
#include "pool.h"

#include "cuda/launch.cuh"
#include "doors.h"

namespace foveal::cuda {
namespace {

constexpr int threads = 256;

// A block's threads are (channels, parts of a bin); the parts meet in shared memory.
template <int n>
struct Parts {
  Floats<n> sums[threads];
};

template <class T, int n>
__global__ void FOVEAL_OCCUPANCY(threads, 4)
pool_forward(PoolShape shape, Act act, const T* x, MapStrides strides, T* out) {
  Parts<n>& parts = shared_memory<Parts<n>>();
  const int64_t c = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * n;
  const int64_t grid = shape.pooled_height * shape.pooled_width;
  for (int64_t task = blockIdx.y; task < shape.batch * grid; task += gridDim.y) {
    const int64_t image = task / grid;
    const uint32_t bin = uint32_t(task % grid), pooled_width = uint32_t(shape.pooled_width);
    const Bin<uint32_t> rows = bin_of<uint32_t>(bin / pooled_width, shape.pooled_height, shape.height);
    const Bin<uint32_t> columns = bin_of<uint32_t>(bin % pooled_width, pooled_width, shape.width);
    const uint32_t width = columns.end - columns.first, cells = (rows.end - rows.first) * width;
    const T* from = x + image * strides.batch + rows.first * strides.row + columns.first * strides.column + c;
    Floats<n> sum = {};
    if (c < shape.channels) {
      with_act(act, [&](auto activation) {
#pragma unroll 4
        for (uint32_t cell = threadIdx.y; cell < cells; cell += blockDim.y) {
          const Floats<n> values = load<n>(from + cell / width * strides.row + cell % width * strides.column);
#pragma unroll
          for (int i = 0; i < n; ++i) sum[i] += activate<activation.value, float>(values[i]);
        }
      });
    }
    parts.sums[threadIdx.y * blockDim.x + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < shape.channels) {
      for (uint32_t part = 1; part < blockDim.y; ++part) {
#pragma unroll
        for (int i = 0; i < n; ++i) sum[i] += parts.sums[part * blockDim.x + threadIdx.x][i];
      }
#pragma unroll
      for (int i = 0; i < n; ++i) sum[i] = sum[i] / float(cells);
      store(out + task * shape.channels + c, sum);
    }
    __syncthreads();
  }
}

// Blocks are rows of a map; a thread's items are cells and channels.
template <class T, int n>
__global__ void FOVEAL_OCCUPANCY(threads, 3)
pool_backward(PoolShape shape, Act act, const T* grad, MapStrides grad_strides, const T* x, MapStrides x_strides, T* grad_x) {
  const uint32_t height = uint32_t(shape.height), width = uint32_t(shape.width);
  const uint32_t pooled_height = uint32_t(shape.pooled_height), pooled_width = uint32_t(shape.pooled_width);
  const uint32_t groups = uint32_t(shape.channels / n);
  for (int64_t row = blockIdx.y; row < shape.batch * shape.height; row += gridDim.y) {
    const int64_t image = row / shape.height;
    const uint32_t i = uint32_t(row % shape.height);
    const Bin<uint32_t> above = bin_of(i, height, pooled_height);
    for (uint32_t item = blockIdx.x * threads + threadIdx.x; item < width * groups; item += gridDim.x * threads) {
      const uint32_t j = item / groups;
      const int64_t c = int64_t(item % groups) * n;
      const Bin<uint32_t> beside = bin_of(j, width, pooled_width);
      Floats<n> sum = {};
      for (uint32_t a = above.first; a < above.end; ++a) {
        const Bin<uint32_t> rows = bin_of(a, pooled_height, height);
        for (uint32_t b = beside.first; b < beside.end; ++b) {
          const Bin<uint32_t> columns = bin_of(b, pooled_width, width);
          const float share = divide(1.0f, float((rows.end - rows.first) * (columns.end - columns.first)));
          const Floats<n> upstream =
              load<n>(grad + image * grad_strides.batch + a * grad_strides.row + b * grad_strides.column + c);
#pragma unroll
          for (int k = 0; k < n; ++k) sum[k] += share * upstream[k];
        }
      }
      Floats<n> cell = load<n>(x + image * x_strides.batch + i * x_strides.row + j * x_strides.column + c);
      with_act(act, [&](auto activation) {
#pragma unroll
        for (int k = 0; k < n; ++k) {
          const float slope = activate_with_slope<activation.value, float>(cell[k]).slope;
          cell[k] = through_activation<activation.value, float>(sum[k], slope);
        }
      });
      store(grad_x + (row * width + j) * shape.channels + c, cell);
    }
  }
}

// Call `function(Count<n>())` with the number of channels that can be loaded at once from these maps: 16 bytes, or one.
template <class T, class F>
void with_width(const PoolShape& shape, std::initializer_list<const Tensor*> maps, const F& function) {
  constexpr int n = 16 / sizeof(T);
  const bool wide = shape.channels % n == 0 &&
                    std::all_of(maps.begin(), maps.end(), [](const Tensor* map) { return aligned<n>(*map); });
  wide ? function(Count<n>()) : function(Count<1>());
}

Tensor forward(const Tensor& x, const std::vector<int64_t>& grid, const std::string& act) {
  check_pool(x, std::nullopt, grid);
  const Device device(x);
  const Tensor map = with_dense_rows(x);
  const PoolShape shape{x.size(0), x.size(1), x.size(2), x.size(3), grid[0], grid[1]};
  Tensor out = empty(x, {shape.batch, grid[0], grid[1], shape.channels}, x.scalar_type());
  if (out.numel() == 0) return out;
  with_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    with_width<T>(shape, {&map}, [&](auto count) {
      constexpr int n = count.value;
      const int64_t groups = shape.channels / n, lanes = std::min<int64_t>(groups, 64);
      const int64_t bin = ceil_div(shape.height, grid[0]) * ceil_div(shape.width, grid[1]);
      int64_t parts = 1;
      while (2 * parts <= std::min(bin, threads / lanes)) parts *= 2;
      device.launch(pool_forward<T, n>, {unsigned(ceil_div(groups, lanes)), clamped(shape.batch * grid[0] * grid[1])},
                    {unsigned(lanes), unsigned(parts)}, sizeof(Parts<n>), shape, act_named(act), data<T>(map),
                    map_strides(map), mutable_data<T>(out));
    });
  });
  return out;
}

Tensor backward(const Tensor& grad, const Tensor& x, const std::string& act) {
  check_pool_gradient(grad, x);
  const Device device(x);
  const Tensor upstream = with_dense_rows(grad), map = with_dense_rows(x);
  const PoolShape shape{x.size(0), x.size(1), x.size(2), x.size(3), grad.size(1), grad.size(2)};
  Tensor grad_x = empty(x, {shape.batch, shape.height, shape.width, shape.channels}, x.scalar_type());
  if (grad_x.numel() == 0) return grad_x;
  with_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    with_width<T>(shape, {&map, &upstream}, [&](auto count) {
      constexpr int n = count.value;
      const int64_t items = shape.width * (shape.channels / n);
      device.launch(pool_backward<T, n>, {unsigned(ceil_div(items, 4 * threads)), clamped(shape.batch * shape.height)},
                    threads, 0, shape, act_named(act), data<T>(upstream), map_strides(upstream), data<T>(map),
                    map_strides(map), mutable_data<T>(grad_x));
    });
  });
  return grad_x;
}

}  // namespace
}  // namespace foveal::cuda

FOVEAL_CUDA_LIBRARY(m) {
  m.impl("activate_and_pool", TORCH_BOX(&foveal::cuda::forward));
  m.impl("activate_and_pool_backward", TORCH_BOX(&foveal::cuda::backward));
}
