// CPU loops of log_cpb_table. The hidden layer lives in registers: forward a vector holds columns, backward hidden units.
#include "cpu/log_cpb.h"
#include "cpu/simd.h"

namespace foveal::FOVEAL_ISA {
namespace {

// Call `body(Count<n>(), first)` for groups of 8, 4, 2 or 1 heads, whose sums fit the registers.
template <int n>
struct Count {
  static constexpr int value = n;
};

template <class F>
FOVEAL_INLINE void for_head_groups(int64_t heads, F&& body) {
  int64_t first = 0;
  for (; heads - first >= 8; first += 8) body(Count<8>(), first);
  if (heads - first >= 4) body(Count<4>(), first), first += 4;
  if (heads - first >= 2) body(Count<2>(), first), first += 2;
  if (heads - first >= 1) body(Count<1>(), first);
}

template <class S>
FOVEAL_INLINE Vector<S> rectified(Vector<S> x) {
  return x <= S(0) ? Vector<S>{} : x;  // NaN stays
}

// One row of the table, for a group of heads from `first` on.
template <class S, int heads>
void forward_row(const LogCpbForward& args, int64_t r, int64_t first) {
  const S *column = static_cast<const S*>(args.column), *weight = static_cast<const S*>(args.weight2);
  const S *row_weight = static_cast<const S*>(args.row_weight), *bias1 = static_cast<const S*>(args.bias1);
  const S *column_weight = static_cast<const S*>(args.column_weight), *bias2 = static_cast<const S*>(args.bias2);
  const S row = static_cast<const S*>(args.row)[r];
  S* table = static_cast<S*>(args.table);
  for_vectors<S>(args.columns, [&](int64_t c, int64_t count) {
    const Vector<S> at = load<S>(column + c, count);
    Vector<S> sum[heads];
    for (int h = 0; h < heads; ++h) sum[h] = broadcast(bias2[first + h]);
    const S* w = weight + first * args.hidden;
    for (int64_t u = 0; u < args.hidden; ++u) {
      const Vector<S> x = rectified<S>(at * column_weight[u] + (row * row_weight[u] + bias1[u]));
      for (int h = 0; h < heads; ++h) sum[h] += x * w[h * args.hidden + u];
    }
    for (int h = 0; h < heads; ++h) store(table + ((first + h) * args.rows + r) * args.columns + c, sum[h], count);
  });
}

template <class S>
void forward(const LogCpbForward& args) {
  parallel_for(args.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for_head_groups(args.heads, [&](auto count, int64_t first) { forward_row<S, count.value>(args, r, first); });
    }
  });
}

// The gradients of the hidden units [u, u + count), summed over the table, a row at a time so that sums stay exact.
template <class S>
void backward_units(const LogCpbBackward& args, int64_t u, int64_t count) {
  const S *row = static_cast<const S*>(args.row), *column = static_cast<const S*>(args.column);
  const S *grad = static_cast<const S*>(args.grad), *weight = static_cast<const S*>(args.weight2) + u;
  const Vector<S> row_weight = load<S>(static_cast<const S*>(args.row_weight) + u, count);
  const Vector<S> column_weight = load<S>(static_cast<const S*>(args.column_weight) + u, count);
  const Vector<S> bias1 = load<S>(static_cast<const S*>(args.bias1) + u, count);
  Scratch<S> weights(args.heads * lanes<S>), weight_sums(args.heads * lanes<S>);
  for (int64_t h = 0; h < args.heads; ++h) {
    store(weights + h * lanes<S>, load<S>(weight + h * args.hidden, count));
    store(weight_sums + h * lanes<S>, Vector<S>{});
  }
  Vector<S> row_sum = {}, column_sum = {}, bias_sum = {};
  for (int64_t r = 0; r < args.rows; ++r) {
    const Vector<S> base = row_weight * row[r] + bias1;
    Vector<S> row_bias = {}, row_column = {};
    for_head_groups(args.heads, [&](auto group, int64_t first) {
      constexpr int heads = decltype(group)::value;
      const S* g = grad + (first * args.rows + r) * args.columns;
      const int64_t next_head = args.rows * args.columns;
      Vector<S> w[heads], sum[heads] = {};
      for (int h = 0; h < heads; ++h) w[h] = load<S>(weights + (first + h) * lanes<S>);
      for (int64_t c = 0; c < args.columns; ++c) {
        const Vector<S> before = column_weight * column[c] + base;
        const Vector<S> x = rectified<S>(before);
        Vector<S> slope = {};
        for (int h = 0; h < heads; ++h) {
          const S upstream = g[h * next_head + c];
          sum[h] += x * upstream;
          slope += w[h] * upstream;
        }
        slope = before <= S(0) ? Vector<S>{} : slope;
        row_bias += slope;
        row_column += slope * column[c];
      }
      for (int h = 0; h < heads; ++h) {
        S* total = weight_sums + (first + h) * lanes<S>;
        store(total, load<S>(total) + sum[h]);
      }
    });
    bias_sum += row_bias;
    column_sum += row_column;
    row_sum += row_bias * row[r];
  }
  store(static_cast<S*>(args.grad_row_weight) + u, row_sum, count);
  store(static_cast<S*>(args.grad_column_weight) + u, column_sum, count);
  store(static_cast<S*>(args.grad_bias1) + u, bias_sum, count);
  for (int64_t h = 0; h < args.heads; ++h) {
    store(static_cast<S*>(args.grad_weight2) + h * args.hidden + u, load<S>(weight_sums + h * lanes<S>), count);
  }
}

template <class S>
void backward(const LogCpbBackward& args) {
  const int64_t blocks = (args.hidden + lanes<S> - 1) / lanes<S>;
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t u = block * lanes<S>;
      backward_units<S>(args, u, least(int64_t(lanes<S>), args.hidden - u));
    }
  });
}

}  // namespace

void log_cpb_forward(const LogCpbForward& args) {
  args.dtype == Dtype::float64 ? forward<double>(args) : forward<float>(args);
}

void log_cpb_backward(const LogCpbBackward& args) {
  args.dtype == Dtype::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace foveal::FOVEAL_ISA
