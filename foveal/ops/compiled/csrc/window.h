// window_scores and window_sum: the sliding window's products over maps (B, H, W, heads, channels).
#pragma once

#include "common.h"

namespace foveal {

// A map in memory: strides in bytes, channels dense.
struct HeadMap {
  char* data;
  int64_t batch, row, column, head;

  FOVEAL_HOST_DEVICE char* at(int64_t b, int64_t i, int64_t j, int64_t h) const {
    return data + b * batch + i * row + j * column + h * head;
  }
};

// The rows of all images, one below the other, cut into equal parts; every head of a part is a task of its own.
struct RowParts {
  int64_t batch, height, heads, parts;

  FOVEAL_HOST_DEVICE int64_t first_row(int64_t part) const { return batch * height * part / parts; }
};

// A: the type computed in, float for float and bfloat16 maps. One operand and the result have d channels or are the
// other operand's like; weights have a channel for each of the window's cells, row-major.
template <class A>
struct WindowProblem {
  int64_t width, d, window_size;
  bool bfloat16_maps;
  RowParts rows;
  HeadMap left, right, out;
  A outside;  // window_dot: the product with a cell outside the map
};

// How many of the 2 * radius + 1 cells around `position` lie on a side of this length.
FOVEAL_HOST_DEVICE int64_t cells_inside(int64_t position, int64_t side, int64_t radius) {
  const int64_t first = position < radius ? 0 : position - radius;
  const int64_t last = position + radius < side ? position + radius : side - 1;
  return last - first + 1;
}

}  // namespace foveal

// out[cell] = left . right[cell];  out = sum of left[cell] * right[cell];  and the sum in which every right goes back
// to the cells it was weighted for: out[cell] = sum of left[cell] * right over the windows that hold the cell.
FOVEAL_KERNEL(window_dot, WindowProblem<float>)
FOVEAL_KERNEL(window_dot, WindowProblem<double>)
FOVEAL_KERNEL(window_weigh, WindowProblem<float>)
FOVEAL_KERNEL(window_weigh, WindowProblem<double>)
FOVEAL_KERNEL(window_collect, WindowProblem<float>)
FOVEAL_KERNEL(window_collect, WindowProblem<double>)
