// A map of tokens in memory.
#pragma once

#include "common.h"

namespace foveal {

// Strides of (B, H, W, channels) in elements; channels are dense.
struct MapStrides {
  int64_t batch, row, column;
};

}  // namespace foveal
