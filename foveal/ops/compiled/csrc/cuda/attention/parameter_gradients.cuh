// The gradients of parameters: what the other kernels found in parts, added up in one order.
#pragma once

#include "cuda/attention/launches.cuh"

namespace foveal::cuda {

// Parts of the gradients of a head's parameters, in the order of ParameterGradients for so many cells of a window.
struct ParameterParts {
  const float* parts;
  int64_t count;
  int cells;
};

struct ParameterSum {
  ParameterParts queries, window;  // the latter's from window_bias on
  Parameter scale, query_embedding, window_bias, positional_tokens, positional_bias;  // null where not wanted
};

constexpr int sum_rows = 8;  // threads that share a sum

// A block for 32 values of a head.
__global__ void FOVEAL_OCCUPANCY(32 * sum_rows, 4)
parameter_gradients_sum(const __grid_constant__ Attention p, const __grid_constant__ ParameterSum a) {
  auto& sums = shared_memory<float[sum_rows][32]>();
  const ParameterGradients places(p.d, p.cells());
  const int64_t place = int64_t(blockIdx.x) * 32 + threadIdx.x, head = blockIdx.y;
  const ParameterParts& from = place < places.window_bias ? a.queries : a.window;
  const int64_t count = ParameterGradients(p.d, from.cells).count;
  float sum = 0;
  for (int64_t part = threadIdx.y; place < places.count && part < from.count; part += sum_rows) {
    sum += from.parts[(head * from.count + part) * count + place];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || place >= places.count) return;
  for (int row = 1; row < sum_rows; ++row) sum += sums[row][threadIdx.x];
  const auto put = [&](const Parameter& to, int64_t first, int64_t size, int64_t n) {
    if (to && place >= first && place < first + size) to.store(head * size + n, sum);
  };
  const int64_t d = p.d, cells = p.cells(), token = place - places.positional_tokens;
  put(a.scale, places.scale, 1, 0);
  put(a.query_embedding, places.query_embedding, d, place - places.query_embedding);
  put(a.window_bias, places.window_bias, cells, place - places.window_bias);
  put(a.positional_tokens, places.positional_tokens, d * cells, token % d * cells + token / d);
  put(a.positional_bias, places.positional_bias, cells, place - places.positional_bias);
}

// The pairs of one axis that have each index: those of index r are pairs[starts[r]] up to pairs[starts[r + 1]].
struct InverseIndex {
  int *starts, *pairs;
};

__global__ void FOVEAL_OCCUPANCY(threads, 8)
invert_index(const int64_t* index, int64_t count, int64_t size, InverseIndex to) {
  for (int64_t r = int64_t(blockIdx.x) * threads + threadIdx.x; r <= size; r += int64_t(gridDim.x) * threads) {
    int start = 0;
    for (int64_t n = 0; n < count; ++n) start += index[n] < r;
    to.starts[r] = start;
    for (int64_t n = 0; n < count; ++n) {
      if (index[n] == r) to.pairs[start++] = int(n);
    }
  }
}

struct TableGradient {
  const float* sums;  // of QueryGradients, with their groups and tiles
  int groups, first_tile, tiles;
  InverseIndex rows, columns;
  float* total;        // (heads, table_height, table_width) so far; null where one launch finds all
  Parameter gradient;  // null but for the last launch
};

// A thread for every entry of the table adds up the pairs that share it.
__global__ void FOVEAL_OCCUPANCY(threads, 8)
table_gradient(const __grid_constant__ Attention p, const __grid_constant__ TableGradient a) {
  const int64_t c = int64_t(blockIdx.x) * threads + threadIdx.x;
  const int head = blockIdx.z;
  if (c >= p.table_width) return;
  const int columns_begin = a.columns.starts[c], columns_end = a.columns.starts[c + 1];
  for (int64_t r = blockIdx.y; r < p.table_height; r += gridDim.y) {
    const int64_t entry = (head * p.table_height + r) * p.table_width + c;
    float sum = a.total && a.first_tile > 0 ? a.total[entry] : 0.0f;
    for (int row = a.rows.starts[r]; row < a.rows.starts[r + 1]; ++row) {
      const Walk vertical = Walk::from(a.rows.pairs[row], p.pool_height);
      for (int column = columns_begin; column < columns_end; ++column) {
        const Walk horizontal = Walk::from(a.columns.pairs[column], p.pool_width);
        const int i = vertical.row, j = horizontal.row, key = vertical.column * p.pool_width + horizontal.column;
        const int tile = i / side * p.tile_columns() + j / side - a.first_tile;
        if (tile < 0 || tile >= a.tiles) continue;
        for (int image_group = 0; image_group < a.groups; ++image_group) {
          const int64_t block = (int64_t(head) * a.groups + image_group) * a.tiles + tile;
          sum += a.sums[(block * p.keys() + key) * tile_cells + i % side * side + j % side];
        }
      }
    }
    if (a.gradient) a.gradient.store(entry, sum);
    else a.total[entry] = sum;
  }
}

}  // namespace foveal::cuda
