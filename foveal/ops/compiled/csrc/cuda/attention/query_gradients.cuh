// The gradients that a query collects over its keys, and those of the parameters: blocks and tiles as in forward.
#pragma once

#include "cuda/attention/launches.cuh"

namespace foveal::cuda {

template <class T, int D>
struct QueryGradientsBand {
  Rows<T, D, halo_rows> keys, values;
  Factors factors[halo_rows];
  Tokens<T, D> tokens;
  float window_bias[9];
  struct {
    float products[16 * near_stride];  // of queries and keys, then of upstream and values
    WarpMatrix<T, padded_near_cells> logit_grads;
    WarpMatrix<T, 16> weight_grads;  // by number of the cell
  } warps[cuda::warps];
};

template <class T, int D, bool banded>
struct QueryGradientsShared {
  using Pool = Pooled<T, D, std::min(pooled_keys<T, D>, D > 32 ? 32 : 64)>;  // whose gradients are in registers
  Rows<T, D, tile_cells> queries, upstream;
  Pool pooled;
  alignas(8) float query_embedding[D];
  // What is found for the parameters over all images, by warps and by lanes.
  float embedding_grads[warps][D];
  alignas(16) float token_grads[banded ? D / 8 : 1][threads][4];  // of 16 rows, 9 of which are cells
  float window_grads[banded ? band_slots : 1][2][threads];  // of the window's and of the positional bias
  union {
    alignas(16) float bias[Pool::tiles][threads][4];  // every lane's own
    float parts[warps][1 + D + (banded ? 9 * (D + 2) : 0)];
  };
  std::conditional_t<banded, QueryGradientsBand<T, D>, NoBand> band;
};

// Writes what a warp has found for the parameters, in the order of ParameterGradients; `scale_grad` is the lane's part.
template <class T, int D, bool banded>
__device__ __forceinline__ void put_parameter_grads(float* to, const QueryGradientsShared<T, D, banded>& s, int d,
                                                    float scale_grad) {
  const ParameterGradients places(d, banded ? 9 : 0);
  const float scale = group_sum(quad_sum(scale_grad));
  if (lane() == 0) to[places.scale] = scale;
  for (int c = lane(); c < d; c += 32) to[places.query_embedding + c] = s.embedding_grads[warp()][c];
  if constexpr (banded) {
#pragma unroll
    for (int slot = 0; slot < band_slots; ++slot) {
      const int n = member() + 4 * slot;
      const float window_bias = group_sum(s.window_grads[slot][0][threadIdx.x]);
      const float positional_bias = group_sum(s.window_grads[slot][1][threadIdx.x]);
      if (group() > 0 || n >= 9) continue;
      to[places.window_bias + n] = window_bias;
      to[places.positional_bias + n] = positional_bias;
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      const int n = group() + i % 4 / 2 * 8, c = i / 4 * 8 + 2 * member() + i % 2;
      if (n < 9 && c < d) to[places.positional_tokens + n * d + c] = s.token_grads[i / 4][threadIdx.x][i % 4];
    }
  }
}

// One image's queries of a warp.
template <class T, int D, bool banded>
struct QueryWork {
  using Pool = typename QueryGradientsShared<T, D, banded>::Pool;

  const Attention& p;
  const QueryGradients& a;
  QueryGradientsShared<T, D, banded>& s;
  const TilePlace& place;
  const QueryScale& scale;
  const LeftRows<T, D> queries, upstream;
  int image;
  float lse[2];
  float total[2] = {}, products[2] = {};  // the lane's part of the sums of w and of w dw, before the means are known
  Mean means[2];
  float keys[D / 8][4] = {};  // the sum of ds k^

  __device__ __forceinline__ bool wants(int64_t gradients) const { return a.wanted & gradients; }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int r = 0; r < 2; ++r) lse[r] = a.statistics.lse_of(p, image, place.row + r, place.column, place.head);
  }

  __device__ __forceinline__ float weight(float logit, int r) const { return weight_of<T>(logit, lse[r]); }

  __device__ __forceinline__ void add_to_means(int r, float weight, float weight_grad) {
    total[r] += weight;
    products[r] += weight * weight_grad;
  }

  __device__ __forceinline__ void find_means(int r) {
    const float sum = quad_sum(total[r]), product = quad_sum(products[r]);
    means[r] = sum == 0 ? Mean{} : Mean{1.0f / sum, product / sum};  // 0 off the map
    if (member() != 0 || !p.inside(place.row + r, place.column)) return;
    a.statistics.means[QueryStatistics::place(p, image, place.row + r, place.column, place.head)] = means[r];
  }

  __device__ __forceinline__ float logit_grad(int r, float weight, float weight_grad) const {
    return weight * means[r].share * (weight_grad - means[r].product);
  }

  __device__ __forceinline__ void band_window(const BandPlace<1>& band_place) {
    auto& band = s.band;
    auto& own = band.warps[warp()];
    const int first = 2 * halo * warp();
    __syncwarp();
    put_products<near_stride, T, D>(own.products, queries, band.keys[first], near_cells / 8);
    if (wants(want_positional_tokens)) {  // whose gradient multiplies q^, which takes the place of q
      float units[D / 8][4];
#pragma unroll
      for (int i = 0; i < D / 2; ++i) {
        const float2 x = queries.pair(i % 4 / 2, i / 4);
        units[i / 4][i % 4] = (i % 2 ? x.y : x.x) * scale.unit[i % 4 / 2];
      }
      put_rows<T, D>(s.queries[16 * warp()], units);
    }
    float weights[2][band_slots] = {};
    __syncwarp();
#pragma unroll
    for (int n = 0; n < 2 * band_slots; ++n) {
      const int r = n / band_slots, slot = n % band_slots, cell = band_place.cell(r, slot);
      if (!band_place.holds(r, slot)) continue;
      const float product = own.products[(group() + 8 * r) * near_stride + cell];
      const float found = logit(product, scale.product(r), scale.embedded[r], band.factors[first + cell],
                                band.window_bias[band_place.number(slot)]);
      weights[r][slot] = weight(found, r);
    }
    __syncwarp();
    put_products<near_stride, T, D>(own.products, upstream, band.values[first], near_cells / 8);
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float weight_grads[band_slots];
#pragma unroll
      for (int slot = 0; slot < band_slots; ++slot) {
        const float* product = own.products + (group() + 8 * r) * near_stride + band_place.cell(r, slot);
        weight_grads[slot] = band_place.holds(r, slot) ? *product : 0.0f;
        add_to_means(r, weights[r][slot], weight_grads[slot]);
      }
      find_means(r);
#pragma unroll
      for (int slot = 0; slot < band_slots; ++slot) {
        const int n = band_place.number(slot), cell = band_place.cell(r, slot);
        const float grad = logit_grad(r, weights[r][slot], weight_grads[slot]);
        s.window_grads[slot][0][threadIdx.x] += grad;
        s.window_grads[slot][1][threadIdx.x] += weight_grads[slot];
        if (n < 9) own.weight_grads.put(r, n, weight_grads[slot]);
        if (!band_place.holds(r, slot)) continue;
        own.logit_grads.put(r, cell, grad * operand_unit<T>(band.factors[first + cell].unit));
      }
    }
    __syncwarp();
    weigh_band<T, D>(keys, own.logit_grads, band.keys[first]);
    if (wants(want_positional_tokens)) {
      float grads[D / 8][4];
#pragma unroll
      for (int i = 0; i < D / 2; ++i) grads[i / 4][i % 4] = s.token_grads[i / 4][threadIdx.x][i % 4];
      const auto by_cell = Weights<T>::load_transposed(own.weight_grads.values, own.weight_grads.stride);
      weigh<T, D>(grads, by_cell, s.queries[16 * warp()]);
#pragma unroll
      for (int i = 0; i < D / 2; ++i) s.token_grads[i / 4][threadIdx.x][i % 4] = grads[i / 4][i % 4];
    }
  }

  __device__ __forceinline__ void plain_window() {
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      const float query_embedded = picked(scale.embedded, r), query_product = query_embedded * picked(scale.unit, r);
      const float query_lse = picked(lse, r);
      float sum = 0, product_sum = 0;
      Mean mean{};
#pragma unroll 1
      for (int means_known = 0; means_known < 2; ++means_known) {
#pragma unroll 1
        for (int n = 0; n < p.cells(); ++n) {
          const NearCell cell(p, place, r, n);
          const float weight_grad = dot<T, D>(upstream, r, cell.of<T, D>(p, p.v, image, place.head));
          const Share<D> key = cell.of<T, D>(p, p.k, image, place.head);
          const Factors factors = share_factors<T, D>(key, s.query_embedding, p.normalize);
          const float bias = p.window_bias.get(int64_t(place.head) * p.cells() + n);
          const float found = logit(dot<T, D>(queries, r, key), query_product, query_embedded, factors, bias);
          const float weight = cell.inside ? weight_of<T>(found, query_lse) : 0.0f;
          sum += weight;
          product_sum += weight * weight_grad;
          const float grad = weight * mean.share * (weight_grad - mean.product);
          if (means_known) add_scaled<D>(keys, r, grad * factors.unit, key);
        }
        if (means_known) continue;
        with_row(r, [&](int row) {
          if (member() == 0) total[row] += sum, products[row] += product_sum;
          find_means(row);
          mean = means[row];
        });
      }
    }
  }

  // A tile of the pooled keys: the weights before the means, and the weights' gradients.
  __device__ __forceinline__ void pooled_tile(int tile, float (&weights)[4], float (&weight_grads)[4]) {
    pooled_logits(weights, queries, scale, s.pooled, tile, load<4>(s.bias[tile][threadIdx.x]));
    multiply<T, D>(weight_grads, upstream, s.pooled.values[8 * tile]);
#pragma unroll
    for (int n = 0; n < 4; ++n) weights[n] = weight(weights[n], n / 2);
  }

  __device__ __forceinline__ void pooled_means(int first) {
#pragma unroll 1
    for (int tile = 0; tile < Pool::tiles; ++tile) {
      if (first + 8 * tile >= p.keys()) continue;
      float weights[4], weight_grads[4] = {};
      pooled_tile(tile, weights, weight_grads);
#pragma unroll
      for (int n = 0; n < 4; ++n) add_to_means(n / 2, weights[n], weight_grads[n]);
    }
  }

  __device__ __forceinline__ void pooled_chunk(int first, float (&bias_grads)[Pool::tiles][4]) {
#pragma unroll
    for (int tile = 0; tile < Pool::tiles; tile += 2) {
      if (first + 8 * tile >= p.keys()) continue;
      float grads[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float weights[4], weight_grads[4] = {};
        pooled_tile(tile + half, weights, weight_grads);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float unit = s.pooled.factors[8 * (tile + half) + 2 * member() + n % 2].unit;
          const float grad = logit_grad(n / 2, weights[n], weight_grads[n]);
          bias_grads[tile + half][n] += grad;
          grads[half][n] = grad * operand_unit<T>(unit);
        }
      }
      weigh<T, D>(keys, Weights<T>::of(grads[0], grads[1]), s.pooled.keys[8 * tile]);
    }
  }

  // The positional path: what the gradients of the window's weights give the query.
  __device__ __forceinline__ void add_tokens() {
    if constexpr (banded) {
      auto& grads = s.band.warps[warp()].weight_grads;
      weigh<T, D>(keys, Weights<T>::load(grads.values, grads.stride), s.band.tokens.high.values);
      weigh<T, D>(keys, Weights<T>::load(grads.values, grads.stride), s.band.tokens.low.values);
    } else {
#pragma unroll 1
      for (int r = 0; r < 2; ++r) {
#pragma unroll 1
        for (int n = 0; n < p.cells(); ++n) {
          const NearCell cell(p, place, r, n);
          const float weight_grad = dot<T, D>(upstream, r, cell.of<T, D>(p, p.v, image, place.head));
          add_scaled<D>(keys, r, weight_grad, token_share<D>(p, place.head, n));
        }
      }
    }
  }

  // From the gradient of the scaled query to that of its scale, of its embedding and of the query itself.
  __device__ __forceinline__ void finish(float& scale_grad) {
#pragma unroll
    for (int m = 0; m < D / 8; ++m) {
      const Floats<2> embedding = load<2>(s.query_embedding + 8 * m + 2 * member());
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float embedding_grad = 0;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& grad = keys[m][2 * r + i];
          const float2 x = queries.pair(r, m);
          scale_grad += ((i ? x.y : x.x) * scale.unit[r] + embedding[i]) * grad * scale.length[r];
          grad *= scale.embedded[r];
          embedding_grad += grad;
        }
        embedding_grad = group_sum(embedding_grad);
        if (group() == 0) s.embedding_grads[warp()][8 * m + 2 * member() + i] += embedding_grad;
      }
    }
    if (!wants(want_q)) return;
    if (p.positional_tokens) add_tokens();
    if (p.normalize) {
      unnormalize<T, D>(keys, queries, 0, scale.unit[0]);
      unnormalize<T, D>(keys, queries, 1, scale.unit[1]);
    }
    write_rows<T, D>(s.upstream[16 * warp()], keys, p, a.q, image, place);
  }
};

template <class T, int D, bool banded>
__global__ void FOVEAL_OCCUPANCY(threads, (std::is_same_v<T, float16> ? 2 : backward_occupancy<D>))
query_gradients(const __grid_constant__ Attention p, const __grid_constant__ QueryGradients a) {
  using Pool = typename QueryGradientsShared<T, D, banded>::Pool;
  auto& s = shared_memory<QueryGradientsShared<T, D, banded>>();
  static_assert(sizeof s <= most_shared);
  const TilePlace place(p, a.first_tile * p.heads + blockIdx.x);
  const bool busy = place.row < p.height;  // the warp
  const bool pooled = a.wanted & (want_q | want_scale | want_query_embedding | want_pool_bias);

  load_embedding<D>(s.query_embedding, p, place.head);
  const BandPlace<1> band_place(p, place);
  if constexpr (banded) {
    s.band.tokens.load(p, place.head);
    s.band.warps[warp()].logit_grads.clear();
    s.band.warps[warp()].weight_grads.clear();
    if (threadIdx.x < 9) {
      s.band.window_bias[threadIdx.x] = p.window_bias.get(place.head * 9 + threadIdx.x);
    }
  }
  QueryScale scale;
  scale.set_lengths(p, place);
  float bias_grads[Pool::tiles][4] = {};
  const auto keep_bias = [&](int tile, const Floats<4>& found) { store(s.bias[tile][threadIdx.x], found); };
  float scale_grad = 0;
  for (int c = lane(); c < D; c += 32) s.embedding_grads[warp()][c] = 0;
  for (auto& grads : s.token_grads) store(grads[threadIdx.x], Floats<4>{});
  for (auto& grads : s.window_grads) grads[0][threadIdx.x] = grads[1][threadIdx.x] = 0;

  // Writes the sums over images of a chunk, or adds to what was written for the images before.
  const auto put_bias_grads = [&](int first, bool add) {
    const int64_t block = (int64_t(place.head) * gridDim.y + blockIdx.y) * a.tiles + blockIdx.x / p.heads;
#pragma unroll
    for (int n = 0; n < 4 * Pool::tiles; ++n) {
      const int key = first + n / 4 * 8 + 2 * member() + n % 2;
      if (key >= p.keys()) continue;
      float& to = a.table_sums[(block * p.keys() + key) * tile_cells + 16 * warp() + n % 4 / 2 * 8 + group()];
      to = (add ? to : 0.0f) + bias_grads[n / 4][n % 4];
      bias_grads[n / 4][n % 4] = 0;
    }
  };

  const int first_image = blockIdx.y * a.images_per_block;
  const int end_image = first_image + a.images_per_block < p.batch ? first_image + a.images_per_block : p.batch;
  for (int image = first_image; image < end_image; ++image) {
    __syncthreads();
    start_tile<T, D>(s.queries, p, p.q, image, place);
    start_tile<T, D>(s.upstream, p, a.grad, image, place);
    s.pooled.start(p, image, place.head, 0);
    if constexpr (banded) start_windows<T, D>(s.band, p, image, place);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    s.pooled.find_factors(p, s.query_embedding);
    if constexpr (banded) find_factors<T, D>(s.band, p, s.query_embedding);
    __syncthreads();

    QueryWork<T, D, banded> work{p, a, s, place, scale, LeftRows<T, D>(s.queries[16 * warp()]),
                                 LeftRows<T, D>(s.upstream[16 * warp()]), image};
    scale.set_units(work.queries, p.normalize);
    work.start();
    const bool in_one_chunk = p.keys() <= Pool::size;
    // The keys of every chunk, and their bias: that of a single chunk stays for all images.
    const auto for_chunks = [&](bool again, const auto& visit) {
      for (int first = 0; first < p.keys(); first += Pool::size) {
        if (first > 0 || (again && !in_one_chunk)) s.pooled.replace(p, image, place.head, first, s.query_embedding);
        if (!busy) continue;
        if (!in_one_chunk || (image == first_image && !again)) for_bias<Pool::tiles>(p, place, first, keep_bias);
        visit(first);
      }
    };
    for_chunks(false, [&](int first) { work.pooled_means(first); });
    if (busy) {
      if constexpr (banded) work.band_window(band_place);
      else work.plain_window();
    }
    if (!pooled) continue;
    for_chunks(true, [&](int first) {
      work.pooled_chunk(first, bias_grads);
      const bool summed = !in_one_chunk || image + 1 == end_image;
      if (a.table_sums && summed) put_bias_grads(first, !in_one_chunk && image > first_image);
    });
    if (busy) work.finish(scale_grad);
  }

  if (!a.parameter_parts) return;
  constexpr int cells = banded ? 9 : 0;
  const ParameterGradients places(p.d, cells);
  __syncthreads();  // the parts lie where the bias did
  put_parameter_grads<T, D, banded>(s.parts[warp()], s, p.d, scale_grad);
  __syncthreads();
  const int64_t part = (int64_t(place.head) * p.tiles() + a.first_tile + blockIdx.x / p.heads) * gridDim.y + blockIdx.y;
  for (int n = threadIdx.x; n < places.count; n += threads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) sum += s.parts[w][n];
    a.parameter_parts[part * places.count + n] = sum;
  }
}

template <class Kernel>
void launch(Kernel, const Stream& stream, dim3 blocks, const Attention& p, const QueryGradients& a) {
  using T = typename Kernel::T;
  stream.launch(query_gradients<T, Kernel::D, Kernel::banded>, blocks, threads,
                sizeof(QueryGradientsShared<T, Kernel::D, Kernel::banded>), p, a);
}

}  // namespace foveal::cuda
