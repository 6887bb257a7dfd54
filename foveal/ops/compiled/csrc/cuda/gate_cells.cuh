// depthwise_gate for kernels of any size and channels of any number: a thread takes one cell of one channel.
#pragma once

#include "gate.h"

#include "cuda/launch.cuh"

namespace foveal::cuda {

constexpr int cell_threads = 256;

template <class T>
__device__ __forceinline__ float convolved_cell(const GateShape& shape, const T* gate, MapStrides strides, int64_t i,
                                                int64_t j, const float* taps, bool turned) {
  const int64_t radius = shape.size / 2;
  float sum = 0;
  for (int64_t dy = 0; dy < shape.size; ++dy) {
    const int64_t y = i + dy - radius;
    if (y < 0 || y >= shape.height) continue;
    for (int64_t dx = 0; dx < shape.size; ++dx) {
      const int64_t z = j + dx - radius, t = dy * shape.size + dx;
      if (z < 0 || z >= shape.width) continue;
      sum += taps[turned ? shape.size * shape.size - 1 - t : t] * load<1>(gate + y * strides.row + z * strides.column)[0];
    }
  }
  return sum;
}

// Calls visit(image, i, j, c) for the elements of (B, H, W, C) that fall to this thread.
template <class F>
__device__ __forceinline__ void for_cells(const GateShape& shape, const F& visit) {
  const int64_t columns = shape.width * shape.channels;
  for (int64_t row = blockIdx.y; row < shape.batch * shape.height; row += gridDim.y) {
    for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < columns; at += int64_t(gridDim.x) * blockDim.x) {
      visit(row / shape.height, row % shape.height, at / shape.channels, at % shape.channels);
    }
  }
}

template <class T>
__global__ void FOVEAL_OCCUPANCY(cell_threads, 4)
gate_forward_cells(GateShape shape, Act act, const T* x, MapStrides strides, const float* weight, const float* bias, T* out) {
  const int64_t taps = shape.size * shape.size;
  for_cells(shape, [&](int64_t image, int64_t i, int64_t j, int64_t c) {
    const T* const gate = x + image * strides.batch + c;
    const float convolved =
        convolved_cell(shape, gate, strides, i, j, weight + c * taps, false) + (bias ? bias[c] : 0.0f);
    const float value = load<1>(gate + shape.channels + i * strides.row + j * strides.column)[0];
    with_act(act, [&](auto activation) {
      store(out + ((image * shape.height + i) * shape.width + j) * shape.channels + c,
            Floats<1>{gate_pixel<activation.value, float>(convolved, value)});
    });
  });
}

// As gate_backward (gate.cu), without the parameters; grad_x may be null.
template <class T>
__global__ void FOVEAL_OCCUPANCY(cell_threads, 4)
gate_backward_cells(GateShape shape, Act act, const T* grad, MapStrides grad_strides, const T* x, MapStrides x_strides,
                    const float* weight, const float* bias, T* grad_x,
                    float* grad_convolved) {
  const int64_t taps = shape.size * shape.size;
  for_cells(shape, [&](int64_t image, int64_t i, int64_t j, int64_t c) {
    const T* const gate = x + image * x_strides.batch + c;
    const float convolved =
        convolved_cell(shape, gate, x_strides, i, j, weight + c * taps, false) + (bias ? bias[c] : 0.0f);
    const float value = load<1>(gate + shape.channels + i * x_strides.row + j * x_strides.column)[0];
    const float upstream =
        load<1>(grad + image * grad_strides.batch + i * grad_strides.row + j * grad_strides.column + c)[0];
    const int64_t cell = (image * shape.height + i) * shape.width + j;
    with_act(act, [&](auto activation) {
      const auto result = gate_pixel_gradient<activation.value, float>(upstream, convolved, value);
      if (grad_x) store(grad_x + (2 * cell + 1) * shape.channels + c, Floats<1>{result.value});
      grad_convolved[cell * shape.channels + c] = result.convolved;
    });
  });
}

template <class T>
__global__ void FOVEAL_OCCUPANCY(cell_threads, 4)
gate_turned_cells(GateShape shape, const float* grad_convolved, const float* weight, T* grad_x) {
  const MapStrides dense{shape.height * shape.width * shape.channels, shape.width * shape.channels, shape.channels};
  for_cells(shape, [&](int64_t image, int64_t i, int64_t j, int64_t c) {
    const float* const gate = grad_convolved + image * dense.batch + c;
    const float sum = convolved_cell(shape, gate, dense, i, j, weight + c * shape.size * shape.size, true);
    store(grad_x + 2 * ((image * shape.height + i) * shape.width + j) * shape.channels + c, Floats<1>{sum});
  });
}

struct CellSums {
  float at[cell_threads];
};

// One tap (or, after the last, the bias) of 32 channels a block, over its part of the rows: partial is (parts, taps + 1, C).
template <class T>
__global__ void FOVEAL_OCCUPANCY(cell_threads, 4)
gate_parameters_cells(GateShape shape, const float* grad_convolved, const T* x, MapStrides strides, float* partial,
                      bool add) {
  const int64_t c = int64_t(blockIdx.x) * 32 + threadIdx.x, channels = shape.channels, taps = shape.size * shape.size;
  CellSums& sums = shared_memory<CellSums>();
  for (int64_t tap = blockIdx.y; tap <= taps; tap += gridDim.y) {
    const int64_t dy = tap / shape.size - shape.size / 2, dx = tap % shape.size - shape.size / 2;
    const int64_t cells = shape.batch * shape.height * shape.width;
    float sum = 0;
    for (int64_t cell = int64_t(blockIdx.z) * 8 + threadIdx.y; cell < cells && c < channels; cell += int64_t(gridDim.z) * 8) {
      const float upstream = grad_convolved[cell * channels + c];
      const int64_t j = cell % shape.width + dx, i = cell / shape.width % shape.height + dy;
      const int64_t image = cell / shape.width / shape.height;
      if (tap == taps) {
        sum += upstream;
      } else if (i >= 0 && i < shape.height && j >= 0 && j < shape.width) {
        sum += upstream * load<1>(x + image * strides.batch + i * strides.row + j * strides.column + c)[0];
      }
    }
    sums.at[threadIdx.y * 32 + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < channels) {
      float* const to = partial + (int64_t(blockIdx.z) * (taps + 1) + tap) * channels + c;
      float total = add ? *to : 0.0f;
      for (int y = 0; y < 8; ++y) total += sums.at[y * 32 + threadIdx.x];
      *to = total;
    }
    __syncthreads();
  }
}

}  // namespace foveal::cuda
