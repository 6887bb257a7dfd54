// aggregated_attention, backward: recomputed from q, k, v and the log-sum-exp, one row of queries at a time.
//
// A query collects its own gradient as in forward, and adds to those of the pooled rows and of the parameters. The
// gradients of a cell's key and value are collected by the cell, from the queries whose windows hold it, once the last
// of their rows is done; what these rows leave behind is kept in rings. So nothing is written by two threads.
#include "cpu/attention_rows.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int64_t chunk = 64;

template <class A, int D>
class Backward {
 public:
  Backward(Arena& arena, const AttentionBackward<A>& args)
      : args(args),
        p(args.problem),
        padded_d(round_up(p.d, lanes<A>)),
        rows(arena, p),
        embedded(arena, p.window_size, p.width, p.d),
        upstream(arena, p.window_size, p.width, p.d),
        logit_grads(arena, p.window_size, p.width, p.cells()),
        weights(arena, p.window_size, p.width, p.cells()),
        query(arena.take<A>(tile_size<A>)),
        query_grad(arena.take<A>(tile_size<A>)),
        tile(arena.take<A>(tile_size<A>)),
        query_rows(arena.take<A>(tile_size<A>)),
        upstream_rows(arena.take<A>(tile_size<A>)),
        near_logit_grads(arena.take<A>(p.cells() * lanes<A>)),
        near_weight_grads(arena.take<A>(p.cells() * lanes<A>)),
        positional(arena.take<A>(p.cells() * lanes<A>)),
        far_weights(arena.take<A>(p.keys() * lanes<A>)),
        far_grads(arena.take<A>(p.keys() * lanes<A>)),
        window_weights(arena.take<const A*>(p.cells())),
        pooled_key_grads(arena.take<A>(p.keys() * padded_d)),
        pooled_value_grads(arena.take<A>(p.keys() * padded_d)),
        scale_sum(arena.take<A>(lanes<A>)),
        embedding_sums(arena.take<A>(p.d * lanes<A>)),
        window_bias_sums(arena.take<A>(p.cells() * lanes<A>)),
        positional_bias_sums(arena.take<A>(p.cells() * lanes<A>)),
        token_sums(arena.take<A>(p.cells() * padded_d)) {}

  void prepare() {
    rows.prepare();
    for (RowRing<A>* ring : {&embedded, &upstream, &logit_grads, &weights}) ring->clear();
    fill_zeros(query_rows, tile_size<A>);
    fill_zeros(upstream_rows, tile_size<A>);
  }

  void start(int64_t new_head, int64_t new_part) {
    head = new_head;
    part = new_part;
    fill_zeros(scale_sum, lanes<A>);
    fill_zeros(embedding_sums, p.d * lanes<A>);
    fill_zeros(window_bias_sums, p.cells() * lanes<A>);
    fill_zeros(positional_bias_sums, p.cells() * lanes<A>);
    fill_zeros(token_sums, p.cells() * padded_d);
    if (!wants(want_pool_bias)) return;
    const int64_t size = p.pool_bias.height * p.pool_bias.width + 64 / int64_t(sizeof(A));
    table_grads = args.pool_bias_parts + (head * p.parts() + part) * size;
    fill_zeros(table_grads, size);
  }

  void image_rows(int64_t image, int64_t begin, int64_t end) {
    const int64_t radius = p.radius();
    rows.enter_image(image, head);
    fill_zeros(pooled_key_grads, p.keys() * padded_d);
    fill_zeros(pooled_value_grads, p.keys() * padded_d);
    for (int64_t y = begin - 2 * radius; y < begin; ++y) rows.load_row(y);
    for (int64_t i = begin - radius; i < end + radius; ++i) {
      rows.load_row(i + radius);
      if (i >= 0 && i < p.height) {
        rows.enter_row(i);
        for (int64_t x = 0; x < p.width; x += lanes<A>) query_tile(x, i >= begin && i < end);
      }
      const int64_t y = i - radius;
      if (y < begin || y >= end) continue;
      for (int64_t x = 0; x < p.width; x += lanes<A>) key_tile(y, x);
    }
    const int64_t place = (head * (p.batch + p.parts() - 1) + image + part) * p.keys() * dim();
    for (int64_t n = 0; n < p.keys() * dim(); ++n) {
      const int64_t from = n / dim() * padded_d + n % dim();
      if (wants(want_k_pool)) args.k_pool_parts[place + n] = pooled_key_grads[from];
      if (wants(want_v_pool)) args.v_pool_parts[place + n] = pooled_value_grads[from];
    }
  }

  void finish() {
    const ParameterGradients places(p.d, p.cells());
    A* to = args.parameter_parts + (head * p.parts() + part) * places.count;
    to[places.scale] = sum_of_lanes(load(scale_sum));
    for (int64_t c = 0; c < dim(); ++c) to[places.query_embedding + c] = sum_of_lanes(load(embedding_sums + c * lanes<A>));
    for (int64_t n = 0; n < p.cells(); ++n) {
      to[places.window_bias + n] = sum_of_lanes(load(window_bias_sums + n * lanes<A>));
      to[places.positional_bias + n] = sum_of_lanes(load(positional_bias_sums + n * lanes<A>));
      __builtin_memcpy(to + places.positional_tokens + n * dim(), token_sums + n * padded_d, dim() * sizeof(A));
    }
  }

 private:
  int64_t dim() const { return rows.dim(); }
  bool wants(int64_t gradients) const { return args.wanted & gradients; }

  static void fill_zeros(A* to, int64_t count) { __builtin_memset(to, 0, count * sizeof(A)); }

  static void add(A* to, Vector<A> x) { store(to, load(to) + x); }

  // The gradient of x from that of x / |x|, whose factor 1 / |x| is given.
  void unnormalize(A* grad, const A* unit, int64_t stride, Vector<A> factor) const {
    Vector<A> along{};
    for (int64_t c = 0; c < dim(); ++c) along += load(grad + c * lanes<A>) * load(unit + c * stride);
    for (int64_t c = 0; c < dim(); ++c) {
      A* to = grad + c * lanes<A>;
      store(to, (load(to) - load(unit + c * stride) * along) * factor);
    }
  }

  void to_rows(const A* from, int64_t stride, A* to) const {
    A* pixels[lanes<A>];
    for (int64_t lane = 0; lane < lanes<A>; ++lane) pixels[lane] = to + lane * padded_d;
    tile_to_rows(from, stride, dim(), pixels);
  }

  // The queries (row, x...). Those of rows that belong to another part only leave their traces in the rings.
  void query_tile(int64_t x, bool own) {
    const int64_t i = rows.row;
    rows.load_tile(p.q, i, x, query, lanes<A>);
    const Vector<A> factor = p.normalize ? rows.normalize(query, lanes<A>) : broadcast(A(1));
    A* u = embedded.at(i, x);
    rows.embed(query, x, u, embedded.stride());
    A* g = upstream.at(i, x);
    rows.load_tile(args.grad, i, x, g, upstream.stride());
    Vector<A> lse = broadcast(A(__builtin_inf()));
    const A* from = p.lse + ((rows.image * p.height + i) * p.width + x) * p.heads + head;
    for (int64_t lane = 0; lane < rows.tiles.valid_lanes(x); ++lane) lse[lane] = from[lane * p.heads];

    // NaN and infinities in what all lanes share must not reach lanes off the map, which sums and rings hold as zeros.
    const auto on_map = rows.tiles.lanes_on_map(x);
    rows.positional_weights(query, positional);
    rows.values.point_at_window(i, x, p.height, rows.cells);
    in_even_blocks<9>(p.cells(), [&](auto size, int64_t first) {
      constexpr int N = decltype(size)::value;
      Vector<A> sums[N] = {};
      dot<N>(g, upstream.stride(), dim(), WindowRows<A>{rows.cells, rows.values.stride()}, first, sums);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store(near_weight_grads + (first + n) * lanes<A>, on_map ? sums[n] : Vector<A>{});
    });
    rows.window_logits(u, embedded.stride(), x, near_logit_grads);
    Sums sums{};
    for (int64_t n = 0; n < p.cells(); ++n) {
      A* near = near_logit_grads + n * lanes<A>;
      const Vector<A> weight = on_map ? softmax_weight(load(near), lse) : Vector<A>{};
      store(near, weight);
      sums.add(weight, load(near_weight_grads + n * lanes<A>));
    }
    pooled_weights(x, u, g, lse, on_map, sums);

    // The gradient of a softmax's logit: its weight times (the weight's gradient - the mean of these). The log-sum-exp
    // is rounded, so the weights are made to add up to 1 again, or an error common to all of them would remain.
    const Vector<A> share = sums.weights == A(0) ? Vector<A>{} : A(1) / sums.weights;  // 0 off the map
    const Vector<A> mean = sums.products * share;
    for (int64_t n = 0; n < p.cells(); ++n) {
      A* near = near_logit_grads + n * lanes<A>;
      const Vector<A> weight = load(near) * share;
      const Vector<A> logit_grad = weight * (load(near_weight_grads + n * lanes<A>) - mean);
      store(near, logit_grad);
      store(logit_grads.at(i, x) + n * logit_grads.stride(), logit_grad);
      const Vector<A> both = weight + load(positional + n * lanes<A>);
      store(weights.at(i, x) + n * weights.stride(), on_map ? both : Vector<A>{});
    }
    if (!own) return;

    fill_zeros(query_grad, dim() * lanes<A>);
    if (wants(want_q | want_scale | want_query_embedding)) {
      rows.keys.point_at_window(i, x, p.height, rows.cells);
      for (int64_t n = 0; n < p.cells(); ++n) window_weights[n] = near_logit_grads + n * lanes<A>;
      accumulate(window_weights, p.cells(), WindowRows<A>{rows.cells, rows.keys.stride()}, dim(), query_grad);
    }
    if (wants(want_q | want_scale | want_query_embedding | want_k_pool | want_v_pool | want_pool_bias)) {
      pooled_products(x, u, g, share, mean);
    }
    window_parameters();
    finish_query(x, factor);
  }

  struct Sums {
    Vector<A> weights, products;  // of the softmax's weights; of these with their gradients

    void add(Vector<A> weight, Vector<A> grad) {
      weights += weight;
      products += weight * grad;
    }
  };

  // The weights of the pooled keys, and their gradients.
  template <class Mask>
  void pooled_weights(int64_t x, const A* u, const A* g, Vector<A> lse, Mask on_map, Sums& sums) {
    rows.pooled_logits(u, embedded.stride(), x, 0, p.keys(), [&](auto size, auto& logits, int64_t first) {
      constexpr int N = decltype(size)::value;
      Sums block{};  // sums of sums err less than one over all keys
      Vector<A> weight_grads[N] = {};
      dot<N>(g, upstream.stride(), dim(), SharedRows<A>{rows.pooled_values, dim()}, first, weight_grads);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const Vector<A> weight = on_map ? softmax_weight(logits[n], lse) : Vector<A>{};
        const Vector<A> weight_grad = on_map ? weight_grads[n] : Vector<A>{};
        block.add(weight, weight_grad);
        store(far_weights + (first + n) * lanes<A>, weight);
        store(far_grads + (first + n) * lanes<A>, weight_grad);
      }
      sums.weights += block.weights;
      sums.products += block.products;
    });
  }

  // What the pooled keys and the queries (row, x...) give each other.
  void pooled_products(int64_t x, const A* u, const A* g, Vector<A> share, Vector<A> mean) {
    if (wants(want_k_pool)) to_rows(u, embedded.stride(), query_rows);
    if (wants(want_v_pool)) to_rows(g, upstream.stride(), upstream_rows);
    for (int64_t begin = 0; begin < p.keys(); begin += chunk) {
      const int64_t end = least(begin + chunk, p.keys()), count = end - begin;
      A* pooled = far_weights + begin * lanes<A>;
      A* logit_grad = far_grads + begin * lanes<A>;
      for (int64_t n = 0; n < count * lanes<A>; n += lanes<A>) {
        store(pooled + n, load(pooled + n) * share);
        store(logit_grad + n, load(pooled + n) * (load(logit_grad + n) - mean));
      }
      if (wants(want_q | want_scale | want_query_embedding)) {
        accumulate<D>(logit_grad, count, SharedRows<A>{rows.pooled_keys + begin * dim(), dim()}, query_grad);
      }
      if (wants(want_k_pool)) {
        accumulate_lanes(logit_grad, count, query_rows, padded_d, pooled_key_grads + begin * padded_d);
      }
      if (wants(want_v_pool)) {
        accumulate_lanes(pooled, count, upstream_rows, padded_d, pooled_value_grads + begin * padded_d);
      }
      if (wants(want_pool_bias)) add_to_table(x, begin, end);
    }
  }

  // Neighbouring keys overlap in the table; taking every eighth leaves time for one sum to be written before the next.
  void add_to_table(int64_t x, int64_t begin, int64_t end) {
    for (int64_t phase = 0; phase < 8; ++phase) {
      for (int64_t n = begin + phase; n < end; n += 8) {
        add(table_grads + rows.table_place(n) + x, load(far_grads + n * lanes<A>));
      }
    }
  }

  void window_parameters() {
    for (int64_t n = 0; n < p.cells() * lanes<A>; n += lanes<A>) {
      add(window_bias_sums + n, load(near_logit_grads + n));
      add(positional_bias_sums + n, load(near_weight_grads + n));
    }
    if (!wants(want_positional_tokens)) return;
    to_rows(query, lanes<A>, query_rows);
    accumulate_lanes(near_weight_grads, p.cells(), query_rows, padded_d, token_sums);
  }

  // From the gradient of the embedded query to that of the query itself, of its embedding and of its scale.
  void finish_query(int64_t x, Vector<A> factor) {
    const A* embedding = rows.query_embedding();
    const Vector<A> length = rows.log_length(x);
    const Vector<A> scale = length * p.scale[head];
    Vector<A> along{};
    for (int64_t c = 0; c < dim(); ++c) {
      A* to = query_grad + c * lanes<A>;
      const Vector<A> grad = load(to);
      along += grad * (load(query + c * lanes<A>) + embedding[c]);
      store(to, grad * scale);
      add(embedding_sums + c * lanes<A>, grad * scale);
    }
    add(scale_sum, along * length);
    if (!wants(want_q)) return;
    if (p.positional_tokens) {
      const SharedRows<A> tokens{p.positional_tokens + head * p.cells() * dim(), dim()};
      accumulate<D>(near_weight_grads, p.cells(), tokens, query_grad);
    }
    if (p.normalize) unnormalize(query_grad, query, lanes<A>, factor);
    rows.store_tile(query_grad, args.q, rows.row, x);
  }

  // The keys and values (y, x...): cell n of a query's window is, seen from the key, at the opposite offset.
  void key_tile(int64_t y, int64_t x) {
    if (wants(want_k)) {
      collect(logit_grads, embedded, y, x);
      if (p.normalize) unnormalize(tile, rows.keys.at(y, x), rows.keys.stride(), load(rows.key_factors.at(y, x)));
      rows.store_tile(tile, args.k, y, x);
    }
    if (wants(want_v)) {
      collect(weights, upstream, y, x);
      rows.store_tile(tile, args.v, y, x);
    }
  }

  void collect(const RowRing<A>& factors, const RowRing<A>& from, int64_t y, int64_t x) {
    factors.point_at_window(y, x, p.height, window_weights);
    from.point_at_window(y, x, p.height, rows.cells);
    for (int64_t n = 0; n < p.cells(); ++n) window_weights[n] += (p.cells() - 1 - n) * factors.stride();
    fill_zeros(tile, dim() * lanes<A>);
    accumulate(window_weights, p.cells(), WindowRows<A>{rows.cells, from.stride()}, dim(), tile);
  }

  const AttentionBackward<A>& args;
  const AttentionProblem<A>& p;
  int64_t padded_d, head = 0, part = 0;
  VisibleRows<A, D> rows;
  RowRing<A> embedded, upstream, logit_grads, weights;
  A *query, *query_grad, *tile, *query_rows, *upstream_rows;
  A *near_logit_grads, *near_weight_grads, *positional, *far_weights, *far_grads;
  const A** window_weights;
  A *pooled_key_grads, *pooled_value_grads;
  A *scale_sum, *embedding_sums, *window_bias_sums, *positional_bias_sums, *token_sums;
  A* table_grads = nullptr;
};

template <class A, int D>
void run(const AttentionBackward<A>& args, int64_t first, int64_t last) {
  Arena size{nullptr};
  Backward<A, D>(size, args);
  const Scratch<char> memory(size.used);
  Arena arena{memory};
  Backward<A, D> backward(arena, args);
  backward.prepare();
  for_tasks(
      args.problem.row_parts, first, last, [&](int64_t head, int64_t part) { backward.start(head, part); },
      [&](int64_t image, int64_t begin, int64_t end) { backward.image_rows(image, begin, end); },
      [&] { backward.finish(); });
}

// Adds what the parts of an image found for its pooled keys and values.
template <class A>
void pooled_gradients(const AttentionBackward<A>& args, int64_t image, int64_t head) {
  const AttentionProblem<A>& p = args.problem;
  A key[max_dim], grad[max_dim];
  const auto sum_parts = [&](const A* parts, int64_t n) {
    for (int64_t c = 0; c < p.d; ++c) grad[c] = 0;
    for (int64_t part = 0; part < p.parts(); ++part) {
      const int64_t begin = most(p.row_parts.first_row(part), image * p.height);
      if (begin >= least(p.row_parts.first_row(part + 1), (image + 1) * p.height)) continue;
      const A* from = parts + ((head * (p.batch + p.parts() - 1) + image + part) * p.keys() + n) * p.d;
      for (int64_t c = 0; c < p.d; ++c) grad[c] += from[c];
    }
  };
  for (int64_t n = 0; n < p.keys(); ++n) {
    const int64_t i = n / p.pool_width, j = n % p.pool_width;
    if (args.wanted & want_k_pool) {
      sum_parts(args.k_pool_parts, n);
      if (p.normalize) {
        read_pixel(p.k_pool.at(image, i, j, head), p.bfloat16_maps, p.d, key);
        A squares = 0, along = 0;
        for (int64_t c = 0; c < p.d; ++c) squares += key[c] * key[c];
        const A factor = normalizing_factor<A>(square_root(broadcast(squares)))[0];
        for (int64_t c = 0; c < p.d; ++c) along += key[c] * factor * grad[c];
        for (int64_t c = 0; c < p.d; ++c) grad[c] = (grad[c] - key[c] * factor * along) * factor;
      }
      write_pixel(grad, p.bfloat16_maps, p.d, args.k_pool.at(image, i, j, head));
    }
    if (args.wanted & want_v_pool) {
      sum_parts(args.v_pool_parts, n);
      write_pixel(grad, p.bfloat16_maps, p.d, args.v_pool.at(image, i, j, head));
    }
  }
}

template <class A>
void backward(const AttentionBackward<A>& args) {
  const AttentionProblem<A>& p = args.problem;
  parallel_for(p.heads * p.parts(), 1, [&](int64_t first, int64_t last) {
    with_dim<A>(p.d, [&](auto d) { run<A, decltype(d)::value>(args, first, last); });
  });
  if (!(args.wanted & (want_k_pool | want_v_pool))) return;
  parallel_for(p.batch * p.heads, 4, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) pooled_gradients(args, n / p.heads, n % p.heads);
  });
}

}  // namespace

void attention_backward(const AttentionBackward<float>& args) { backward(args); }
void attention_backward(const AttentionBackward<double>& args) { backward(args); }

}  // namespace foveal::FOVEAL_ISA
