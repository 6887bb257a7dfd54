// The gradients of pooled keys and values: a block keeps 64 of them, a warp 16 as the left operand, and walks over a
// part of the queries; the parts are added up by pooled_gradients_sum.
#include "cuda/attention/launches.cuh"

namespace foveal::cuda {
namespace {

template <class T, int D>
struct PooledGradientsShared {
  static constexpr int queries_at_once = D <= 64 ? 64 : 16;
  Rows<T, D, pooled_rows> keys, values;
  Factors factors[pooled_rows];
  Rows<T, D, queries_at_once> queries, upstream;
  Query statistics[queries_at_once];
  alignas(8) float query_embedding[D];
};

template <class T, int D>
__global__ void FOVEAL_OCCUPANCY(threads, backward_occupancy<D>)
pooled_gradients(const __grid_constant__ Attention p, const __grid_constant__ PooledGradients a) {
  using Shared = PooledGradientsShared<T, D>;
  constexpr int at_once = Shared::queries_at_once;
  Shared& s = shared_memory<Shared>();
  static_assert(sizeof s <= most_shared);
  const int head = blockIdx.x % p.heads, first_key = blockIdx.x / p.heads * pooled_rows;
  const int own_key = first_key + 16 * warp() + group();  // and the one 8 further on
  const bool busy = first_key + 16 * warp() < p.keys();
  const int cells = p.height * p.width;
  const float scale = p.scale[head];
  load_embedding<D>(s.query_embedding, p, head);

  for (int image = blockIdx.y; image < p.batch; image += gridDim.y) {
    __syncthreads();
    const auto pooled = [&](const HeadMap& map) {
      return [&, image](int row) -> const T* {
        const int n = first_key + row;
        return n < p.keys() ? at<T>(map, image, n / p.pool_width, n % p.pool_width, head) : nullptr;
      };
    };
    start_rows<T, D>(s.keys.values, pooled_rows, p.d, in_words<T>(p.k_pool, p.d), pooled(p.k_pool));
    start_rows<T, D>(s.values.values, pooled_rows, p.d, in_words<T>(p.v_pool, p.d), pooled(p.v_pool));
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    for (int n = threadIdx.x; n < pooled_rows; n += threads) {
      s.factors[n] = row_factors<T, D>(s.keys[n], s.query_embedding, p.normalize);
    }
    const LeftRows<T, D> keys(s.keys[16 * warp()]), values(s.values[16 * warp()]);
    float key_grads[D / 8][4] = {}, value_grads[D / 8][4] = {}, embedding_factors[2] = {};
    const Walk places[2] = {Walk::from(own_key, p.pool_width), Walk::from(own_key + 8, p.pool_width)};

    for (int first = blockIdx.z * at_once; first < cells; first += a.parts * at_once) {
      __syncthreads();
      const auto map_row = [&](const HeadMap& map) {
        return [&, image, first](int row) -> const T* {
          const Walk cell = Walk::from(first + row, p.width);
          return first + row < cells ? at<T>(map, image, cell.row, cell.column, head) : nullptr;
        };
      };
      start_rows<T, D>(s.queries.values, at_once, p.d, in_words<T>(p.q, p.d), map_row(p.q));
      start_rows<T, D>(s.upstream.values, at_once, p.d, in_words<T>(a.grad, p.d), map_row(a.grad));
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      if (threadIdx.x < at_once) {
        const Walk cell = Walk::from(first + threadIdx.x, p.width);
        const float unit = row_factors<T, D>(s.queries[threadIdx.x], s.query_embedding, p.normalize).unit;
        s.statistics[threadIdx.x] = a.statistics.query(p, image, cell.row, cell.column, head, scale, unit);
      }
      __syncthreads();
      if (!busy) continue;

      Walk cell = Walk::from(first + 2 * member(), p.width);
#pragma unroll (D > 24 ? 1 : 2)
      for (int tile = 0; tile < at_once / 8; tile += 2) {
        float weights[2][4], grads[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float products[4] = {}, weight_grads[4] = {};
          multiply<T, D>(products, keys, s.queries[8 * (tile + half)]);
          multiply<T, D>(weight_grads, values, s.upstream[8 * (tile + half)]);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const Query& query = s.statistics[8 * (tile + half) + 2 * member() + n % 2];
            const Walk from = n % 2 ? cell.after(1, p.width) : cell;
            const bool valid = own_key + n / 2 * 8 < p.keys();
            const Walk key = places[n / 2];
            const float found_bias = p.table ? p.pooled_bias(head, from.row, from.column, key.row, key.column) : 0.0f;
            const float bias = valid ? found_bias : -infinity;
            const Factors& factors = s.factors[16 * warp() + group() + n / 2 * 8];
            const float found = logit(products[n], query.product, query.embedded, factors, bias);
            const float weight = query.template weight<T>(found);
            const float grad = weight * (weight_grads[n] - query.mean.product) * query.embedded;
            weights[half][n] = weight;
            grads[half][n] = grad * operand_unit<T>(query.unit);
            embedding_factors[n / 2] += grad;
          }
          cell = cell.after(8, p.width);
        }
        if (a.k_parts) weigh<T, D>(key_grads, Weights<T>::of(grads[0], grads[1]), s.queries[8 * tile]);
        if (a.v_parts) weigh<T, D>(value_grads, Weights<T>::of(weights[0], weights[1]), s.upstream[8 * tile]);
      }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) add_vector<D>(key_grads, r, quad_sum(embedding_factors[r]), s.query_embedding);
    const int64_t block = (int64_t(blockIdx.z) * p.batch + image) * p.heads + head;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      const int key = own_key + i % 4 / 2 * 8, c = i / 4 * 8 + 2 * member() + i % 2;
      if (key >= p.keys() || c >= p.d) continue;
      const int64_t to = (block * p.keys() + key) * p.d + c;
      if (a.k_parts) a.k_parts[to] = key_grads[i / 4][i % 4];
      if (a.v_parts) a.v_parts[to] = value_grads[i / 4][i % 4];
    }
  }
}

// A warp for every pooled key: adds up the parts, and goes back from the normalised key to the key.
template <class T>
__global__ void FOVEAL_OCCUPANCY(threads, 8)
pooled_gradients_sum(const __grid_constant__ Attention p, const __grid_constant__ PooledGradients a) {
  constexpr int most = 4;  // values of a row in a lane
  const int64_t rows = int64_t(p.batch) * p.heads * p.keys();
  for (int64_t row = int64_t(blockIdx.x) * warps + warp(); row < rows; row += int64_t(gridDim.x) * warps) {
    const int n = int(row % p.keys()), head = int(row / p.keys() % p.heads), image = int(row / p.keys() / p.heads);
    const auto sum_of = [&](const float* parts, int c) {
      float sum = 0;
      for (int part = 0; part < a.parts; ++part) sum += parts[(part * rows + row) * p.d + c];
      return sum;
    };
    const int i = n / p.pool_width, j = n % p.pool_width;
    if (a.k_parts) {
      float key[most] = {}, grad[most] = {}, squares = 0, along = 0;
#pragma unroll
      for (int m = 0; m < most; ++m) {
        const int c = lane() + 32 * m;
        if (c >= p.d) continue;
        key[m] = load<1>(at<T>(p.k_pool, image, i, j, head) + c)[0];
        grad[m] = sum_of(a.k_parts, c);
        squares += key[m] * key[m];
        along += key[m] * grad[m];
      }
      const float unit = unit_factor<T>(p.normalize, group_sum(quad_sum(squares)));
      along = p.normalize ? group_sum(quad_sum(along)) * unit : 0.0f;
#pragma unroll
      for (int m = 0; m < most; ++m) {
        const int c = lane() + 32 * m;
        if (c < p.d) store(at<T>(a.k, image, i, j, head) + c, Floats<1>{(grad[m] - key[m] * unit * along) * unit});
      }
    }
    for (int c = lane(); a.v_parts && c < p.d; c += 32) {
      store(at<T>(a.v, image, i, j, head) + c, Floats<1>{sum_of(a.v_parts, c)});
    }
  }
}

}  // namespace

void launch_pooled_gradients(const Stream& stream, dim3 blocks, const Attention& p,
                             const PooledGradients& a) {
  with_dim(p, [&](auto kernel) {
    using T = typename decltype(kernel)::T;
    constexpr int D = decltype(kernel)::D;
    stream.launch(pooled_gradients<T, D>, blocks, threads, sizeof(PooledGradientsShared<T, D>), p, a);
    const int64_t rows = int64_t(p.batch) * p.heads * p.keys();
    stream.launch(pooled_gradients_sum<T>, clamped(ceil_div(rows, warps)), threads, 0, p, a);
  });
}

}  // namespace foveal::cuda
