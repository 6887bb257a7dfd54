// The window of 3 x 3 for half types, on tensor cores: the 16 cells of a warp times all 40 cells of their windows. Of
// the products, which go through shared memory, 9 a cell are used; the weights go back as a band between zeros.
// So a value that is not finite reaches all cells of the 2 x 8 whose windows touch its neighbourhood.
#pragma once

#include "cuda/attention/pooled.cuh"

namespace foveal::cuda {

constexpr int halo = side + 2;                 // side of a tile with its windows
constexpr int near_cells = 4 * halo;           // that a warp reaches: the cells from 2 * halo * warp() on
constexpr int padded_near_cells = 48;          // to whole products; the weights beyond are zero
constexpr int halo_rows = 112;                 // of which a warp reads 2 * halo * warp() and the 48 from there on
static_assert(halo_rows >= 2 * halo * (warps - 1) + padded_near_cells && halo_rows % 16 == 0);
constexpr int band_slots = 3;                  // of the 9 cells of a window, for each lane of a quad

struct NoBand {};

// A lane's cells of the windows of its two rows: the numbers member() + 4 * slot. `sign` 1 looks from a query to the
// keys in its window, -1 from a key to the queries whose windows hold it.
template <int sign>
struct BandPlace {
  unsigned inside = 0;

  __device__ __forceinline__ BandPlace(const Attention& p, const TilePlace& place) {
#pragma unroll
    for (int slot = 0; slot < band_slots; ++slot) {
      const int n = number(slot), i = place.row + sign * (n / 3 - 1), j = place.column + sign * (n % 3 - 1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool valid = n < 9 && p.inside(i + r, j) && p.inside(place.row + r, place.column);
        inside |= unsigned(valid) << (2 * slot + r);
      }
    }
  }

  static __device__ __forceinline__ int number(int slot) { return member() + 4 * slot; }

  // Among the near cells of the warp.
  static __device__ __forceinline__ int cell(int r, int slot) {
    const int n = number(slot), forward = n / 3 * halo + n % 3;
    return r * halo + group() + (sign > 0 ? forward : 2 * halo + 2 - forward);
  }

  __device__ __forceinline__ bool holds(int r, int slot) const { return inside >> (2 * slot + r) & 1; }
};

// Products of a warp's 16 rows with others, in shared memory.
constexpr int near_stride = near_cells;          // with the near cells
constexpr int product_stride = near_cells + 16;  // and with the tokens
constexpr int token_stride = 20;                 // with the tokens alone

template <int stride, class T, int D>
__device__ __forceinline__ void put_products(float* to, const LeftRows<T, D>& left, const T* right, int tiles) {
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile) {
    float sums[4] = {};
    multiply<T, D>(sums, left, right + 8 * tile * row_stride<T, D>);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      store(to + (group() + 8 * r) * stride + 8 * tile + 2 * member(), Floats<2>{sums[2 * r], sums[2 * r + 1]});
    }
  }
}

// A matrix of weights of a warp's 16 rows, row-major.
template <class T, int columns>
struct WarpMatrix {
  static constexpr int stride = columns + 8;
  alignas(16) T values[16 * stride];

  __device__ __forceinline__ void clear() {
    for (int n = lane(); n < 16 * stride; n += 32) values[n] = T{};
  }

  __device__ __forceinline__ void put(int r, int column, float x) {
    values[(group() + 8 * r) * stride + column] = T{uint16_t(pair_of(T(), x, 0.0f))};
  }
};

// sums += band . rows, `rows` being those of the warp's near cells.
template <class T, int D>
__device__ __forceinline__ void weigh_band(float (&sums)[D / 8][4], const WarpMatrix<T, padded_near_cells>& band,
                                           const T* rows) {
#pragma unroll
  for (int n = 0; n < padded_near_cells; n += 16) {
    weigh<T, D>(sums, Weights<T>::load(band.values + n, band.stride), rows + n * row_stride<T, D>);
  }
}

// The positional tokens as 16 rows (9, then zeros), each the sum of two of the half type.
template <class T, int D>
struct Tokens {
  Rows<T, D, 16> high, low;

  __device__ __forceinline__ void load(const Attention& p, int head) {
    for (int n = threadIdx.x; n < 16 * D; n += threads) {
      const int cell = n / D, c = n % D;
      const bool valid = p.positional_tokens && cell < 9 && c < p.d;
      const float x = valid ? p.positional_tokens[(int64_t(head) * p.d + c) * 9 + cell] : 0.0f;
      const uint32_t rounded = pair_of(T(), x, 0.0f);
      high[cell][c] = T{uint16_t(rounded)};
      low[cell][c] = T{uint16_t(pair_of(T(), x - floats_of(T(), rounded).x, 0.0f))};
    }
  }

  // The products with 16 rows.
  template <int stride>
  __device__ __forceinline__ void put_products(float* to, const LeftRows<T, D>& queries) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float sums[4] = {};
      multiply<T, D>(sums, queries, high[8 * tile]);
      multiply<T, D>(sums, queries, low[8 * tile]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        store(to + (group() + 8 * r) * stride + 8 * tile + 2 * member(), Floats<2>{sums[2 * r], sums[2 * r + 1]});
      }
    }
  }
};

// Writes 16 rows of a warp to a map of the tile, by way of shared memory that no other warp uses.
template <class T, int D>
__device__ __forceinline__ void write_rows(T* by_way_of, const float (&values)[D / 8][4], const Attention& p,
                                           const HeadMap& map, int image, const TilePlace& place) {
  __syncwarp();
  put_rows<T, D>(by_way_of, values);
  __syncwarp();
  copy_out<T, D>(by_way_of, p.d, in_words<T>(map, p.d), [&](int row) -> T* {
    const int i = place.row + row / side, j = place.left + row % side;
    return p.inside(i, j) ? at<T>(map, image, i, j, place.head) : nullptr;
  });
}

// Starts to fill a tile from a map.
template <class T, int D>
__device__ __forceinline__ void start_tile(Rows<T, D, tile_cells>& rows, const Attention& p, const HeadMap& map,
                                           int image, const TilePlace& place) {
  start_rows<T, D>(rows.values, tile_cells, p.d, in_words<T>(map, p.d), [&](int row) -> const T* {
    const int i = place.top + row / side, j = place.left + row % side;
    return p.inside(i, j) ? at<T>(map, image, i, j, place.head) : nullptr;
  });
}

// Starts to fill the halo of a tile from a map, zeros outside.
template <class T, int D>
__device__ __forceinline__ void start_halo(Rows<T, D, halo_rows>& rows, const Attention& p, const HeadMap& map,
                                           int image, const TilePlace& place) {
  start_rows<T, D>(rows.values, halo_rows, p.d, in_words<T>(map, p.d), [&](int row) -> const T* {
    const int i = place.top - 1 + row / halo, j = place.left - 1 + row % halo;
    return row < halo * halo && p.inside(i, j) ? at<T>(map, image, i, j, place.head) : nullptr;
  });
}

// Starts the copies of the keys and values that a tile's windows hold; once they are here, find_factors.
template <class T, int D, class Band>
__device__ __forceinline__ void start_windows(Band& band, const Attention& p, int image, const TilePlace& place) {
  start_halo<T, D>(band.keys, p, p.k, image, place);
  start_halo<T, D>(band.values, p, p.v, image, place);
}

template <class T, int D, class Band>
__device__ __forceinline__ void find_factors(Band& band, const Attention& p, const float* query_embedding) {
  for (int n = threads - 1 - threadIdx.x; n < halo * halo; n += threads) {
    band.factors[n] = row_factors<T, D>(band.keys[n], query_embedding, p.normalize);
  }
}

}  // namespace foveal::cuda
