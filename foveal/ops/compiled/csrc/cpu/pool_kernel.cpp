// CPU loops of activate_and_pool. A task is a row of one image: of the pooled map in the forward, of the map itself in
// the backward. It first sums over the rows of a bin (backward: over the bins of a row), then over columns.
#include "pool.h"

namespace foveal::FOVEAL_ISA {
namespace {

template <Act act, class T, class S = Compute<T>>
void forward_rows(const PoolForward& args, int64_t begin, int64_t end) {
  const int64_t &height = args.shape.height, &width = args.shape.width, &channels = args.shape.channels;
  const int64_t &pooled_height = args.shape.pooled_height, &pooled_width = args.shape.pooled_width;
  const T* input_bias = static_cast<const T*>(args.input_bias);
  Scratch<S> sums(width * channels);
  for (int64_t task = begin; task < end; ++task) {
    const Bin<int64_t> rows = bin_of(task % pooled_height, pooled_height, height);
    const T* x = static_cast<const T*>(args.x) + task / pooled_height * args.x_strides.batch;
    T* out = static_cast<T*>(args.out) + task * pooled_width * channels;
    for (int64_t j = 0; j < width; ++j) {
      for_vectors<S>(channels, [&](int64_t c, int64_t n) {
        const Vector<S> added = input_bias ? load<S>(input_bias + c, n) : Vector<S>{};
        Vector<S> sum = {};
        for (int64_t i = rows.first; i < rows.end; ++i) {
          sum += activate<act, S>(load<S>(x + i * args.x_strides.row + j * args.x_strides.column + c, n) + added);
        }
        store(sums + (j * channels + c), sum, n);
      });
    }
    for (int64_t b = 0; b < pooled_width; ++b) {
      const Bin<int64_t> columns = bin_of(b, pooled_width, width);
      const S cells = S((rows.end - rows.first) * (columns.end - columns.first));
      for_vectors<S>(channels, [&](int64_t c, int64_t n) {
        Vector<S> sum = {};
        for (int64_t j = columns.first; j < columns.end; ++j) sum += load<S>(sums + (j * channels + c), n);
        store(out + b * channels + c, sum / cells, n);
      });
    }
  }
}

template <Act act, class T, class S = Compute<T>>
void backward_rows(const PoolBackward& args, int64_t begin, int64_t end) {
  const int64_t &height = args.shape.height, &width = args.shape.width, &channels = args.shape.channels;
  const int64_t &pooled_height = args.shape.pooled_height, &pooled_width = args.shape.pooled_width;
  Scratch<S> sums(pooled_width * channels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / height, i = task % height;
    const Bin<int64_t> above = bin_of(i, height, pooled_height);
    const T* grad = static_cast<const T*>(args.grad) + image * args.grad_strides.batch;
    const T* x = static_cast<const T*>(args.x) + image * args.x_strides.batch + i * args.x_strides.row;
    T* out = static_cast<T*>(args.grad_x) + task * width * channels;
    for (int64_t b = 0; b < pooled_width; ++b) {
      const Bin<int64_t> columns = bin_of(b, pooled_width, width);
      for_vectors<S>(channels, [&](int64_t c, int64_t n) {
        Vector<S> sum = {};
        for (int64_t a = above.first; a < above.end; ++a) {
          const Bin<int64_t> rows = bin_of(a, pooled_height, height);
          const S cells = S((rows.end - rows.first) * (columns.end - columns.first));
          sum += load<S>(grad + a * args.grad_strides.row + b * args.grad_strides.column + c, n) / cells;
        }
        store(sums + (b * channels + c), sum, n);
      });
    }
    for (int64_t j = 0; j < width; ++j) {
      const Bin<int64_t> beside = bin_of(j, width, pooled_width);
      for_vectors<S>(channels, [&](int64_t c, int64_t n) {
        Vector<S> sum = {};
        for (int64_t b = beside.first; b < beside.end; ++b) sum += load<S>(sums + (b * channels + c), n);
        const Vector<S> cell = load<S>(x + j * args.x_strides.column + c, n);
        store(out + j * channels + c, through_activation<act, S>(sum, activate_with_slope<act, S>(cell).slope), n);
      });
    }
  }
}

}  // namespace

void activate_and_pool_forward(const PoolForward& args) {
  with_type(args.dtype, [&](auto type) {
    with_act(args.act, [&](auto act) {
      parallel_for(args.shape.batch * args.shape.pooled_height, 1, [&](int64_t begin, int64_t end) {
        forward_rows<decltype(act)::value, typename decltype(type)::type>(args, begin, end);
      });
    });
  });
}

void activate_and_pool_backward(const PoolBackward& args) {
  with_type(args.dtype, [&](auto type) {
    with_act(args.act, [&](auto act) {
      parallel_for(args.shape.batch * args.shape.height, 1, [&](int64_t begin, int64_t end) {
        backward_rows<decltype(act)::value, typename decltype(type)::type>(args, begin, end);
      });
    });
  });
}

}  // namespace foveal::FOVEAL_ISA
