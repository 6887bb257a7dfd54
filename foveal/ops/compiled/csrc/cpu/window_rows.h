// Maps by rows: tiles of them, the ring of rows that windows reach, and who works on which.
#pragma once

#include "cpu/attention_tiles.h"
#include "window.h"

namespace foveal::FOVEAL_ISA {

// A tile's place: the first of its pixels, which are neighbours in a row.
struct Place {
  int64_t image, head, y, x;
};

// Moves tiles between memory and their transposed form.
template <class A>
class MapTiles {
 public:
  MapTiles(Arena& arena, bool bfloat16_maps, int64_t width, int64_t max_channels)
      : bfloat16_maps_(bfloat16_maps),
        width_(width),
        max_channels_(max_channels),
        zeros_(arena.take<A>(max_channels)),
        ones_(arena.take<A>(2 * lanes<A>)),
        dropped_(arena.take<A>(max_channels)) {}

  void clear() {
    __builtin_memset(zeros_, 0, max_channels_ * sizeof(A));
    for (int64_t lane = 0; lane < 2 * lanes<A>; ++lane) ones_[lane] = lane < lanes<A>;
  }

  // How many lanes of a tile at column x lie on the map.
  int64_t valid_lanes(int64_t x) const { return least(width_ - x, int64_t(lanes<A>)); }

  // Which lanes are these: a mask for `mask ? a : b`.
  FOVEAL_INLINE auto lanes_on_map(int64_t x) const { return FOVEAL_ISA::load(ones_ + lanes<A> - valid_lanes(x)) > A(0); }

  // Lanes outside the map become zero. `added`, where given, has an addend for every channel of the map.
  FOVEAL_INLINE void load(const HeadMap& map, Place place, int64_t channels, A* tile, int64_t stride,
                          const A* added = nullptr) const {
    with_stored([&](auto type) {
      using T = typename decltype(type)::type;
      const T* rows[lanes<A>];
      const char* from = map.at(place.image, place.y, place.x, place.head);
      const int64_t valid = valid_lanes(place.x);
      for (int64_t lane = 0; lane < valid; ++lane, from += map.column) {
        __builtin_prefetch(from + map.row);  // the next row's pixel, which the CPU does not foresee
        __builtin_prefetch(from + map.row + 64);
        rows[lane] = reinterpret_cast<const T*>(from);
      }
      for (int64_t lane = valid; lane < lanes<A>; ++lane) rows[lane] = reinterpret_cast<const T*>(zeros_);
      if (!added) return rows_to_tile(rows, channels, tile, stride);
      const auto on_map = lanes_on_map(place.x);
      rows_to_tile(rows, channels, tile, stride, [&](int64_t c, Vector<A> x) { return on_map ? x + added[c] : x; });
    });
  }

  FOVEAL_INLINE void store(const A* tile, int64_t channels, const HeadMap& map, Place place) const {
    with_stored([&](auto type) {
      using T = typename decltype(type)::type;
      T* rows[lanes<A>];
      char* to = map.at(place.image, place.y, place.x, place.head);
      const int64_t valid = valid_lanes(place.x);
      for (int64_t lane = 0; lane < lanes<A>; ++lane) {
        rows[lane] = reinterpret_cast<T*>(lane < valid ? to + lane * map.column : reinterpret_cast<char*>(dropped_));
      }
      tile_to_rows(tile, lanes<A>, channels, rows);
    });
  }

 private:
  template <class F>
  FOVEAL_INLINE void with_stored(const F& f) const {
    if constexpr (sizeof(A) == sizeof(float)) {
      if (bfloat16_maps_) return f(Type<bfloat16>());
    }
    f(Type<A>());
  }

  bool bfloat16_maps_;
  int64_t width_, max_channels_;
  A *zeros_, *ones_, *dropped_;  // of the ones, a vector's are followed by a vector of zeros
};

// Transposed rows of a map, only as many as a window is high, and a row of zeros. The zeros between one channel and the
// next are the cells to the right of the one and to the left of the other.
template <class A>
class RowRing {
 public:
  RowRing(Arena& arena, int64_t window_size, int64_t width, int64_t channels)
      : window_size_(window_size), margin_(round_up(window_size / 2, lanes<A>)) {
    int64_t vectors = round_up(width + window_size / 2, lanes<A>) / lanes<A>;
    if (vectors >= 8) vectors |= 1;  // else channels of wide maps would share few sets of the cache
    stride_ = vectors * lanes<A>;
    row_size_ = channels * stride_ + 2 * margin_;
    data_ = arena.take<A>((window_size_ + 1) * row_size_);
  }

  void clear() { __builtin_memset(data_, 0, (window_size_ + 1) * row_size_ * sizeof(A)); }

  // From one channel to the next.
  int64_t stride() const { return stride_; }

  A* at(int64_t y, int64_t x) const { return data_ + y % window_size_ * row_size_ + margin_ + x; }

  // Where the cells of the window around (y, x) lie, row-major; rows outside the map are zeros.
  void point_at_window(int64_t y, int64_t x, int64_t height, const A** cells) const {
    const int64_t radius = window_size_ / 2;
    for (int64_t row = y - radius; row <= y + radius; ++row) {
      const A* centre = row < 0 || row >= height ? at(window_size_ - 1, x) + row_size_ : at(row, x);
      for (int64_t offset = -radius; offset <= radius; ++offset) *cells++ = centre + offset;
    }
  }

 private:
  int64_t window_size_, margin_, stride_, row_size_;
  A* data_;
};

// The tasks [first, last) one after the other: start(head, part), then rows(image, begin, end) for each of its images.
template <class Start, class Rows, class Finish>
FOVEAL_INLINE void for_tasks(const RowParts& p, int64_t first, int64_t last, const Start& start, const Rows& rows,
                             const Finish& finish) {
  for (int64_t task = first; task < last; ++task) {
    const int64_t part = task / p.heads, head = task % p.heads;
    start(head, part);
    for (int64_t row = p.first_row(part), end = p.first_row(part + 1); row < end;) {
      const int64_t image = row / p.height, begin = row % p.height;
      const int64_t count = least(end - row, p.height - begin);
      rows(image, begin, begin + count);
      row += count;
    }
    finish();
  }
}

}  // namespace foveal::FOVEAL_ISA
