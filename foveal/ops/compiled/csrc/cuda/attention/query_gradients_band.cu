// In two files, because they take the longest to compile.
#include "cuda/attention/query_gradients.cuh"

namespace foveal::cuda {

void launch_query_gradients(const Stream& stream, dim3 blocks, const Attention& p, const QueryGradients& a) {
  if (!served_by_band(p, backward_band)) return launch_plain_query_gradients(stream, blocks, p, a);
  with_band<backward_band>(p, [&](auto kernel) { launch(kernel, stream, blocks, p, a); });
}

}  // namespace foveal::cuda
