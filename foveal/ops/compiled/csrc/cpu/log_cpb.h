// log_cpb_table: an MLP, 2 -> hidden -> heads with ReLU, on every pair of a row and a column coordinate.
#pragma once

#include "common.h"

namespace foveal {

// All of one compute type. Weights of the first layer lie apart: for a hidden unit u, its weight of the row, of the
// column, and its bias. The second layer's weight is (heads, hidden).
struct LogCpbForward {
  int64_t rows, columns, hidden, heads;
  Dtype dtype;
  const void *row, *column, *row_weight, *column_weight, *bias1, *weight2, *bias2;
  void* table;  // (heads, rows, columns)
};

struct LogCpbBackward {
  int64_t rows, columns, hidden, heads;
  Dtype dtype;
  const void *row, *column, *row_weight, *column_weight, *bias1, *weight2, *grad;
  void *grad_row_weight, *grad_column_weight, *grad_bias1, *grad_weight2;
};

}  // namespace foveal

FOVEAL_KERNEL(log_cpb_forward, LogCpbForward)
FOVEAL_KERNEL(log_cpb_backward, LogCpbBackward)
