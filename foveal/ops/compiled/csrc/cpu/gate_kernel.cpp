// CPU loops of depthwise_gate. A tile of columns is convolved, gated and stored in one pass over its channels. Cells
// are read where they lie, through pointers that lead to zeros outside of the map. A bias of the input costs the
// convolution nothing: its product with the weights joins the bias of the output, and what lies outside of the map is
// minus the input's bias.
#include "gate.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int64_t tile = 7;  // columns at once share the loads of weights and of cells; it divides 56, 28, 14 and 7
constexpr int64_t rows_bytes = 1 << 20;  // of the rows that a window covers, to stay in a fast cache

// How the channels are laid out and the work is cut.
template <class S>
struct Plan {
  GateShape shape;
  int64_t radius, padded_channels, blocks, block, bands;

  explicit Plan(const GateShape& s) : shape(s), radius(s.size / 2) {
    padded_channels = (most(s.channels, 1) + lanes<S> - 1) / lanes<S> * lanes<S>;
    const int64_t bytes = 2 * (s.size + 1) * s.width * padded_channels * int64_t(sizeof(S));
    blocks = least(bytes / rows_bytes + 1, padded_channels / lanes<S>);
    block = (padded_channels / lanes<S> + blocks - 1) / blocks * lanes<S>;
    blocks = (padded_channels + block - 1) / block;
    const int64_t wanted = 2 * thread_count(), tasks = most(s.batch * blocks, 1);
    bands = most(least((wanted + tasks - 1) / tasks, s.height / (2 * s.size)), 1);
  }
  int64_t taps() const { return shape.size * shape.size; }
};

// The parameters by tap, (size * size, padded C), with the kernel turned by half a turn for the gradient.
template <class S>
struct Parameters {
  Scratch<S> weight, bias, zeros;

  Parameters(const Plan<S>& plan, const void* from_weight, const void* from_bias, bool turned)
      : weight(plan.taps() * plan.padded_channels), bias(plan.padded_channels), zeros(plan.padded_channels) {
    const int64_t taps = plan.taps(), channels = plan.shape.channels;
    for (int64_t c = 0; c < plan.padded_channels; ++c) {
      for (int64_t t = 0; t < taps; ++t) {
        weight[t * plan.padded_channels + c] =
            c < channels ? static_cast<const S*>(from_weight)[c * taps + (turned ? taps - 1 - t : t)] : S(0);
      }
      bias[c] = from_bias && c < channels ? static_cast<const S*>(from_bias)[c] : S(0);
      zeros[c] = S(0);
    }
  }
};

// A map's rows, or the last `period` of them in a ring.
template <class T>
struct Rows {
  const T* cells;
  int64_t height, width, row, column, period;
};

FOVEAL_INLINE float negative(float x) { return -x; }
FOVEAL_INLINE double negative(double x) { return -x; }
FOVEAL_INLINE bfloat16 negative(bfloat16 x) { return {uint16_t(x.bits ^ 0x8000)}; }

// The bias of the input, (2C,) or null: adds its share to the convolution's bias, and gives the cells outside the map.
template <class T>
struct InputBias {
  using S = Compute<T>;
  Scratch<T> outside;
  const T* of_value;

  InputBias(const Plan<S>& plan, const void* input_bias, Parameters<S>& parameters) : outside(plan.padded_channels) {
    const T* from = static_cast<const T*>(input_bias);
    __builtin_memset(outside, 0, plan.padded_channels * sizeof(T));
    of_value = from ? from + plan.shape.channels : nullptr;
    for (int64_t c = 0; from && c < plan.shape.channels; ++c) {
      S sum = 0;
      for (int64_t t = 0; t < plan.taps(); ++t) sum += parameters.weight[t * plan.padded_channels + c];
      parameters.bias[c] += sum * load<S>(from + c, 1)[0];
      outside[c] = negative(from[c]);
    }
  }
};

// Pointers to the (size, tile + size - 1) cells that a tile reads.
template <class T>
class Window {
 public:
  explicit Window(int64_t size) : size_(size), cells_(size * (tile + size - 1)) {}

  void set_outside(const void* cell) { outside_ = static_cast<const T*>(cell); }

  void move(const Rows<T>& rows, int64_t i, int64_t j) {
    const T** to = cells_;
    for (int64_t y = i - size_ / 2; y <= i + size_ / 2; ++y) {
      const T* row = y >= 0 && y < rows.height ? rows.cells + y % rows.period * rows.row : nullptr;
      for (int64_t x = j - size_ / 2; x < j + tile + size_ / 2; ++x) {
        *to++ = row && x >= 0 && x < rows.width ? row + x * rows.column : outside_;
      }
    }
  }

  // What the tile's columns find under a tap.
  FOVEAL_INLINE const T* const* under(int64_t size, int64_t dy, int64_t dx) const {
    return cells_ + dy * (tile + size - 1) + dx;
  }

 private:
  int64_t size_;
  const T* outside_ = nullptr;
  Scratch<const T*> cells_;
};

template <int size>
struct Fixed {
  static constexpr int value = size;
};

// Call `body(c, count, Fixed<size>())` for the vectors of [0, channels). The size is known to the compiler where it is
// 3 and the vector is full; Fixed<0> stands for any other.
template <class S, class F>
FOVEAL_INLINE void for_channels(int64_t size, int64_t channels, F&& body) {
  int64_t c = 0;
  if (size == 3) {
    for (; c + lanes<S> <= channels; c += lanes<S>) body(c, int64_t(lanes<S>), Fixed<3>());
  }
  for (; c < channels; c += lanes<S>) body(c, least(channels - c, lanes<S>), Fixed<0>());
}

template <int fixed, class T, class S>
FOVEAL_INLINE void convolve(const Window<T>& window, const Plan<S>& plan, const S* weight, const S* bias, int64_t c,
                            int64_t count, Vector<S>* sum) {
  const int64_t size = fixed ? fixed : plan.shape.size;
#pragma GCC unroll 7
  for (int64_t t = 0; t < tile; ++t) sum[t] = bias ? load<S>(bias + c) : Vector<S>{};
#pragma GCC unroll 3
  for (int64_t dy = 0; dy < size; ++dy) {
#pragma GCC unroll 3
    for (int64_t dx = 0; dx < size; ++dx) {
      const Vector<S> w = load<S>(weight + (dy * size + dx) * plan.padded_channels + c);
      const T* const* cells = window.under(size, dy, dx);
#pragma GCC unroll 7
      for (int64_t t = 0; t < tile; ++t) sum[t] += w * load<S>(cells[t] + c, count);
    }
  }
}

// Adds the products of a tile's gradient with the cells around it to `sums` (size * size, padded C).
template <int fixed, class T, class S>
FOVEAL_INLINE void add_products(const Window<T>& window, const Plan<S>& plan, const Vector<S>* grad, int64_t c,
                                int64_t count, S* sums) {
  const int64_t size = fixed ? fixed : plan.shape.size;
#pragma GCC unroll 3
  for (int64_t dy = 0; dy < size; ++dy) {
#pragma GCC unroll 3
    for (int64_t dx = 0; dx < size; ++dx) {
      S* to = sums + (dy * size + dx) * plan.padded_channels + c;
      const T* const* cells = window.under(size, dy, dx);
      Vector<S> sum = {};
#pragma GCC unroll 7
      for (int64_t t = 0; t < tile; ++t) sum += grad[t] * load<S>(cells[t] + c, count);
      store(to, load<S>(to) + sum);
    }
  }
}

// What the next row reads for the first time. It comes after the tile's own work; asked for earlier it delays that.
template <class T>
FOVEAL_INLINE void prefetch(const T* from, int64_t count) {
  for (int64_t c = 0; c < count; c += 64 / sizeof(T)) __builtin_prefetch(from + c);
}

template <class T, Act act>
void forward(const GateForward& args) {
  using S = Compute<T>;
  const Plan<S> plan(args.shape);
  const int64_t &batch = args.shape.batch, &height = args.shape.height, &width = args.shape.width;
  const int64_t &channels = args.shape.channels, &size = args.shape.size;
  const MapStrides strides = args.x_strides;
  Parameters<S> parameters(plan, args.weight, args.bias, false);
  const InputBias<T> input_bias(plan, args.input_bias, parameters);

  parallel_for(plan.blocks * batch * height, 1, [&](int64_t begin, int64_t end) {
    Window<T> window(size);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index / (batch * height) * plan.block, image = index / height % batch, i = index % height;
      const S *weight = parameters.weight + first, *bias = parameters.bias + first;
      const T* value_bias = input_bias.of_value ? input_bias.of_value + first : nullptr;
      const T* x = static_cast<const T*>(args.x) + image * strides.batch + first;
      const Rows<T> gate{x, height, width, strides.row, strides.column, height};
      window.set_outside(input_bias.outside + first);
      for (int64_t j = 0; j < width; j += tile) {
        window.move(gate, i, j);
        const T* value = x + channels + i * strides.row + j * strides.column;
        T* out = static_cast<T*>(args.out) + ((image * height + i) * width + j) * channels + first;
        const int64_t own_channels = least(plan.block, channels - first), columns = least(tile, width - j);
        for_channels<S>(size, own_channels, [&](int64_t c, int64_t count, auto fixed) {
          Vector<S> sum[tile];
          convolve<fixed.value>(window, plan, weight, bias, c, count, sum);
          const Vector<S> added = value_bias ? load<S>(value_bias + c, count) : Vector<S>{};
          for (int64_t t = 0; t < columns; ++t) {
            const Vector<S> v = load<S>(value + t * strides.column + c, count) + added;
            store(out + t * channels + c, gate_pixel<act, S>(sum[t], v), count);
          }
        });
        for (int64_t t = 0; t < columns; ++t) prefetch(value + strides.row + t * strides.column, own_channels);
      }
    }
  });
}

// The sums over images and bands, in their order: partial is (images * bands, size * size + 1, padded C).
template <class S>
void reduce_parameter_gradients(const GateBackward& args, const Plan<S>& plan, const S* partial) {
  const int64_t taps = plan.taps();
  parallel_for(plan.shape.channels, 256, [&](int64_t begin, int64_t end) {
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

template <class T, Act act>
void backward(const GateBackward& args) {
  using S = Compute<T>;
  const Plan<S> plan(args.shape);
  const int64_t &batch = args.shape.batch, &height = args.shape.height, &width = args.shape.width;
  const int64_t &channels = args.shape.channels, &size = args.shape.size;
  const int64_t taps = plan.taps(), radius = plan.radius, padded = plan.padded_channels;
  const MapStrides strides = args.x_strides, upstream = args.grad_strides;
  const Parameters<S> parameters(plan, args.weight, args.bias, false), turned(plan, args.weight, nullptr, true);
  const int64_t partial_size = (taps + 1) * padded;
  Scratch<S> partial(batch * plan.bands * partial_size);
  __builtin_memset(partial, 0, batch * plan.bands * partial_size * sizeof(S));

  parallel_for(batch * plan.bands * plan.blocks, 1, [&](int64_t begin, int64_t end) {
    Window<T> window(size);
    Window<S> ring_window(size);
    window.set_outside(parameters.zeros);
    ring_window.set_outside(turned.zeros);
    Scratch<S> ring(size * width * plan.block);  // the last rows of the convolution's gradient
    const Rows<S> grad_convolved{ring, height, width, width * plan.block, plan.block, size};
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index % plan.blocks * plan.block, own_channels = least(plan.block, channels - first);
      const int64_t image = index / (plan.bands * plan.blocks), band = index / plan.blocks % plan.bands;
      const int64_t first_row = band * height / plan.bands, end_row = (band + 1) * height / plan.bands;
      const S *weight = parameters.weight + first, *bias = parameters.bias + first;
      const S* turned_weight = turned.weight + first;
      const T* x = static_cast<const T*>(args.x) + image * strides.batch + first;
      const T* grad = static_cast<const T*>(args.grad) + image * upstream.batch + first;
      T* grad_x = static_cast<T*>(args.grad_x);
      if (grad_x) grad_x += image * height * width * 2 * channels + first;
      S* sums = partial + (image * plan.bands + band) * partial_size + first;
      const Rows<T> gate{x, height, width, strides.row, strides.column, height};

      // Row `i` of the convolution's gradient completes row `above` of the gate's. Rows outside of the band are made
      // for the rows of the gate at its edge.
      const int64_t halo = grad_x ? radius : 0;
      for (int64_t i = most(first_row - halo, 0); i < end_row + halo; ++i) {
        const bool own = i >= first_row && i < end_row;
        for (int64_t j = 0; j < width && i < height; j += tile) {
          window.move(gate, i, j);
          const T* value = x + channels + i * strides.row + j * strides.column;
          const T* from = grad + i * upstream.row + j * upstream.column;
          S* row = ring + (i % size * width + j) * plan.block;
          T* grad_value = own && grad_x ? grad_x + channels + (i * width + j) * 2 * channels : nullptr;
          for_channels<S>(size, own_channels, [&](int64_t c, int64_t count, auto fixed) {
            Vector<S> sum[tile], total = {};
            convolve<fixed.value>(window, plan, weight, bias, c, count, sum);
            for (int64_t t = 0; t < tile; ++t) {
              if (t >= width - j) {
                sum[t] = Vector<S>{};
                continue;
              }
              const auto result = gate_pixel_gradient<act, S>(load<S>(from + t * upstream.column + c, count), sum[t],
                                                              load<S>(value + t * strides.column + c, count));
              store(row + t * plan.block + c, result.convolved);
              if (grad_value) store(grad_value + t * 2 * channels + c, result.value, count);
              sum[t] = result.convolved;
              total += result.convolved;
            }
            if (!own || !(args.grad_weight || args.grad_bias)) return;
            add_products<fixed.value>(window, plan, sum, c, count, sums);
            store(sums + taps * padded + c, load<S>(sums + taps * padded + c) + total);
          });
          for (int64_t t = 0; t < least(tile, width - j); ++t) {
            prefetch(value + strides.row + t * strides.column, own_channels);
            prefetch(from + upstream.row + t * upstream.column, own_channels);
          }
        }
        const int64_t above = i - radius;
        if (!grad_x || above < first_row) continue;
        for (int64_t j = 0; j < width; j += tile) {
          ring_window.move(grad_convolved, above, j);
          T* to = grad_x + (above * width + j) * 2 * channels;
          for_channels<S>(size, own_channels, [&](int64_t c, int64_t count, auto fixed) {
            Vector<S> sum[tile];
            convolve<fixed.value>(ring_window, plan, turned_weight, static_cast<const S*>(nullptr), c, count, sum);
            for (int64_t t = 0; t < least(tile, width - j); ++t) store(to + t * 2 * channels + c, sum[t], count);
          });
        }
      }
    }
  });
  reduce_parameter_gradients(args, plan, static_cast<const S*>(partial));
}

}  // namespace

void depthwise_gate_forward(const GateForward& args) {
  with_type(args.dtype, [&](auto type) {
    with_act(args.act, [&](auto act) { forward<typename decltype(type)::type, act.value>(args); });
  });
}

void depthwise_gate_backward(const GateBackward& args) {
  with_type(args.dtype, [&](auto type) {
    with_act(args.act, [&](auto act) { backward<typename decltype(type)::type, act.value>(args); });
  });
}

}  // namespace foveal::FOVEAL_ISA
