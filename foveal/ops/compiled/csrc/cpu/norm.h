// add_layer_norm: the sum of two maps and its LayerNorm over channels.
#pragma once

#include "common.h"

namespace foveal {

// Rows of `channels`, dense. `sum` may be x itself; without `added` it is null. Everything is of one dtype; parameters are
// null where absent.
struct NormProblem {
  int64_t rows, channels;
  double eps;
  Dtype dtype;
  const void *x, *added, *added_bias, *weight, *bias;
  void *sum, *norm;
};

}  // namespace foveal

FOVEAL_KERNEL(add_layer_norm_forward, NormProblem)
