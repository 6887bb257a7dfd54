// CPU loops of depthwise_gate. A task is one image, a band of rows and a block of channels. It walks down the band with
// the last `size` rows of the gate in a ring of zero-padded working rows, so border and stride are seen by one function.
#include "gate.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int64_t tile = 4;  // columns convolved at once, so that a weight is loaded once for them
constexpr int64_t ring_bytes = 256 << 10;

template <class S>
struct Plan {
  GateShape shape;
  int64_t radius, columns, block, blocks, bands, padded_channels;

  explicit Plan(const GateShape& s) : shape(s), radius(s.size / 2) {
    columns = (s.width + tile - 1) / tile * tile + 2 * radius;
    padded_channels = (s.channels + lanes<S> - 1) / lanes<S> * lanes<S>;
    const int64_t fitting = ring_bytes / (s.size * columns * int64_t(sizeof(S)));
    block = least(most(fitting / lanes<S>, 4) * lanes<S>, padded_channels);
    blocks = (s.channels + block - 1) / block;
    const int64_t wanted = 2 * thread_count(), tasks = most(s.batch * blocks, 1);
    bands = most(least((wanted + tasks - 1) / tasks, s.height / (2 * s.size)), 1);
  }
  int64_t tasks() const { return shape.batch * bands * blocks; }
  int64_t row_size() const { return columns * block; }
};

struct Task {
  int64_t image, band, first_row, end_row, first_channel, channels, padded;

  template <class S>
  Task(const Plan<S>& plan, int64_t index) {
    const int64_t height = plan.shape.height;
    image = index / (plan.bands * plan.blocks);
    band = index / plan.blocks % plan.bands;
    first_row = band * height / plan.bands;
    end_row = (band + 1) * height / plan.bands;
    first_channel = index % plan.blocks * plan.block;
    channels = least(plan.block, plan.shape.channels - first_channel);
    padded = least(plan.block, plan.padded_channels - first_channel);
  }
};

// The last `size` rows of a map, each with `radius` columns of zeros before it and at least as many behind.
template <class S>
class Ring {
 public:
  explicit Ring(const Plan<S>& plan) : plan_(plan), rows_(plan.shape.size * plan.row_size()) {
    __builtin_memset(rows_, 0, plan.shape.size * plan.row_size() * sizeof(S));
  }

  // The row's cells; cell j is at `row(i) + j * block`, for j from -radius on.
  S* row(int64_t i) const {
    const int64_t size = plan_.shape.size;
    return rows_ + (i + size) % size * plan_.row_size() + plan_.radius * plan_.block;
  }

  void clear(int64_t i) { __builtin_memset(row(i), 0, plan_.shape.width * plan_.block * sizeof(S)); }

  template <class T>
  void fill(int64_t i, const T* from, int64_t column_stride, int64_t channels) {
    S* to = row(i);
    for (int64_t j = 0; j < plan_.shape.width; ++j, from += column_stride, to += plan_.block) {
      for_vectors<S>(channels, [&](int64_t c, int64_t n) { store(to + c, load<S>(from + c, n), n); });
    }
  }

 private:
  const Plan<S>& plan_;
  Scratch<S> rows_;
};

// (C, size * size) to (size * size, padded C), optionally with the kernel turned by half a turn.
template <class S>
void lay_out_weight(const S* weight, const Plan<S>& plan, bool turned, S* out) {
  const int64_t taps = plan.shape.size * plan.shape.size;
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t c = 0; c < plan.padded_channels; ++c) {
      out[t * plan.padded_channels + c] =
          c < plan.shape.channels ? weight[c * taps + (turned ? taps - 1 - t : t)] : S(0);
    }
  }
}

// One tile of row i from the rows around it, into out (tile, block). `fixed` is the kernel's size, or 0 to read it.
template <class S, int fixed>
void convolve_tile(const Ring<S>& ring, const Plan<S>& plan, int64_t channels, int64_t i, int64_t j, const S* weight,
                   const S* bias, S* out) {
  const int64_t size = fixed ? fixed : plan.shape.size, radius = size / 2, block = plan.block;
  const S* rows[fixed ? fixed : 64];
  for (int64_t dy = 0; dy < size; ++dy) rows[dy] = ring.row(i + dy - radius) + (j - radius) * block;
  for (int64_t c = 0; c < channels; c += lanes<S>) {
    Vector<S> sum[tile];
    for (auto& s : sum) s = bias ? load<S>(bias + c) : Vector<S>{};
#pragma GCC unroll 3
    for (int64_t dy = 0; dy < size; ++dy) {
#pragma GCC unroll 3
      for (int64_t dx = 0; dx < size; ++dx) {
        const Vector<S> w = load<S>(weight + (dy * size + dx) * plan.padded_channels + c);
#pragma GCC unroll 4
        for (int64_t t = 0; t < tile; ++t) sum[t] += w * load<S>(rows[dy] + (t + dx) * block + c);
      }
    }
    for (int64_t t = 0; t < tile; ++t) store(out + t * block + c, sum[t]);
  }
}

template <class S>
using ConvolveTile = decltype(&convolve_tile<S, 0>);

template <class S>
ConvolveTile<S> convolve_for(int64_t size) {
  return size == 3 ? convolve_tile<S, 3> : convolve_tile<S, 0>;
}

template <Act act, class T, class S = Compute<T>>
void gate_cell(const S* convolved, const T* value, T* out, int64_t channels) {
  for_vectors<S>(channels, [&](int64_t c, int64_t n) {
    store(out + c, gate_pixel<act, S>(load<S>(convolved + c, n), load<S>(value + c, n)), n);
  });
}

// grad_value may be null.
template <Act act, class T, class S = Compute<T>>
void gate_cell_gradient(const T* grad, const S* convolved, const T* value, S* grad_convolved, T* grad_value, int64_t channels) {
  for_vectors<S>(channels, [&](int64_t c, int64_t n) {
    const auto result =
        gate_pixel_gradient<act, S>(load<S>(grad + c, n), load<S>(convolved + c, n), load<S>(value + c, n));
    store(grad_convolved + c, result.convolved, n);
    if (grad_value) store(grad_value + c, result.value, n);
  });
}

template <class T>
void forward(const GateForward& args) {
  using S = Compute<T>;
  const Plan<S> plan(args.shape);
  const auto& [batch, height, width, channels, size] = args.shape;
  const MapStrides strides = args.x_strides;
  Scratch<S> weight(size * size * plan.padded_channels), bias(plan.padded_channels);
  lay_out_weight<S>(static_cast<const S*>(args.weight), plan, false, weight);
  for (int64_t c = 0; c < plan.padded_channels; ++c) {
    bias[c] = args.bias && c < plan.shape.channels ? static_cast<const S*>(args.bias)[c] : S(0);
  }
  const auto convolve = convolve_for<S>(size);
  void (*cell)(const S*, const T*, T*, int64_t) = nullptr;
  with_act(args.act, [&](auto act) { cell = gate_cell<decltype(act)::value, T>; });

  parallel_for(plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    Ring<S> gate(plan);
    Scratch<S> convolved(tile * plan.block);
    for (int64_t index = begin; index < end; ++index) {
      const Task task(plan, index);
      const T* x = static_cast<const T*>(args.x) + task.image * strides.batch + task.first_channel;
      T* out = static_cast<T*>(args.out) + task.image * height * width * channels + task.first_channel;
      for (int64_t below = task.first_row - plan.radius; below < task.end_row + plan.radius; ++below) {
        below < 0 || below >= height ? gate.clear(below)
                                     : gate.fill(below, x + below * strides.row, strides.column, task.channels);
        const int64_t i = below - plan.radius;
        if (i < task.first_row) continue;
        for (int64_t j = 0; j < width; ++j) {
          if (j % tile == 0) {
            convolve(gate, plan, task.padded, i, j, weight + task.first_channel, bias + task.first_channel, convolved);
          }
          cell(convolved + j % tile * plan.block, x + channels + i * strides.row + j * strides.column,
               out + (i * width + j) * channels, task.channels);
        }
      }
    }
  });
}

// Adds the products of row i's gradient with the rows around it to `sums` (size * size, padded C).
template <class S, int fixed>
void add_weight_gradient(const Ring<S>& gate, const S* grad, const Plan<S>& plan, int64_t channels, int64_t i, S* sums) {
  const int64_t size = fixed ? fixed : plan.shape.size, radius = size / 2, block = plan.block;
  constexpr int64_t group = fixed ? fixed : 1;  // taps of a row that share a load of the gradient
  for (int64_t c = 0; c < channels; c += lanes<S>) {
    for (int64_t dy = 0; dy < size; ++dy) {
      const S* row = gate.row(i + dy - radius) - radius * block + c;
      for (int64_t dx = 0; dx < size; dx += group) {
        Vector<S> sum[group] = {};
        for (int64_t j = 0; j < plan.shape.width; ++j) {
          const Vector<S> g = load<S>(grad + j * block + c);
#pragma GCC unroll 3
          for (int64_t t = 0; t < group; ++t) sum[t] += g * load<S>(row + (j + dx + t) * block);
        }
        for (int64_t t = 0; t < group; ++t) {
          S* total = sums + (dy * size + dx + t) * plan.padded_channels + c;
          store(total, load<S>(total) + sum[t]);
        }
      }
    }
  }
}

template <class S>
void add_bias_gradient(const S* grad, const Plan<S>& plan, int64_t channels, S* sums) {
  for (int64_t c = 0; c < channels; c += lanes<S>) {
    Vector<S> sum = {};
    for (int64_t j = 0; j < plan.shape.width; ++j) sum += load<S>(grad + j * plan.block + c);
    store(sums + c, load<S>(sums + c) + sum);
  }
}

// The sums over images and bands, in their order: partial is (images * bands, size * size + 1, padded C).
template <class S>
void reduce_parameter_gradients(const GateBackward& args, const Plan<S>& plan, const S* partial) {
  const int64_t taps = plan.shape.size * plan.shape.size, channels = plan.shape.channels;
  parallel_for(channels, 256, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t <= taps; ++t) {
      S* out = static_cast<S*>(t < taps ? args.grad_weight : args.grad_bias);
      if (out == nullptr) continue;
      const int64_t stride = t < taps ? taps : 1, offset = t < taps ? t : 0;
      for (int64_t c = begin; c < end; ++c) {
        S sum = 0;
        for (int64_t p = 0; p < plan.shape.batch * plan.bands; ++p) {
          sum += partial[(p * (taps + 1) + t) * plan.padded_channels + c];
        }
        out[c * stride + offset] = sum;
      }
    }
  });
}

template <class T>
void backward(const GateBackward& args) {
  using S = Compute<T>;
  const Plan<S> plan(args.shape);
  const auto& [batch, height, width, channels, size] = args.shape;
  const int64_t taps = size * size, radius = plan.radius, block = plan.block;
  Scratch<S> weight(taps * plan.padded_channels), turned(taps * plan.padded_channels), bias(plan.padded_channels);
  lay_out_weight<S>(static_cast<const S*>(args.weight), plan, false, weight);
  lay_out_weight<S>(static_cast<const S*>(args.weight), plan, true, turned);
  for (int64_t c = 0; c < plan.padded_channels; ++c) {
    bias[c] = args.bias && c < plan.shape.channels ? static_cast<const S*>(args.bias)[c] : S(0);
  }
  const int64_t partial_size = (taps + 1) * plan.padded_channels;
  Scratch<S> partial(batch * plan.bands * partial_size);
  const auto convolve = convolve_for<S>(size);
  const auto add_weight = size == 3 ? add_weight_gradient<S, 3> : add_weight_gradient<S, 0>;
  void (*cell)(const T*, const S*, const T*, S*, T*, int64_t) = nullptr;
  with_act(args.act, [&](auto act) { cell = gate_cell_gradient<decltype(act)::value, T>; });

  parallel_for(plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    Ring<S> gate(plan), grad_convolved(plan);
    Scratch<S> result(tile * block);
    for (int64_t index = begin; index < end; ++index) {
      const Task task(plan, index);
      const T* x = static_cast<const T*>(args.x) + task.image * args.x_strides.batch + task.first_channel;
      const T* grad = static_cast<const T*>(args.grad) + task.image * args.grad_strides.batch + task.first_channel;
      T* grad_x = static_cast<T*>(args.grad_x);
      if (grad_x) grad_x += task.image * height * width * 2 * channels + task.first_channel;
      S* sums = partial + (task.image * plan.bands + task.band) * partial_size + task.first_channel;
      for (int64_t t = 0; t <= taps; ++t) __builtin_memset(sums + t * plan.padded_channels, 0, task.padded * sizeof(S));

      // Row `below` of the gate completes row `i` of the convolution's gradient, which completes row `above` of the
      // gate's gradient. Gradient rows outside the band are made for the rows of the gate at its edge.
      const int64_t first = task.first_row - (grad_x ? radius : 0), end_row = task.end_row + (grad_x ? radius : 0);
      for (int64_t below = first - radius; below < end_row + radius; ++below) {
        below < 0 || below >= height
            ? gate.clear(below)
            : gate.fill(below, x + below * args.x_strides.row, args.x_strides.column, task.channels);
        const int64_t i = below - radius, above = i - radius;
        if (i < first) continue;
        if (i < 0 || i >= height) {
          grad_convolved.clear(i);
        } else {
          const bool own = i >= task.first_row && i < task.end_row;
          S* grad_row = grad_convolved.row(i);
          for (int64_t j = 0; j < width; ++j) {
            if (j % tile == 0) {
              convolve(gate, plan, task.padded, i, j, weight + task.first_channel, bias + task.first_channel, result);
            }
            cell(grad + i * args.grad_strides.row + j * args.grad_strides.column, result + j % tile * block,
                 x + channels + i * args.x_strides.row + j * args.x_strides.column, grad_row + j * block,
                 own && grad_x ? grad_x + (i * width + j) * 2 * channels + channels : nullptr, task.channels);
          }
          if (own && args.grad_weight) add_weight(gate, grad_row, plan, task.padded, i, sums);
          if (own && args.grad_bias) add_bias_gradient(grad_row, plan, task.padded, sums + taps * plan.padded_channels);
        }
        if (!grad_x || above < task.first_row) continue;
        for (int64_t j = 0; j < width; ++j) {
          if (j % tile == 0) {
            convolve(grad_convolved, plan, task.padded, above, j, turned + task.first_channel, nullptr, result);
          }
          const S* from = result + j % tile * block;
          T* to = grad_x + (above * width + j) * 2 * channels;
          for_vectors<S>(task.channels, [&](int64_t c, int64_t n) { store(to + c, load<S>(from + c, n), n); });
        }
      }
    }
  });
  reduce_parameter_gradients(args, plan, static_cast<const S*>(partial));
}

}  // namespace

void depthwise_gate_forward(const GateForward& args) {
  with_type(args.dtype, [&](auto type) { forward<typename decltype(type)::type>(args); });
}

void depthwise_gate_backward(const GateBackward& args) {
  with_type(args.dtype, [&](auto type) { backward<typename decltype(type)::type>(args); });
}

}  // namespace foveal::FOVEAL_ISA
