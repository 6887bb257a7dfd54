// aggregated_attention, forward: an online softmax over chunks of pooled keys, which the window joins at the end.
//
// Counted, not measured, for stage 1 of transnext_tiny at 224 (56 x 56 cells, 7 x 7 pooled, d = 24) in bfloat16: an image
// moves 1.8 MB at least, 0.42 us of an H200's 4.3 TB/s. The halo and the pooled rows make it 1.7 times that between L2
// and the multiprocessors. Of 28 million multiply-adds a fifth is the window's; on ordinary cores, with the conversions
// that they need, it would take 600 instructions of a warp, by the band about 200. All in all a warp issues about 1000
// for its 16 queries: 0.65 us an image if none ever waited, so instructions bound the kernel, not memory. Hence what
// depends on the tile alone (bias, tokens, indices) is found once for several images, and a multiprocessor is to hold
// 4 blocks (128 registers, 44 KB), of which some compute while others wait for their copies.
#include "cuda/attention/launches.cuh"

namespace foveal::cuda {
namespace {

template <class T, int D>
struct ForwardBand {
  Rows<T, D, halo_rows> keys, values;
  Factors factors[halo_rows];
  Tokens<T, D> tokens;
  float window_bias[9], positional_bias[9];
  struct {
    float products[16 * product_stride];  // with the near keys, then with the tokens
    WarpMatrix<T, padded_near_cells> weights;
  } warps[cuda::warps];
};

template <class T, int D, bool banded>
struct ForwardShared {
  Rows<T, D, tile_cells> queries;
  Pooled<T, D> pooled;
  alignas(8) float query_embedding[D];
  std::conditional_t<banded, ForwardBand<T, D>, NoBand> band;
};

// The softmax of the lane's two queries so far: the largest logit, the lane's part of the sum of weights, the values.
template <int D>
struct Softmax {
  float largest[2] = {lowest, lowest}, total[2] = {};
  float values[D / 8][4] = {};

  // Finite, so that a logit of -inf weighs nothing beside it, and a power of two, so that it weighs 1 beside itself.
  static constexpr float lowest = -0x1p100f;

  // Before weights of logits up to these are added.
  template <class T>
  __device__ __forceinline__ void raise(int r, float largest_in_lane) {
    const float before = largest[r];
    largest[r] = fmaxf(before, quad_max(largest_in_lane));
    scale(r, weight_of<T>(before, largest[r]));
  }

  __device__ __forceinline__ void scale(int r, float factor) {
    total[r] *= factor;
#pragma unroll
    for (int m = 0; m < D / 8; ++m) values[m][2 * r] *= factor, values[m][2 * r + 1] *= factor;
  }

  // With the sum of all weights in `total`, the values become their mean. Returns 1 / sum.
  template <class T>
  __device__ __forceinline__ float finish(int r) {
    const float sum = quad_sum(total[r]), share = is_float<T> ? 1.0f / sum : divide(1.0f, sum);
    scale(r, share);
    total[r] = sum;
    return share;
  }

  // A single weight and value, the same logit in all lanes of the quad.
  template <class T>
  __device__ __forceinline__ void add(int r, float logit, const Share<D>& value) {
    const float before = largest[r];
    largest[r] = fmaxf(before, logit);
    scale(r, weight_of<T>(before, largest[r]));
    const float weight = weight_of<T>(logit, largest[r]);
    if (member() == 0) total[r] += weight;
#pragma unroll
    for (int i = 0; i < D / 4; ++i) values[i / 2][2 * r + i % 2] += weight * value[i];
  }
};

template <class T, int D>
__device__ __forceinline__ void add_pooled(Softmax<D>& softmax, const Attention& p, const LeftRows<T, D>& queries,
                                           const QueryScale& scale, Pooled<T, D>& pooled, int first,
                                           const Floats<4> (&bias)[Pooled<T, D>::tiles]) {
  constexpr int tiles = Pooled<T, D>::tiles;
  constexpr int at_once = tiles < 4 ? tiles : 4;  // more would not leave registers for four blocks
#pragma unroll
  for (int begin = 0; begin < tiles; begin += at_once) {
    if (first + 8 * begin >= p.keys()) continue;
    float weights[at_once][4], largest[2] = {softmax.lowest, softmax.lowest};
#pragma unroll
    for (int tile = 0; tile < at_once; ++tile) {
      if (first + 8 * (begin + tile) < p.keys()) {
        pooled_logits(weights[tile], queries, scale, pooled, begin + tile, bias[begin + tile]);
      } else {
#pragma unroll
        for (int n = 0; n < 4; ++n) weights[tile][n] = -infinity;
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) largest[n / 2] = fmaxf(largest[n / 2], weights[tile][n]);
    }
    softmax.template raise<T>(0, largest[0]);
    softmax.template raise<T>(1, largest[1]);
#pragma unroll
    for (int tile = 0; tile < at_once; tile += 2) {
      if (first + 8 * (begin + tile) >= p.keys()) continue;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float& weight = weights[tile + n / 4][n % 4];
        weight = weight_of<T>(weight, softmax.largest[n % 4 / 2]);
        softmax.total[n % 4 / 2] += weight;
      }
      weigh<T, D>(softmax.values, Weights<T>::of(weights[tile], weights[tile + 1]), pooled.values[8 * (begin + tile)]);
    }
  }
}

// The window by the band.
template <class T, int D>
__device__ __forceinline__ void add_band(Softmax<D>& softmax, const LeftRows<T, D>& queries,
                                         const QueryScale& scale, ForwardBand<T, D>& band, const BandPlace<1>& place) {
  const int first = 2 * halo * warp();
  auto& own = band.warps[warp()];
  __syncwarp();
  put_products<product_stride, T, D>(own.products, queries, band.keys[first], near_cells / 8);
  band.tokens.template put_products<product_stride>(own.products + near_cells, queries);
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float logits[band_slots], largest = softmax.lowest;
#pragma unroll
    for (int slot = 0; slot < band_slots; ++slot) {
      const int cell = place.cell(r, slot);
      logits[slot] = -infinity;
      if (place.holds(r, slot)) {
        const float product = own.products[(group() + 8 * r) * product_stride + cell];
        logits[slot] = logit(product, scale.product(r), scale.embedded[r], band.factors[first + cell],
                                band.window_bias[place.number(slot)]);
      }
      largest = fmaxf(largest, logits[slot]);
    }
    softmax.template raise<T>(r, largest);
#pragma unroll
    for (int slot = 0; slot < band_slots; ++slot) {
      logits[slot] = weight_of<T>(logits[slot], softmax.largest[r]);
      softmax.total[r] += logits[slot];
    }
    const float share = softmax.template finish<T>(r);
#pragma unroll
    for (int slot = 0; slot < band_slots; ++slot) {
      if (!place.holds(r, slot)) continue;
      const float token = own.products[(group() + 8 * r) * product_stride + near_cells + place.number(slot)];
      const float weight = logits[slot] * share + (token * scale.unit[r] + band.positional_bias[place.number(slot)]);
      own.weights.put(r, place.cell(r, slot), weight);
    }
  }
  __syncwarp();
  weigh_band<T, D>(softmax.values, own.weights, band.values[first]);
}

// The same without, for a window of any size: a cell after the other.
template <class T, int D>
__device__ __forceinline__ void add_plain(Softmax<D>& softmax, const Attention& p, int image,
                                          const LeftRows<T, D>& queries, const QueryScale& scale,
                                          const TilePlace& place, const float* query_embedding) {
#pragma unroll 1
  for (int r = 0; r < 2; ++r) {
    const float query_embedded = picked(scale.embedded, r), unit = picked(scale.unit, r);
#pragma unroll 1
    for (int n = 0; n < p.cells(); ++n) {
      const NearCell cell(p, place, r, n);
      const Share<D> key = cell.of<T, D>(p, p.k, image, place.head);
      const Factors factors = share_factors<T, D>(key, query_embedding, p.normalize);
      const float bias = p.window_bias.get(int64_t(place.head) * p.cells() + n), product = dot<T, D>(queries, r, key);
      const float found = cell.inside ? logit(product, query_embedded * unit, query_embedded, factors, bias) : -infinity;
      const Share<D> value = cell.of<T, D>(p, p.v, image, place.head);
      with_row(r, [&](int row) { softmax.template add<T>(row, found, value); });
    }
    with_row(r, [&](int row) { softmax.template finish<T>(row); });
    if (!p.positional_tokens && !p.positional_bias) continue;
#pragma unroll 1
    for (int n = 0; n < p.cells(); ++n) {
      const float positional = positional_weight<D>(
          p, place.head, n, unit, [&](const Share<D>& token) { return dot<T, D>(queries, r, token); });
      const NearCell cell(p, place, r, n);
      add_scaled<D>(softmax.values, r, positional, cell.of<T, D>(p, p.v, image, place.head));
    }
  }
}

template <class T, int D, bool banded>
constexpr int forward_occupancy = D > 64 || (D > 32 && !banded) ? 2 : D > 24 || is_float<T> ? 3 : 4;

template <class T, int D, bool banded>
__global__ void FOVEAL_OCCUPANCY(threads, (forward_occupancy<T, D, banded>))
attention_forward(const __grid_constant__ Attention p, const HeadMap out, float* lse, int images_per_block) {
  using Pool = Pooled<T, D>;
  auto& s = shared_memory<ForwardShared<T, D, banded>>();
  static_assert(sizeof s <= most_shared);
  const TilePlace place(p, blockIdx.x);

  for (int c = threadIdx.x; c < D; c += threads) {
    s.query_embedding[c] = c < p.d ? p.query_embedding.get(int64_t(place.head) * p.d + c) : 0.0f;
  }
  const BandPlace<1> band_place(p, place);
  if constexpr (banded) {
    s.band.tokens.load(p, place.head);
    s.band.warps[warp()].weights.clear();
    if (threadIdx.x < 9) {
      s.band.window_bias[threadIdx.x] = p.window_bias.get(place.head * 9 + threadIdx.x);
      s.band.positional_bias[threadIdx.x] = p.positional_bias.get(place.head * 9 + threadIdx.x);
    }
  }
  QueryScale scale;
  scale.set_lengths(p, place);
  Floats<4> bias[Pool::tiles];  // of a chunk: of the only one, for all images
  const auto keep_bias = [&](int tile, const Floats<4>& found) { bias[tile] = found; };

  const int first_image = blockIdx.y * images_per_block;
  const int end_image = first_image + images_per_block < p.batch ? first_image + images_per_block : p.batch;
  for (int image = first_image; image < end_image; ++image) {
    __syncthreads();
    start_tile<T, D>(s.queries, p, p.q, image, place);
    s.pooled.start(p, image, place.head, 0);
    if constexpr (banded) start_windows<T, D>(s.band, p, image, place);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    s.pooled.find_factors(p, s.query_embedding);
    if constexpr (banded) find_factors<T, D>(s.band, p, s.query_embedding);
    __syncthreads();

    const LeftRows<T, D> queries(s.queries[16 * warp()]);
    scale.set_units(queries, p.normalize);
    Softmax<D> softmax;
    for (int first = 0; first < p.keys(); first += Pool::size) {
      if (first > 0) s.pooled.replace(p, image, place.head, first, s.query_embedding);
      if (place.row >= p.height) continue;  // the warp
      if (p.keys() > Pool::size || image == first_image) for_bias<Pool::tiles>(p, place, first, keep_bias);
      add_pooled<T, D>(softmax, p, queries, scale, s.pooled, first, bias);
    }
    if (place.row >= p.height) continue;
    if constexpr (banded) add_band<T, D>(softmax, queries, scale, s.band, band_place);
    else add_plain<T, D>(softmax, p, image, queries, scale, place, s.query_embedding);

    write_rows<T, D>(s.queries[16 * warp()], softmax.values, p, out, image, place);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (member() != 0 || !p.inside(place.row + r, place.column)) continue;
      const int64_t cell = (int64_t(image) * p.height + place.row + r) * p.width + place.column;
      lse[cell * p.heads + place.head] = softmax.largest[r] + logf(softmax.total[r]);
    }
  }
}

}  // namespace

void launch_forward(const Stream& stream, const Attention& p, const HeadMap& out, float* lse) {
  const Grid grid(p);
  with_kernel<forward_band>(p, [&](auto kernel) {
    using K = decltype(kernel);
    stream.launch(attention_forward<typename K::T, K::D, K::banded>, grid.blocks, threads,
                  sizeof(ForwardShared<typename K::T, K::D, K::banded>), p, out, lse, grid.images_per_block);
  });
}

}  // namespace foveal::cuda
