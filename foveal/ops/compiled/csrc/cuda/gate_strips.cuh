// A 3 x 3 depthwise convolution by strips of columns: a thread walks down its strip and reads every row once.
#pragma once

#include "cuda/launch.cuh"

namespace foveal::cuda {

// A map of one image at the channels of a thread.
template <class T>
struct StripMap {
  const T* cells;
  int64_t row, column;  // strides
  int height, width;
};

// The taps of n channels from (C, 9).
template <int n>
struct Taps {
  Floats<n> at[9];

  static __device__ __forceinline__ Taps load(const float* weight, bool turned) {
    Floats<9 * n> rows;
#pragma unroll
    for (int i = 0; i < 9 * n; i += n) {
      const Floats<n> part = cuda::load<n>(weight + i);
#pragma unroll
      for (int k = 0; k < n; ++k) rows[i + k] = part[k];
    }
    Taps taps;
#pragma unroll
    for (int t = 0; t < 9; ++t) {
#pragma unroll
      for (int k = 0; k < n; ++k) taps.at[t][k] = turned ? rows[9 * k + 8 - t] : rows[9 * k + t];
    }
    return taps;
  }
};

template <class T, int n, int columns>
struct StripRow {
  Packed<T, n> cells[columns + 2];

  // Row i around columns [j, j + columns), zeros outside of the map.
  static __device__ __forceinline__ StripRow load(const StripMap<T>& map, int i, int j) {
    StripRow row;
#pragma unroll
    for (int m = 0; m < columns + 2; ++m) {
      const int x = j - 1 + m;
      row.cells[m] = i >= 0 && i < map.height && x >= 0 && x < map.width
                         ? Packed<T, n>::load(map.cells + i * map.row + x * map.column)
                         : Packed<T, n>{};
    }
    return row;
  }
};

// Calls emit(i, sums, fetched, window) for the rows [first, end) of the strip at columns [j, j + columns): with the sums
// of the convolution, what fetch(i) gave (it is called a row ahead, so that what it loads is on its way in time), and
// the 3 x (columns + 2) cells around. A row adds to the sums of three: that above it, its own, that below.
template <int n, int columns, class T, class Fetch, class Emit>
__device__ __forceinline__ void walk_strip(const StripMap<T>& map, int first, int end, int j, const Taps<n>& taps,
                                           const Floats<n>& bias, const Fetch& fetch, const Emit& emit) {
  Floats<n> sums[3][columns], window[3][columns + 2];
#pragma unroll
  for (int t = 0; t < columns; ++t) sums[1][t] = sums[2][t] = bias;
  auto coming = StripRow<T, n, columns>::load(map, first - 1, j);
  decltype(fetch(0)) fetched{}, fetching{};
#pragma unroll 3
  for (int i = first - 1; i <= end; ++i) {
    const auto row = coming;
    if (i < end) {
      coming = StripRow<T, n, columns>::load(map, i + 1, j);
      if (i >= first) fetching = fetch(i);
    }
#pragma unroll
    for (int t = 0; t < columns; ++t) sums[0][t] = sums[1][t], sums[1][t] = sums[2][t], sums[2][t] = bias;
#pragma unroll
    for (int m = 0; m < columns + 2; ++m) {
      window[0][m] = window[1][m], window[1][m] = window[2][m], window[2][m] = row.cells[m].floats();
#pragma unroll
      for (int t = 0; t < columns; ++t) {
        if (m < t || m > t + 2) continue;
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
#pragma unroll
          for (int k = 0; k < n; ++k) sums[2 - dy][t][k] += taps.at[3 * dy + m - t][k] * window[2][m][k];
        }
      }
    }
    if (i > first) emit(i - 1, sums[0], fetched, window);
    fetched = fetching;
  }
}

}  // namespace foveal::cuda
