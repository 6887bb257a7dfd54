#include "cuda/attention/query_gradients.cuh"

namespace foveal::cuda {

void launch_plain_query_gradients(const Stream& stream, dim3 blocks, const Attention& p, const QueryGradients& a) {
  with_dim(p, [&](auto kernel) { launch(kernel, stream, blocks, p, a); });
}

}  // namespace foveal::cuda
