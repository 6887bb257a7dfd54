// aggregated_attention, forward, from tensors to a launch.
#include "attention_call.cuh"
#include "attention_forward.cuh"

namespace foveal::cuda {
namespace {

constexpr int forward_band = 64;  // the widest padded d whose shared memory every GPU has

template <class T, int D, bool banded>
void launch_forward(const Device& device, const Attention& p, const HeadMap& out, float* lse) {
  const Grid grid(p);
  device.launch(attention_forward<T, D, banded>, grid.blocks, threads, sizeof(ForwardShared<T, D, banded>), p, out, lse,
                grid.images_per_block);
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pool, const Tensor& v_pool, const Tensor& scale,
    const std::optional<Tensor>& query_embedding, const std::optional<Tensor>& window_bias,
    const std::optional<Tensor>& pool_bias, const std::optional<Tensor>& pool_rows,
    const std::optional<Tensor>& pool_columns, const std::optional<Tensor>& positional_tokens,
    const std::optional<Tensor>& positional_bias, int64_t window_size, bool length_scaled, bool normalize) {
  const Device device(q);
  Tensor out = empty(q, {q.size(0), q.size(1), q.size(2), q.size(3), q.size(4)}, q.scalar_type());
  Tensor lse = empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  const Call call({q, k, v, k_pool, v_pool},
                  {scale, query_embedding, window_bias, positional_tokens, positional_bias},
                  {pool_bias, pool_rows, pool_columns}, window_size, length_scaled, normalize, forward_band);
  with_kernel<forward_band>(q, window_size, [&](auto kernel) {
    using K = decltype(kernel);
    launch_forward<typename K::T, K::D, K::banded>(device, call.problem, head_map(out), mutable_data<float>(lse));
  });
  return {out, lse};
}

}  // namespace
}  // namespace foveal::cuda

FOVEAL_CUDA_LIBRARY(m) { m.impl("aggregated_attention", TORCH_BOX(&foveal::cuda::attention)); }
