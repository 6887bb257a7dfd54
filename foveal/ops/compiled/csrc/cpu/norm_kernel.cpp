// CPU loops of add_layer_norm: one pass over memory, three over a row that stays in the fastest cache.
#include "cpu/norm.h"
#include "cpu/simd.h"

namespace foveal::FOVEAL_ISA {
namespace {

// The sum as it is stored: what is normalised is what the caller sees.
FOVEAL_INLINE Vector<float> as_stored(Vector<float> x, float*) { return x; }
FOVEAL_INLINE Vector<double> as_stored(Vector<double> x, double*) { return x; }
FOVEAL_INLINE Vector<float> as_stored(Vector<float> x, bfloat16*) { return (Vector<float>)(rounded(x) << 16); }

// The vectors of a row: f(first channel, place in a padded copy of the row, the lanes that count). A last one that is not
// whole starts early, and its first lanes do not count again; only a row shorter than a vector has lanes to spare.
template <class S>
class RowVectors {
 public:
  explicit RowVectors(int64_t channels) : channels_(channels), rest_(channels % lanes<S>) {
    for (int lane = 0; lane < rest_; ++lane) last_[channels > lanes<S> ? lanes<S> - 1 - lane : lane] = 1;
  }

  template <class F>
  FOVEAL_INLINE void operator()(const F& f) const {
    int64_t c = 0;
    for (; c + lanes<S> <= channels_; c += lanes<S>) f(c, c, Vector<S>{} + S(1));
    if (rest_) f(most(channels_ - lanes<S>, int64_t(0)), c, last_);
  }

 private:
  int64_t channels_, rest_;
  Vector<S> last_{};
};

template <bool adds, class T, class S = Compute<T>>
class Normalizer {
 public:
  explicit Normalizer(const NormProblem& problem)
      : p(problem),
        vectors(p.channels),
        padded(p.channels + lanes<S>),
        added_bias(padded),
        scale(padded),
        shift(padded),
        copies(together * padded) {
    vectors([&](int64_t c, int64_t place, Vector<S>) {
      const auto read = [&](const void* parameter, S absent) {
        const int64_t width = least(p.channels, int64_t(lanes<S>));
        return parameter ? load<S>(static_cast<const T*>(parameter) + c, width) : broadcast(absent);
      };
      store(added_bias + place, read(p.added_bias, S(0)));
      store(scale + place, read(p.weight, S(1)));
      store(shift + place, read(p.bias, S(0)));
    });
  }

  void rows(int64_t begin, int64_t end) {
    const bool narrow = p.channels < lanes<S>;
    for (; !narrow && begin + together <= end; begin += together) rows<together, lanes<S>>(begin);
    for (; begin < end; ++begin) narrow ? rows<1, 0>(begin) : rows<1, lanes<S>>(begin);
  }

 private:
  static constexpr int together = 4;  // rows, whose sums hide each other's latency

  // N rows from `first` on. Width: of a vector in memory; 0: that of the row.
  template <int N, int Width>
  FOVEAL_INLINE void rows(int64_t first) {
    const int64_t channels = p.channels, start = first * channels, width = Width ? Width : channels;
    const T *x = static_cast<const T*>(p.x) + start, *added = static_cast<const T*>(p.added) + start;
    T *sum = static_cast<T*>(p.sum) + start, *norm = static_cast<T*>(p.norm) + start;

    Vector<S> totals[N] = {}, drifts[N] = {}, squares[N] = {};
    vectors([&](int64_t c, int64_t place, Vector<S> counted) {
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        Vector<S> value = load<S>(x + r * channels + c, width);
        if constexpr (adds) {
          value = as_stored(value + (load<S>(added + r * channels + c, width) + load(added_bias + place)), sum);
        }
        store(copies + r * padded + place, value);
        totals[r] += value * counted;
      }
    });
    S means[N], drift[N], factors[N];  // drift: what rounding has left out of a mean
    for (int r = 0; r < N; ++r) means[r] = sum_of_lanes(totals[r]) / S(channels);
    vectors([&](int64_t, int64_t place, Vector<S> counted) {
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const Vector<S> distance = (load(copies + r * padded + place) - means[r]) * counted;
        drifts[r] += distance;
        squares[r] += distance * distance;
      }
    });
    for (int r = 0; r < N; ++r) {
      drift[r] = sum_of_lanes(drifts[r]) / S(channels);
      const S variance = sum_of_lanes(squares[r]) / S(channels) - drift[r] * drift[r];
      factors[r] = S(1) / S(__builtin_sqrt(double(variance + S(p.eps))));
    }
    vectors([&](int64_t c, int64_t place, Vector<S>) {
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const Vector<S> value = load(copies + r * padded + place);
        if constexpr (adds) store(sum + r * channels + c, value, width);  // now that all of x, which it may be, is read
        const Vector<S> unit = ((value - means[r]) - drift[r]) * factors[r];
        store(norm + r * channels + c, unit * load(scale + place) + load(shift + place), width);
      }
    });
  }

  const NormProblem p;
  const RowVectors<S> vectors;
  const int64_t padded;
  const Scratch<S> added_bias, scale, shift, copies;
};

}  // namespace

void add_layer_norm_forward(const NormProblem& problem) {
  with_type(problem.dtype, [&](auto type) {
    const int64_t grain = 16384 / most(problem.channels, int64_t(1)) + 1;
    parallel_for(problem.rows, grain, [&](int64_t begin, int64_t end) {
      using T = typename decltype(type)::type;
      problem.added ? Normalizer<true, T>(problem).rows(begin, end) : Normalizer<false, T>(problem).rows(begin, end);
    });
  });
}

}  // namespace foveal::FOVEAL_ISA
