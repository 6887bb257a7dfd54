// depthwise_gate and its gradient on a GPU: 3 x 3 kernels by strips (gate_strips.cuh), any others cell by cell.
#include "gate.h"

#include "cuda/gate_cells.cuh"
#include "cuda/gate_strips.cuh"
#include "doors.h"

namespace foveal::cuda {
namespace {

constexpr int threads = 128;

// The forward strip is two columns of four channels: 8 bytes a load of half types, 16 of float.
constexpr int wide = 4, strip_columns = 2;
// The backward one holds the gradients of its taps besides: one column of two channels. A block owns 64 channels.
constexpr int narrow = 2, lanes = 32, block_columns = threads / lanes;

template <bool gelu, class F>
__device__ __forceinline__ void with_activation(Act act, const F& function) {
  if constexpr (gelu) {
    function(ActType<Act::gelu>());
  } else {
    with_act(act, function);
  }
}

// How a map is cut: into strips of rows, and tasks (image, strip).
struct Strips {
  int rows, per_image;
  int64_t tasks;
};

template <class T>
__device__ __forceinline__ StripMap<T> strip_map(const GateShape& shape, const T* x, MapStrides strides, int64_t image) {
  return {x + image * strides.batch, strides.row, strides.column, int(shape.height), int(shape.width)};
}

template <class T, int n, int columns>
struct Cells {
  Packed<T, n> at[columns];
};

template <class T, bool gelu>
__global__ void FOVEAL_OCCUPANCY(threads, is_float<T> && !gelu ? 3 : 4)
gate_forward(GateShape shape, Act act, Strips strips, const T* x, MapStrides strides, const float* weight,
             const float* bias, T* out) {
  const int groups = int(shape.channels / wide), item = int(blockIdx.x) * threads + int(threadIdx.x);
  const int j = item / groups * strip_columns, width = int(shape.width);
  const int64_t c = int64_t(item % groups) * wide, channels = shape.channels;
  if (j >= width) return;
  const auto taps = Taps<wide>::load(weight + 9 * c, false);
  const auto at_rest = bias ? load<wide>(bias + c) : Floats<wide>{};
  for (int64_t task = blockIdx.y; task < strips.tasks; task += gridDim.y) {
    const int64_t image = task / strips.per_image;
    const int first = int(task % strips.per_image) * strips.rows, end = min(first + strips.rows, int(shape.height));
    const StripMap<T> gate = strip_map(shape, x + c, strides, image);
    T* const to = out + (image * shape.height * width + j) * channels + c;
    const auto values = [&](int i) {
      Cells<T, wide, strip_columns> cells{};
#pragma unroll
      for (int t = 0; t < strip_columns; ++t) {
        if (j + t < width) cells.at[t] = Packed<T, wide>::load(gate.cells + channels + i * gate.row + (j + t) * gate.column);
      }
      return cells;
    };
    walk_strip<wide, strip_columns>(gate, first, end, j, taps, at_rest, values,
                                    [&](int i, const auto& sums, const auto& fetched, const auto&) {
      with_activation<gelu>(act, [&](auto activation) {
#pragma unroll
        for (int t = 0; t < strip_columns; ++t) {
          const Floats<wide> value = fetched.at[t].floats();
          Floats<wide> result;
#pragma unroll
          for (int k = 0; k < wide; ++k) result[k] = gate_pixel<activation.value, float>(sums[t][k], value[k]);
          if (j + t < width) store(to + (int64_t(i) * width + t) * channels, result);
        }
      });
    });
  }
}

// The gate's gradient from that of the convolution: the same convolution with its kernel turned by half a turn.
template <class T>
__global__ void FOVEAL_OCCUPANCY(threads, is_float<T> ? 4 : 5)
gate_turned(GateShape shape, Strips strips, const T* grad_convolved, const float* weight, T* grad_x) {
  const int groups = int(shape.channels / wide), item = int(blockIdx.x) * threads + int(threadIdx.x);
  const int j = item / groups * strip_columns, width = int(shape.width);
  const int64_t c = int64_t(item % groups) * wide, channels = shape.channels;
  if (j >= width) return;
  const auto taps = Taps<wide>::load(weight + 9 * c, true);
  const MapStrides dense{shape.height * width * channels, width * channels, channels};
  for (int64_t task = blockIdx.y; task < strips.tasks; task += gridDim.y) {
    const int64_t image = task / strips.per_image;
    const int first = int(task % strips.per_image) * strips.rows, end = min(first + strips.rows, int(shape.height));
    T* const to = grad_x + (image * shape.height * width + j) * 2 * channels + c;
    walk_strip<wide, strip_columns>(strip_map(shape, grad_convolved + c, dense, image), first, end, j, taps, {},
                                    [](int) { return 0; }, [&](int i, const auto& sums, int, const auto&) {
#pragma unroll
      for (int t = 0; t < strip_columns; ++t) {
        if (j + t < width) store(to + (int64_t(i) * width + t) * 2 * channels, sums[t]);
      }
    });
  }
}

struct TapSums {
  float at[10][block_columns][narrow][lanes];
};

template <class T>
struct Fetched {
  Packed<T, narrow> grad, value;
};

// The gradients of the value (into grad_x) and of the convolution's result, where wanted, and what the block's share of
// the map, the tasks part, part + parts, ..., adds to those of the taps and the bias: partial is (parts, 10, C).
template <class T, bool gelu>
__global__ void FOVEAL_OCCUPANCY(threads, is_float<T> && !gelu ? 3 : 4)
gate_backward(GateShape shape, Act act, Strips strips, const T* grad, MapStrides grad_strides, const T* x,
              MapStrides x_strides, const float* weight, const float* bias, T* grad_x, T* grad_convolved, float* partial,
              bool add) {
  const int width = int(shape.width), column_tiles = (width + block_columns - 1) / block_columns;
  const int64_t channels = shape.channels, c = (int64_t(blockIdx.x) * lanes + threadIdx.x) * narrow;
  const bool has_channels = c < channels;
  Floats<narrow> tap_sums[10] = {};
  if (has_channels) {
    const auto taps = Taps<narrow>::load(weight + 9 * c, false);
    const auto at_rest = bias ? load<narrow>(bias + c) : Floats<narrow>{};
    for (int64_t task = blockIdx.y; task < strips.tasks * column_tiles; task += gridDim.y) {
      const int64_t strip = task / column_tiles, image = strip / strips.per_image;
      const int j = int(task % column_tiles) * block_columns + int(threadIdx.y);
      const int first = int(strip % strips.per_image) * strips.rows, end = min(first + strips.rows, int(shape.height));
      if (j >= width) continue;
      const StripMap<T> gate = strip_map(shape, x + c, x_strides, image);
      const T* const value = gate.cells + channels + j * x_strides.column;
      const T* const upstream = grad + c + image * grad_strides.batch + j * grad_strides.column;
      const int64_t cell = image * shape.height * width + j;
      const auto fetch = [&](int i) {
        return Fetched<T>{Packed<T, narrow>::load(upstream + i * grad_strides.row),
                          Packed<T, narrow>::load(value + i * x_strides.row)};
      };
      walk_strip<narrow, 1>(gate, first, end, j, taps, at_rest, fetch,
                            [&](int i, const auto& sums, const auto& fetched, const auto& window) {
        const Floats<narrow> upstream = fetched.grad.floats(), value = fetched.value.floats();
        Floats<narrow> convolved, of_value;
        with_activation<gelu>(act, [&](auto activation) {
#pragma unroll
          for (int k = 0; k < narrow; ++k) {
            const auto result = gate_pixel_gradient<activation.value, float>(upstream[k], sums[0][k], value[k]);
            convolved[k] = result.convolved, of_value[k] = result.value;
          }
        });
        if (grad_x) {
          const int64_t at = (cell + int64_t(i) * width) * channels + c;
          store(grad_x + 2 * at - c + channels, of_value);
          store(grad_convolved + at, convolved);
        }
#pragma unroll
        for (int k = 0; k < narrow; ++k) {
#pragma unroll
          for (int t = 0; t < 9; ++t) tap_sums[t][k] += convolved[k] * window[t / 3][t % 3][k];
          tap_sums[9][k] += convolved[k];
        }
      });
    }
  }
  if (partial == nullptr) return;
  TapSums& shared = shared_memory<TapSums>();
#pragma unroll
  for (int t = 0; t < 10; ++t) {
#pragma unroll
    for (int k = 0; k < narrow; ++k) shared.at[t][threadIdx.y][k][threadIdx.x] = tap_sums[t][k];
  }
  __syncthreads();
  if (!has_channels) return;
  for (int t = threadIdx.y; t < 10; t += block_columns) {
#pragma unroll
    for (int k = 0; k < narrow; ++k) {
      float* const to = partial + (int64_t(blockIdx.y) * 10 + t) * channels + c + k;
      float sum = add ? *to : 0.0f;
#pragma unroll
      for (int y = 0; y < block_columns; ++y) sum += shared.at[t][y][k][threadIdx.x];
      *to = sum;
    }
  }
}

// The sums over the parts, in their order. Null results are not wanted.
__global__ void FOVEAL_OCCUPANCY(threads, 8)
gate_add_parts(int64_t parts, int64_t taps, int64_t channels, const float* partial, float* grad_weight, float* grad_bias) {
  const int64_t c = int64_t(blockIdx.x) * threads + threadIdx.x;
  for (int64_t tap = blockIdx.y; tap <= taps && c < channels; tap += gridDim.y) {
    float* const to = tap < taps ? grad_weight : grad_bias;
    if (to == nullptr) continue;
    float sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += partial[(part * (taps + 1) + tap) * channels + c];
    to[tap < taps ? c * taps + tap : c] = sum;
  }
}

// Rows are cut where that keeps a GPU busy; a strip also reads the rows above and below.
Strips strips_of(const GateShape& shape, int64_t blocks_a_strip) {
  constexpr int64_t enough_blocks = 2048;
  int64_t rows = 16;
  while (rows > 4 && shape.batch * ceil_div(shape.height, rows) * blocks_a_strip < enough_blocks) rows /= 2;
  const int64_t per_image = ceil_div(shape.height, rows);
  return {int(ceil_div(shape.height, per_image)), int(per_image), shape.batch * per_image};
}

bool on_16_bytes(const float* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// One call: tensors as the kernels want them.
struct Call {
  Device device;
  Tensor x, weight;
  std::optional<Tensor> bias;
  GateShape shape;
  Act act;

  Call(const Tensor& map, const Tensor& weight, const std::optional<Tensor>& bias, const std::string& act)
      : device(map),
        x(with_dense_rows(map)),
        weight(dense(weight, ScalarType::Float)),
        bias(dense(bias, ScalarType::Float)),
        shape{map.size(0), map.size(1), map.size(2), weight.size(0), weight.size(3)},
        act(act_named(act)) {}

  const float* taps() const { return data<float>(weight); }
  const float* rest() const { return bias ? data<float>(*bias) : nullptr; }

  // Whether the maps may be walked by strips.
  bool by_strips(std::initializer_list<const Tensor*> maps) const {
    return shape.size == 3 && shape.channels % wide == 0 && on_16_bytes(taps()) && on_16_bytes(rest()) &&
           std::all_of(maps.begin(), maps.end(), [](const Tensor* map) { return aligned<wide>(*map); });
  }
  int64_t strip_blocks() const {
    return ceil_div(ceil_div(shape.width, strip_columns) * (shape.channels / wide), threads);
  }
  dim3 cell_grid(const GateShape& of) const {
    return {unsigned(ceil_div(of.width * of.channels, cell_threads)), clamped(of.batch * of.height)};
  }
};

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::string& act) {
  check_gate(nullptr, x, std::nullopt, weight, bias);
  const Call call(x, weight, bias, act);
  const GateShape& shape = call.shape;
  Tensor out = empty(x, {shape.batch, shape.height, shape.width, shape.channels}, x.scalar_type());
  if (out.numel() == 0) return out;
  with_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    if (call.by_strips({&call.x})) {
      const Strips strips = strips_of(shape, call.strip_blocks());
      call.device.launch(call.act == Act::gelu ? gate_forward<T, true> : gate_forward<T, false>,
                         {unsigned(call.strip_blocks()), clamped(strips.tasks)}, threads, 0, shape, call.act, strips,
                         data<T>(call.x), map_strides(call.x), call.taps(), call.rest(), mutable_data<T>(out));
    } else {
      call.device.launch(gate_forward_cells<T>, call.cell_grid(shape), cell_threads, 0, shape, call.act, data<T>(call.x),
                         map_strides(call.x), call.taps(), call.rest(), mutable_data<T>(out));
    }
  });
  return out;
}

// Images go through both passes a few at a time, so that the convolution's gradient between them stays in the L2 cache.
// By strips it is rounded there to the type of x, where the parameters' gradients do not see it.
#if !defined(FOVEAL_GATE_CHUNK)  // tests make it smaller
#define FOVEAL_GATE_CHUNK (8 << 20)
#endif
constexpr int64_t chunk_bytes = FOVEAL_GATE_CHUNK;

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& bias, const std::string& act, int64_t wanted) {
  check_gate(&grad, x, std::nullopt, weight, bias);
  const Call call(x, weight, bias, act);
  const Tensor upstream = with_dense_rows(grad);
  const auto& [batch, height, width, channels, size] = call.shape;
  const bool want_x = wanted & 1, want_weight = wanted & 2, want_bias = wanted & 4 && bias;
  const int64_t taps = size * size, image_cells = height * width * channels;
  Tensor grad_x = no_gradient(grad), grad_weight = no_gradient(grad), grad_bias = no_gradient(grad);
  if (want_x) grad_x = empty(x, {batch, height, width, 2 * channels}, x.scalar_type());
  if (want_weight) grad_weight = torch::stable::new_zeros(call.weight, call.weight.sizes());
  if (want_bias) grad_bias = torch::stable::new_zeros(call.weight, {channels});
  const auto results = [&] {
    if (want_weight) grad_weight = dense(grad_weight, weight.scalar_type());
    if (want_bias) grad_bias = dense(grad_bias, bias->scalar_type());
    return std::make_tuple(grad_x, grad_weight, grad_bias);
  };
  if (grad.numel() == 0) return results();

  const bool by_strips = call.by_strips({&call.x, &upstream});
  const int64_t chunk = std::clamp<int64_t>(chunk_bytes / (image_cells * x.element_size()), 1, batch);
  GateShape shape = call.shape;
  shape.batch = chunk;
  const Strips narrow_strips = strips_of(shape, ceil_div(width, block_columns) * ceil_div(channels, lanes * narrow));
  const int64_t tasks = by_strips ? narrow_strips.tasks * ceil_div(width, block_columns) : ceil_div(chunk * height * width, 8);
  const int64_t slabs = by_strips ? ceil_div(channels, lanes * narrow) : ceil_div(channels, 32) * (taps + 1);
  const int64_t parts = std::clamp<int64_t>(1024 / slabs, 1, tasks);

  const bool want_parameters = want_weight || want_bias;
  Tensor partial = empty(call.weight, {want_parameters ? parts * (taps + 1) * channels : 0}, ScalarType::Float);
  Tensor grad_convolved = empty(x, {chunk * image_cells}, by_strips ? x.scalar_type() : ScalarType::Float);

  with_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    float* const sums = want_parameters ? mutable_data<float>(partial) : nullptr;
    void* const between = grad_convolved.mutable_data_ptr();
    for (int64_t image = 0; image < batch; image += chunk) {
      shape.batch = std::min(chunk, batch - image);
      const T* const from = data<T>(call.x) + image * call.x.stride(0);
      const T* const above = data<T>(upstream) + image * upstream.stride(0);
      T* const to = want_x ? mutable_data<T>(grad_x) + 2 * image * image_cells : nullptr;
      if (by_strips) {
        Strips strips = narrow_strips;
        strips.tasks = shape.batch * strips.per_image;
        call.device.launch(call.act == Act::gelu ? gate_backward<T, true> : gate_backward<T, false>,
                           {unsigned(slabs), unsigned(parts)}, {lanes, block_columns}, sizeof(TapSums), shape, call.act,
                           strips, above, map_strides(upstream), from, map_strides(call.x), call.taps(), call.rest(), to,
                           static_cast<T*>(between), sums, image > 0);
        if (!want_x) continue;
        const Strips whole = strips_of(shape, call.strip_blocks());
        call.device.launch(gate_turned<T>, {unsigned(call.strip_blocks()), clamped(whole.tasks)}, threads, 0, shape, whole,
                           static_cast<const T*>(between), call.taps(), to);
        continue;
      }
      call.device.launch(gate_backward_cells<T>, call.cell_grid(shape), cell_threads, 0, shape, call.act, above,
                         map_strides(upstream), from, map_strides(call.x), call.taps(), call.rest(), to,
                         static_cast<float*>(between));
      if (want_x) {
        call.device.launch(gate_turned_cells<T>, call.cell_grid(shape), cell_threads, 0, shape,
                           static_cast<const float*>(between), call.taps(), to);
      }
      if (want_parameters) {
        call.device.launch(gate_parameters_cells<T>, {unsigned(ceil_div(channels, 32)), clamped(taps + 1), unsigned(parts)},
                           {32, 8}, sizeof(CellSums), shape, static_cast<const float*>(between), from, map_strides(call.x), sums, image > 0);
      }
    }
  });
  if (want_parameters) {
    call.device.launch(gate_add_parts, {unsigned(ceil_div(channels, threads)), clamped(taps + 1)}, threads, 0, parts, taps,
                       channels, data<float>(partial), want_weight ? mutable_data<float>(grad_weight) : nullptr,
                       want_bias ? mutable_data<float>(grad_bias) : nullptr);
  }
  return results();
}

}  // namespace
}  // namespace foveal::cuda

FOVEAL_CUDA_LIBRARY(m) {
  m.impl("depthwise_gate", TORCH_BOX(&foveal::cuda::forward));
  m.impl("depthwise_gate_backward", TORCH_BOX(&foveal::cuda::backward));
}
