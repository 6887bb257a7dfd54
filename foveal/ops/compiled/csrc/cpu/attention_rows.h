// What the queries of one row of one head see: a ring of transposed map rows for the windows, and the pooled rows.
#pragma once

#include "attention.h"
#include "cpu/window_rows.h"

namespace foveal::FOVEAL_ISA {

// D: d where it is known at compile time, else 0.
template <class A, int D>
class VisibleRows {
 public:
  VisibleRows(Arena& arena, const AttentionProblem<A>& problem)
      : p(problem),
        tiles(arena, p.bfloat16_maps, p.width, max_dim),
        keys(arena, p.window_size, p.width, p.d),
        values(arena, p.window_size, p.width, p.d),
        key_factors(arena, p.window_size, p.width, 1),
        pooled_keys(arena.take<A>(padded_keys() * p.d)),
        pooled_values(arena.take<A>(p.keys() * p.d)),
        pooled_factors(arena.take<A>(padded_keys())),
        cells(arena.take<const A*>(p.cells())),
        pool_bias_(arena.take<const A*>(p.keys())),
        row_bias_(arena.take<A>(p.cells())),
        padded_width_(round_up(p.width, lanes<A>)),
        column_bias_(arena.take<A>(p.window_size * padded_width_)),
        log_length_(arena.take<A>((p.window_size + 1) * padded_width_)),
        zeros_(arena.take<A>(max_dim)),
        tile_(arena.take<A>(tile_size<A>)) {}

  int64_t dim() const { return D ? D : p.d; }

  void load_tile(const HeadMap& map, int64_t y, int64_t x, A* tile, int64_t stride, const A* added = nullptr) const {
    tiles.load(map, {image, head, y, x}, dim(), tile, stride, added);
  }

  // Of q, k or v: of map 0, 1 or 2.
  const A* input_bias(int64_t map) const { return p.input_bias ? p.input_bias + (map * p.heads + head) * dim() : nullptr; }

  void store_tile(const A* tile, const HeadMap& map, int64_t y, int64_t x) const {
    tiles.store(tile, dim(), map, {image, head, y, x});
  }

  // Once, before anything else.
  void prepare() {
    tiles.clear();
    keys.clear();
    values.clear();
    key_factors.clear();
    for (int64_t c = 0; c < max_dim; ++c) zeros_[c] = 0;
    for (int64_t n = p.keys() * p.d; n < padded_keys() * p.d; ++n) pooled_keys[n] = 0;
    for (int64_t x = 0; x < padded_width_; ++x) {
      for (int64_t n = 0; n < p.window_size; ++n) {
        const int64_t column = x + n - p.radius();
        column_bias_[n * padded_width_ + x] = column < 0 || column >= p.width ? -__builtin_inf() : 0;
      }
      for (int64_t n = 0; p.length_scaled && n <= p.window_size; ++n) {
        const int64_t cells_here = x < p.width ? n * cells_inside(x, p.width, p.radius()) : 0;
        log_length_[n * padded_width_ + x] = cells_here + p.keys();
      }
    }
    for (int64_t n = 0; p.length_scaled && n < (p.window_size + 1) * padded_width_; n += lanes<A>) {
      store(log_length_ + n, logarithm(load(log_length_ + n)));
    }
  }

  void enter_image(int64_t b, int64_t h) {
    image = b;
    head = h;
    for (int64_t n = 0; n < p.keys(); ++n) {
      const int64_t i = n / p.pool_width, j = n % p.pool_width;
      read_pixel(p.k_pool.at(b, i, j, h), p.bfloat16_maps, dim(), pooled_keys + n * dim());
      read_pixel(p.v_pool.at(b, i, j, h), p.bfloat16_maps, dim(), pooled_values + n * dim());
    }
    for (int64_t n = 0; p.normalize && n < p.keys(); n += lanes<A>) {
      A* keys_here[lanes<A>];
      for (int64_t lane = 0; lane < lanes<A>; ++lane) keys_here[lane] = pooled_keys + (n + lane) * dim();
      rows_to_tile<A>(keys_here, dim(), tile_, lanes<A>);
      store(pooled_factors + n, normalize(tile_, lanes<A>));
      tile_to_rows(tile_, lanes<A>, dim(), keys_here);
    }
  }

  // Rows outside the map are passed over.
  void load_row(int64_t y) {
    if (y < 0 || y >= p.height) return;
    for (int64_t x = 0; x < p.width; x += lanes<A>) {
      A* key = keys.at(y, x);
      load_tile(p.k, y, x, key, keys.stride(), input_bias(1));
      if (p.normalize) store(key_factors.at(y, x), normalize(key, keys.stride()));
      load_tile(p.v, y, x, values.at(y, x), values.stride(), input_bias(2));
    }
  }

  void enter_row(int64_t i) {
    row = i;
    for (int64_t n = 0; n < p.cells(); ++n) {
      const int64_t y = i + n / p.window_size - p.radius();
      const A bias = p.window_bias ? p.window_bias[head * p.cells() + n] : A(0);
      row_bias_[n] = y < 0 || y >= p.height ? bias - A(__builtin_inf()) : bias;
    }
    const BiasTable<A>& bias = p.pool_bias;
    if (!bias.data) return;
    const A* table = bias.data + head * bias.height * bias.width;
    for (int64_t a = 0; a < p.pool_height; ++a)
      for (int64_t b = 0; b < p.pool_width; ++b)
        pool_bias_[a * p.pool_width + b] = table + bias.rows[i * p.pool_height + a] * bias.width + bias.origins[b];
  }

  // Scales every lane to unit length, by the factor that is returned.
  Vector<A> normalize(A* tile, int64_t stride) const {
    Vector<A> squares{};
    for (int64_t c = 0; c < dim(); ++c) squares += load(tile + c * stride) * load(tile + c * stride);
    const Vector<A> factor = normalizing_factor<A>(square_root(squares));
    for (int64_t c = 0; c < dim(); ++c) store(tile + c * stride, load(tile + c * stride) * factor);
    return factor;
  }

  Vector<A> log_length(int64_t x) const {
    if (!p.length_scaled) return broadcast(A(1));
    return load(log_length_ + cells_inside(row, p.height, p.radius()) * padded_width_ + x);
  }

  const A* query_embedding() const { return p.query_embedding ? p.query_embedding + head * dim() : zeros_; }

  // The query of the logits: with its embedding, scaled.
  void embed(const A* query, int64_t x, A* embedded, int64_t stride) const {
    const A* embedding = query_embedding();
    const Vector<A> scale = log_length(x) * p.scale[head];
    for (int64_t c = 0; c < dim(); ++c) store(embedded + c * stride, (load(query + c * lanes<A>) + embedding[c]) * scale);
  }

  // Logits of the window, -inf outside the map.
  void window_logits(const A* embedded, int64_t stride, int64_t x, A* logits) {
    keys.point_at_window(row, x, p.height, cells);
    in_even_blocks<9>(p.cells(), [&](auto size, int64_t first) {
      constexpr int N = decltype(size)::value;
      Vector<A> sums[N] = {};
      dot<N>(embedded, stride, dim(), WindowRows<A>{cells, keys.stride()}, first, sums);
      for (int n = 0; n < N; ++n) {
        const A* column_bias = column_bias_ + (first + n) % p.window_size * padded_width_ + x;
        store(logits + (first + n) * lanes<A>, sums[n] + (load(column_bias) + row_bias_[first + n]));
      }
    });
  }

  // Weights of the window by position alone, to be added to the softmax's.
  void positional_weights(const A* query, A* weights) const {
    in_even_blocks<9>(p.cells(), [&](auto size, int64_t first) {
      constexpr int N = decltype(size)::value;
      Vector<A> sums[N] = {};
      const int64_t offset = head * p.cells();
      if (p.positional_bias) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[n] = broadcast(p.positional_bias[offset + first + n]);
      }
      if (p.positional_tokens) {
        dot<N>(query, lanes<A>, dim(), SharedRows<A>{p.positional_tokens + offset * dim(), dim()}, first, sums);
      }
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store(weights + (first + n) * lanes<A>, sums[n]);
    });
  }

  // Where in the head's table the queries of the row find the bias of key n.
  int64_t table_place(int64_t n) const {
    return pool_bias_[n] - (p.pool_bias.data + head * p.pool_bias.height * p.pool_bias.width);
  }

  // visit(Size<N>(), logits, n) for blocks of the pooled keys n ... n + N - 1 in [begin, end).
  template <class F>
  void pooled_logits(const A* embedded, int64_t stride, int64_t x, int64_t begin, int64_t end, const F& visit) const {
    in_even_blocks<8>(end - begin, [&](auto size, int64_t first) {
      constexpr int N = decltype(size)::value;
      Vector<A> sums[N] = {};
      if (p.pool_bias.data) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[n] = load(pool_bias_[begin + first + n] + x);
      }
      dot<N>(embedded, stride, dim(), SharedRows<A>{pooled_keys, dim()}, begin + first, sums);
      visit(size, sums, begin + first);
    });
  }

  const AttentionProblem<A>& p;
  MapTiles<A> tiles;
  int64_t image = 0, head = 0, row = 0;
  RowRing<A> keys, values, key_factors;
  A *pooled_keys, *pooled_values, *pooled_factors;
  const A** cells;  // working memory for the addresses of a window

 private:
  int64_t padded_keys() const { return round_up(p.keys(), lanes<A>); }

  const A** pool_bias_;
  A* row_bias_;
  int64_t padded_width_;
  A *column_bias_, *log_length_, *zeros_, *tile_;
};

template <int D>
struct Dim {
  static constexpr int value = D;
};

// Calls f(Dim<D>()), D being d where kernels are specialised for it, else 0.
template <class A, class F>
void with_dim(int64_t d, const F& f) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (d == 24) return f(Dim<24>());
    if (d == 32) return f(Dim<32>());
  }
  f(Dim<0>());
}

}  // namespace foveal::FOVEAL_ISA
