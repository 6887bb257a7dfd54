// The gradients of the window's parameters where the band does not serve.
#include "attention_launches.cuh"

namespace foveal::cuda {
namespace {

// A block takes one head, one cell of the window and a part of the tiles of all images.
template <class T, int D>
struct WindowParameterShared {
  alignas(8) float query_embedding[D];
  float sums[warps][D + 2];
};

template <class T, int D>
__global__ void FOVEAL_OCCUPANCY(threads, D <= 64 ? 3 : 2)
window_parameter_gradients(const __grid_constant__ Attention p, const __grid_constant__ WindowParameterGradients a) {
  auto& s = shared_memory<WindowParameterShared<T, D>>();
  const int head = blockIdx.x % p.heads, n = blockIdx.x / p.heads;
  load_embedding<D>(s.query_embedding, p, head);
  __syncthreads();
  const float scale = p.scale[head], bias = p.window_bias.get(int64_t(head) * p.cells() + n);
  float logit_grads = 0, weight_grads = 0;
  Share<D> tokens = {};
  for (int64_t task = blockIdx.y; task < int64_t(p.batch) * p.tiles(); task += gridDim.y) {
    const TilePlace place(p, int(task % p.tiles()) * p.heads + head);
    const int image = int(task / p.tiles());
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const NearCell cell(p, place, r, n), self(p, place, r, p.cells() / 2);
      const Share<D> query = self.of<T, D>(p, p.q, image, head), key = cell.of<T, D>(p, p.k, image, head);
      const float unit = unit_factor<T>(p.normalize, dot<D>(query, query));
      const float weight_grad = dot<D>(self.of<T, D>(p, a.grad, image, head), cell.of<T, D>(p, p.v, image, head));
      const Factors factors = share_factors<T, D>(key, s.query_embedding, p.normalize);
      const Query seen = a.statistics.query(p, image, self.i, self.j, head, scale, unit);
      const float found = logit(dot<D>(query, key), seen.product, seen.embedded, factors, bias);
      const float weight = cell.inside ? seen.template weight<T>(found) : 0.0f;
      logit_grads += weight * (weight_grad - seen.mean.product);
      weight_grads += weight_grad;
#pragma unroll
      for (int c = 0; c < D / 4; ++c) tokens[c] += weight_grad * unit * query[c];
    }
  }
#pragma unroll
  for (int i = 0; i < D / 4; ++i) {
    const float sum = group_sum(tokens[i]);
    if (group() == 0) s.sums[warp()][i / 2 * 8 + 2 * member() + i % 2] = sum;
  }
  logit_grads = group_sum(logit_grads), weight_grads = group_sum(weight_grads);
  if (lane() == 0) s.sums[warp()][D] = logit_grads, s.sums[warp()][D + 1] = weight_grads;
  __syncthreads();
  const ParameterGradients places(p.d, p.cells());
  float* to = a.parameter_parts + (int64_t(head) * gridDim.y + blockIdx.y) * places.count;
  for (int c = threadIdx.x; c < D + 2; c += threads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) sum += s.sums[w][c];
    if (c < p.d) to[places.positional_tokens + int64_t(n) * p.d + c] = sum;
    else if (c == D) to[places.window_bias + n] = sum;
    else if (c == D + 1) to[places.positional_bias + n] = sum;
  }
}

}  // namespace

void launch_window_parameter_gradients(const Device& device, const Tensor& q, dim3 blocks, const Attention& p,
                                       const WindowParameterGradients& a) {
  with_dim(q, [&](auto kernel) {
    using T = typename decltype(kernel)::T;
    constexpr int D = decltype(kernel)::D;
    device.launch(window_parameter_gradients<T, D>, blocks, threads, sizeof(WindowParameterShared<T, D>), p, a);
  });
}

}  // namespace foveal::cuda
