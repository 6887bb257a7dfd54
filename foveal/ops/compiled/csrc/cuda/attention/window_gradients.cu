// The gradients of the window's keys, values and parameters where the band does not serve: a quad takes a cell.
#include "cuda/attention/launches.cuh"

namespace foveal::cuda {
namespace {

template <class T, int D>
struct PlainKeyShared {
  alignas(8) float query_embedding[D];
};

// Tiles as in forward.
template <class T, int D>
__global__ void FOVEAL_OCCUPANCY(threads, D <= 64 ? 3 : 2)
plain_key_gradients(const __grid_constant__ Attention p, const __grid_constant__ KeyGradients a) {
  auto& s = shared_memory<PlainKeyShared<T, D>>();
  const TilePlace place(p, blockIdx.x);
  const float scale = p.scale[place.head];
  load_embedding<D>(s.query_embedding, p, place.head);
  __syncthreads();
  const int first_image = blockIdx.y * a.images_per_block;
  const int end_image = first_image + a.images_per_block < p.batch ? first_image + a.images_per_block : p.batch;
#pragma unroll 1
  for (int work = 2 * first_image; work < 2 * end_image; ++work) {
    const int image = work / 2, r = work % 2;
    const NearCell self(p, place, r, p.cells() / 2);
    const Share<D> key = self.of<T, D>(p, p.k, image, place.head);
    const Factors factors = share_factors<T, D>(key, s.query_embedding, p.normalize);
    Share<D> key_grad = {}, value_grad = {};
    float embedding_factor = 0;
#pragma unroll 1
    for (int n = 0; n < p.cells(); ++n) {
      const NearCell cell(p, place, r, n, -1);
      const Share<D> query = cell.of<T, D>(p, p.q, image, place.head);
      const float unit = unit_factor<T>(p.normalize, dot<D>(query, query));
      const Query seen = a.statistics.query(p, image, cell.i, cell.j, place.head, scale, unit);
      const float bias = p.window_bias.get(int64_t(place.head) * p.cells() + n);
      const float found = logit(dot<D>(key, query), seen.product, seen.embedded, factors, bias);
      const float weight = cell.inside ? seen.template weight<T>(found) : 0.0f;
      const float positional = positional_weight<D>(
          p, place.head, n, unit, [&](const Share<D>& token) { return dot<D>(query, token); });
      const Share<D> grad = cell.of<T, D>(p, a.grad, image, place.head);
      add_scaled<D>(value_grad, weight + positional, grad);
      // Read again for every cell: a long one finds no place in registers.
      const Share<D> value = self.of<T, D>(p, p.v, D > 64 ? recomputed(image) : image, place.head);
      const float logit_grad = weight * (dot<D>(value, grad) - seen.mean.product) * seen.embedded;
      add_scaled<D>(key_grad, logit_grad * unit, query);
      embedding_factor += logit_grad;
    }
    if (a.wanted & want_k) {
      add_scaled<D>(key_grad, embedding_factor, share_of<D>(s.query_embedding));
      if (p.normalize) unnormalize<D>(key_grad, key, factors.unit);
      if (self.inside) write_share<T, D>(at<T>(a.k, image, self.i, self.j, place.head), p.d, key_grad);
    }
    if (a.wanted & want_v && self.inside) {
      write_share<T, D>(at<T>(a.v, image, self.i, self.j, place.head), p.d, value_grad);
    }
  }
}

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
#pragma unroll 1
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

void launch_plain_key_gradients(const Stream& stream, const Grid& grid, const Attention& p, const KeyGradients& a) {
  with_dim(p, [&](auto kernel) {
    using T = typename decltype(kernel)::T;
    constexpr int D = decltype(kernel)::D;
    stream.launch(plain_key_gradients<T, D>, grid.blocks, threads, sizeof(PlainKeyShared<T, D>), p, a);
  });
}

void launch_window_parameter_gradients(const Stream& stream, dim3 blocks, const Attention& p,
                                       const WindowParameterGradients& a) {
  with_dim(p, [&](auto kernel) {
    using T = typename decltype(kernel)::T;
    constexpr int D = decltype(kernel)::D;
    stream.launch(window_parameter_gradients<T, D>, blocks, threads, sizeof(WindowParameterShared<T, D>), p, a);
  });
}

}  // namespace foveal::cuda
