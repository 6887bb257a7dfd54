// aggregated_attention, forward: an online softmax over chunks of pooled keys, which the window joins at the end.
#include "cpu/attention_rows.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int64_t chunk = 64;

template <class A, int D>
class Forward {
 public:
  Forward(Arena& arena, const AttentionProblem<A>& problem)
      : p(problem),
        rows(arena, problem),
        query(arena.take<A>(tile_size<A>)),
        embedded(arena.take<A>(tile_size<A>)),
        sum(arena.take<A>(tile_size<A>)),
        near(arena.take<A>(p.cells() * lanes<A>)),
        positional(arena.take<A>(p.cells() * lanes<A>)),
        far(arena.take<A>(chunk * lanes<A>)),
        near_weights(arena.take<const A*>(p.cells())) {}

  void prepare() {
    rows.prepare();
    for (int64_t n = 0; n < p.cells(); ++n) near_weights[n] = near + n * lanes<A>;
  }

  void image_rows(int64_t image, int64_t head, int64_t begin, int64_t end) {
    rows.enter_image(image, head);
    for (int64_t y = begin - p.radius(); y < begin + p.radius(); ++y) rows.load_row(y);
    for (int64_t i = begin; i < end; ++i) {
      rows.load_row(i + p.radius());
      rows.enter_row(i);
      for (int64_t x = 0; x < p.width; x += lanes<A>) tile(x);
    }
  }

 private:
  void tile(int64_t x) {
    const int64_t d = rows.dim();
    rows.load_tile(p.q, rows.row, x, query, lanes<A>, rows.input_bias(0));
    if (p.normalize) rows.normalize(query, lanes<A>);
    rows.embed(query, x, embedded, lanes<A>);
    rows.window_logits(embedded, lanes<A>, x, near);

    Vector<A> largest = load(near);
    for (int64_t n = 1; n < p.cells(); ++n) largest = most(load(near + n * lanes<A>), largest);
    Vector<A> total{};
    for (int64_t c = 0; c < d; ++c) store(sum + c * lanes<A>, Vector<A>{});
    for (int64_t begin = 0; begin < p.keys(); begin += chunk) {
      const int64_t end = least(begin + chunk, p.keys());
      const Vector<A> before = largest;
      rows.pooled_logits(embedded, lanes<A>, x, begin, end, [&](auto size, auto& logits, int64_t first) {
#pragma GCC unroll 16
        for (int n = 0; n < decltype(size)::value; ++n) {
          largest = most(logits[n], largest);
          store(far + (first - begin + n) * lanes<A>, logits[n]);
        }
      });
      if (begin > 0) {
        const Vector<A> shrink = softmax_weight(before, largest);
        total *= shrink;
        for (int64_t c = 0; c < d; ++c) store(sum + c * lanes<A>, load(sum + c * lanes<A>) * shrink);
      }
      total += weights_of_logits(far, end - begin, largest);
      accumulate<D>(far, end - begin, SharedRows<A>{rows.pooled_values + begin * d, d}, sum);
    }
    total += weights_of_logits(near, p.cells(), largest);

    const Vector<A> share = A(1) / total;
    for (int64_t c = 0; c < d; ++c) store(sum + c * lanes<A>, load(sum + c * lanes<A>) * share);
    rows.positional_weights(query, positional);
    for (int64_t n = 0; n < p.cells() * lanes<A>; n += lanes<A>) {
      store(near + n, load(near + n) * share + load(positional + n));
    }
    rows.values.point_at_window(rows.row, x, p.height, rows.cells);
    accumulate(near_weights, p.cells(), WindowRows<A>{rows.cells, rows.values.stride()}, d, sum);

    rows.store_tile(sum, p.out, rows.row, x);
    if (!p.lse) return;
    const Vector<A> lse = largest + logarithm(total);
    A* to = p.lse + ((rows.image * p.height + rows.row) * p.width + x) * p.heads + rows.head;
    for (int64_t lane = 0; lane < rows.tiles.valid_lanes(x); ++lane) to[lane * p.heads] = lse[lane];
  }

  // Turns logits into exp(logit - largest), and returns the sum of these.
  static Vector<A> weights_of_logits(A* logits, int64_t count, Vector<A> largest) {
    Vector<A> total{};
    for (int64_t n = 0; n < count * lanes<A>; n += lanes<A>) {
      const Vector<A> weight = softmax_weight(load(logits + n), largest);
      store(logits + n, weight);
      total += weight;
    }
    return total;
  }

  const AttentionProblem<A>& p;
  VisibleRows<A, D> rows;
  A *query, *embedded, *sum, *near, *positional, *far;
  const A** near_weights;
};

template <class A, int D>
void run(const AttentionProblem<A>& problem, int64_t first, int64_t last) {
  Arena size{nullptr};
  Forward<A, D>(size, problem);
  const Scratch<char> memory(size.used);
  Arena arena{memory};
  Forward<A, D> forward(arena, problem);
  forward.prepare();
  int64_t current = 0;
  for_tasks(
      problem.row_parts, first, last, [&](int64_t head, int64_t) { current = head; },
      [&](int64_t image, int64_t begin, int64_t end) { forward.image_rows(image, current, begin, end); }, [] {});
}

template <class A>
void forward(const AttentionProblem<A>& problem) {
  parallel_for(problem.heads * problem.parts(), 1, [&](int64_t first, int64_t last) {
    with_dim<A>(problem.d, [&](auto d) { run<A, decltype(d)::value>(problem, first, last); });
  });
}

}  // namespace

void attention_forward(const AttentionProblem<float>& problem) { forward(problem); }
void attention_forward(const AttentionProblem<double>& problem) { forward(problem); }

}  // namespace foveal::FOVEAL_ISA
