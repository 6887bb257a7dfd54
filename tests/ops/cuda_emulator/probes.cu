// Small kernels that show what the emulator sees; see tests/ops/test_cuda_emulator.py.
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace foveal::cuda {
namespace {

constexpr int threads = 64;

struct Row {
  float values[threads];
};

__global__ void reverse(const float* x, float* out, bool barrier) {
  Row& row = shared_memory<Row>();
  row.values[threadIdx.x] = x[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = row.values[threads - 1 - threadIdx.x];
}

__global__ void copy(const float* x, float* out, bool wait) {
  Row& row = shared_memory<Row>();
  copy_async<4>(&row.values[threadIdx.x], x + threadIdx.x);
  commit_copies();
  if (wait) wait_for_copies<0>();
  out[threadIdx.x] = row.values[threadIdx.x];
}

// The warps could seem to be in step.
__global__ void reverse_late(const float* x, float* out, bool barrier) {
  Row& row = shared_memory<Row>();
  for (int n = 0; n < 3; ++n) __syncwarp();
  row.values[threadIdx.x] = x[threadIdx.x];
  for (int n = 0; n < 3; ++n) __syncwarp();
  if (barrier) __syncthreads();
  out[threadIdx.x] = row.values[threads - 1 - threadIdx.x];
}

// A lane gets its own value again, by way of a row that three others write to.
__global__ void matrices(const float* x, float* out, bool wait) {
  Row& row = shared_memory<Row>();
  row.values[threadIdx.x] = x[threadIdx.x];
  if (wait) __syncwarp();
  uint32_t to[4];
  load_matrices(to, &row.values[threadIdx.x / 32 * 32 + threadIdx.x % 8 * 4]);
  out[threadIdx.x] = __uint_as_float(to[0]);
}

__global__ void half_barrier(const float* x, float* out, bool all) {
  if (all || threadIdx.x < 7) __syncwarp();
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void sum_of_warp(const float* x, float* out, bool) {
  float sum = x[threadIdx.x];
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffff, sum, bits);
  out[threadIdx.x] = sum;
}

Tensor probe(const Tensor& x, const std::string& name, bool correct) {
  Tensor out = empty(x, {threads}, ScalarType::Float);
  auto kernel = name == "reverse"        ? reverse
                : name == "reverse_late" ? reverse_late
                : name == "matrices"     ? matrices
                : name == "copy"         ? copy
                : name == "half_barrier" ? half_barrier
                                         : sum_of_warp;
  Device(x).launch(kernel, 1, threads, sizeof(Row), data<float>(x), mutable_data<float>(out), correct);
  return out;
}

template <class T>
struct Tiles {
  alignas(16) T a[16][16], b[16][8];
};

// a (16, 16) times b (16, 8), in one step of 16 or in two of 8.
template <class T>
__global__ void product(const T* a, const T* b, float* out, bool in_two) {
  Tiles<T>& tiles = shared_memory<Tiles<T>>();
  const int lane = threadIdx.x, group = lane / 4, member = lane % 4;
  for (int i = lane; i < 256; i += 32) tiles.a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) tiles.b[i / 8][i % 8] = b[i];
  __syncthreads();
  uint32_t left[4], right[4];
  load_matrices(left, &tiles.a[lane % 16][lane / 16 * 8]);
  load_matrices_transposed(right, &tiles.b[lane % 16][0]);
  float sums[4] = {};
  if (in_two) {
    mma_16x8x8(T(), sums, {left[0], left[1]}, right[0]);
    mma_16x8x8(T(), sums, {left[2], left[3]}, right[1]);
  } else {
    mma_16x8x16(T(), sums, left, {right[0], right[1]});
  }
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + 2 * member + i % 2] = sums[i];
}

Tensor warp_product(const Tensor& a, const Tensor& b, bool in_two) {
  Tensor out = empty(a, {16, 8}, ScalarType::Float);
  with_type(a, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!is_float<T>) {
      Device(a).launch(product<T>, 1, 32, sizeof(Tiles<T>), data<T>(a), data<T>(b), mutable_data<float>(out), in_two);
    }
  });
  return out;
}

// A copy in which every value goes through float and is rounded again, n at a time.
template <class T, int n>
__global__ void round_trip(const float* x, T* out) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x) * n;
  store(out + i, load<n>(x + i));
}

Tensor round_to(const Tensor& x, const Tensor& like) {
  Tensor out = empty(like, {x.size(0)}, like.scalar_type());
  with_type(like, [&](auto type) {
    using T = typename decltype(type)::type;
    Device(x).launch(round_trip<T, 4>, unsigned(x.size(0) / 128), 32, 0, data<float>(x), mutable_data<T>(out));
  });
  return out;
}

}  // namespace
}  // namespace foveal::cuda

STABLE_TORCH_LIBRARY(foveal_probes, m) {
  m.def("probe(Tensor x, str name, bool correct) -> Tensor");
  m.def("warp_product(Tensor a, Tensor b, bool in_two) -> Tensor");
  m.def("round_to(Tensor x, Tensor like) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(foveal_probes, CPU, m) {
  m.impl("probe", TORCH_BOX(&foveal::cuda::probe));
  m.impl("warp_product", TORCH_BOX(&foveal::cuda::warp_product));
  m.impl("round_to", TORCH_BOX(&foveal::cuda::round_to));
}
