// The gradients of the window's keys and values, by the band: tiles of cells as in forward, each of which collects from
// the queries whose windows hold it.
#include "cuda/attention/launches.cuh"

namespace foveal::cuda {
namespace {

template <class T, int D>
struct KeyGradientsBand {
  Rows<T, D, halo_rows> queries, upstream;
  Query statistics[halo_rows];
  Tokens<T, D> tokens;
  float window_bias[9], positional_bias[9];
  alignas(8) float token_products[halo_rows * token_stride];
  struct {
    float key_products[16 * near_stride], value_products[16 * near_stride];
    WarpMatrix<T, padded_near_cells> logit_grads, weights;
  } warps[cuda::warps];
};

template <class T, int D>
struct KeyGradientsShared {
  Rows<T, D, tile_cells> keys, values;
  Factors factors[tile_cells];
  alignas(8) float query_embedding[D];
  KeyGradientsBand<T, D> band;
};

// One image's keys and values of a warp.
template <class T, int D>
struct KeyWork {
  const Attention& p;
  const KeyGradients& a;
  KeyGradientsShared<T, D>& s;
  const TilePlace& place;
  const LeftRows<T, D> keys, values;
  int image;
  float key_grads[D / 8][4] = {}, value_grads[D / 8][4] = {};
  float embedding_factors[2] = {};  // of the query embedding in the keys' gradients

  __device__ __forceinline__ bool wants(int64_t gradients) const { return a.wanted & gradients; }

  __device__ __forceinline__ const Factors& factors(int r) const { return s.factors[16 * warp() + group() + 8 * r]; }

  __device__ __forceinline__ void band_window(const BandPlace<-1>& band_place) {
    auto& band = s.band;
    auto& own = band.warps[warp()];
    const int first = 2 * halo * warp();
    put_products<near_stride, T, D>(own.key_products, keys, band.queries[first], near_cells / 8);
    if (wants(want_k)) {
      put_products<near_stride, T, D>(own.value_products, values, band.upstream[first], near_cells / 8);
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = (group() + 8 * r) * near_stride;
#pragma unroll
      for (int slot = 0; slot < band_slots; ++slot) {
        if (!band_place.holds(r, slot)) continue;
        const int n = band_place.number(slot), cell = band_place.cell(r, slot);
        const Query& query = band.statistics[first + cell];
        const float found =
            logit(own.key_products[row + cell], query.product, query.embedded, factors(r), band.window_bias[n]);
        const float weight = query.template weight<T>(found);
        if (wants(want_k)) {
          const float grad = weight * (own.value_products[row + cell] - query.mean.product) * query.embedded;
          own.logit_grads.put(r, cell, grad * operand_unit<T>(query.unit));
          embedding_factors[r] += grad;
        }
        if (wants(want_v)) {
          const float token = band.token_products[(first + cell) * token_stride + n];
          own.weights.put(r, cell, weight + (token * query.unit + band.positional_bias[n]));
        }
      }
      embedding_factors[r] = quad_sum(embedding_factors[r]);
    }
    __syncwarp();
    if (wants(want_k)) weigh_band<T, D>(key_grads, own.logit_grads, band.queries[first]);
    if (wants(want_v)) weigh_band<T, D>(value_grads, own.weights, band.upstream[first]);
  }

  __device__ __forceinline__ void finish() {
    if (wants(want_k)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        add_vector<D>(key_grads, r, embedding_factors[r], s.query_embedding);
        if (p.normalize) unnormalize<T, D>(key_grads, keys, r, factors(r).unit);
      }
      write_rows<T, D>(s.keys[16 * warp()], key_grads, p, a.k, image, place);
    }
    if (wants(want_v)) write_rows<T, D>(s.values[16 * warp()], value_grads, p, a.v, image, place);
  }
};

template <class T, int D>
__global__ void FOVEAL_OCCUPANCY(threads, backward_occupancy<D>)
key_gradients(const __grid_constant__ Attention p, const __grid_constant__ KeyGradients a) {
  auto& s = shared_memory<KeyGradientsShared<T, D>>();
  static_assert(sizeof s <= most_shared);
  const TilePlace place(p, blockIdx.x);
  const BandPlace<-1> band_place(p, place);
  load_embedding<D>(s.query_embedding, p, place.head);
  // The halo's query that the thread keeps statistics of.
  const int i = place.top - 1 + int(threadIdx.x) / halo, j = place.left - 1 + int(threadIdx.x) % halo;
  const float scale = p.scale[place.head];
  s.band.tokens.load(p, place.head);
  s.band.warps[warp()].logit_grads.clear();
  s.band.warps[warp()].weights.clear();
  if (threadIdx.x < 9) {
    s.band.window_bias[threadIdx.x] = p.window_bias.get(place.head * 9 + threadIdx.x);
    s.band.positional_bias[threadIdx.x] = p.positional_bias.get(place.head * 9 + threadIdx.x);
  }

  const int first_image = blockIdx.y * a.images_per_block;
  for (int image = first_image; image < p.batch && image < first_image + a.images_per_block; ++image) {
    __syncthreads();
    start_tile<T, D>(s.keys, p, p.k, image, place);
    start_tile<T, D>(s.values, p, p.v, image, place);
    start_halo<T, D>(s.band.queries, p, p.q, image, place);
    start_halo<T, D>(s.band.upstream, p, a.grad, image, place);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    for (int n = threadIdx.x; n < tile_cells; n += threads) {
      s.factors[n] = row_factors<T, D>(s.keys[n], s.query_embedding, p.normalize);
    }
    if (threadIdx.x < halo * halo) {
      const float unit = row_factors<T, D>(s.band.queries[threadIdx.x], s.query_embedding, p.normalize).unit;
      s.band.statistics[threadIdx.x] = a.statistics.query(p, image, i, j, place.head, scale, unit);
    }
    for (int row = 16 * warp(); row < halo_rows && a.wanted & want_v; row += 16 * warps) {
      const LeftRows<T, D> queries(s.band.queries[row]);
      s.band.tokens.template put_products<token_stride>(s.band.token_products + row * token_stride, queries);
    }
    __syncthreads();
    if (place.row >= p.height) continue;
    const LeftRows<T, D> keys(s.keys[16 * warp()]), values(s.values[16 * warp()]);
    KeyWork<T, D> work{p, a, s, place, keys, values, image};
    work.band_window(band_place);
    work.finish();
  }
}

}  // namespace

void launch_key_gradients(const Stream& stream, const Grid& grid, const Attention& p, const KeyGradients& a) {
  if (!served_by_band(p, backward_band)) return launch_plain_key_gradients(stream, grid, p, a);
  with_band<backward_band>(p, [&](auto kernel) {
    using T = typename decltype(kernel)::T;
    constexpr int D = decltype(kernel)::D;
    stream.launch(key_gradients<T, D>, grid.blocks, threads, sizeof(KeyGradientsShared<T, D>), p, a);
  });
}

}  // namespace foveal::cuda
