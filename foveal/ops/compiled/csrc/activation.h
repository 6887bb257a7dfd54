// The activations and their slopes, for a scalar (a CUDA thread) or for a vector (CPU lanes).
#pragma once

#include <math.h>

#include "common.h"
#if defined(FOVEAL_CUDA)
#include "cuda/device.cuh"
#else
#include "cpu/simd.h"
#endif

namespace foveal {

// The names are those of `act` in the schemas; see act_named in tensor.h.
enum class Act { gelu, gelu_tanh, relu, silu, identity };

namespace FOVEAL_ISA {

// The normal distribution's cumulative function, within 2e-7: 1/2 plus an odd rational minimax fit (relative error
// 3e-8) up to |x| = 5.65, where float32 rounds the function to 0 or 1.
template <class V>
FOVEAL_HOST_DEVICE V fitted_normal_cdf(V x) {
  const float end = 5.65f;
  const V s = x * x;
  V p = 2.199233506416931e-08f * s + 6.288102667895146e-06f;
  p = p * s + 0.00017128851322922856f;
  p = p * s + 0.004691561684012413f;
  p = p * s + 0.03417918086051941f;
  p = p * s + 0.3989422619342804f;
  V q = 1.1705939186867909e-06f * s + 7.400415779557079e-05f;
  q = q * s + 0.0018989990931004286f;
  q = q * s + 0.028817784041166306f;
  q = q * s + 0.25234079360961914f;
  q = q * s + 1.0f;
  return x < -end ? V{} : x > end ? V{} + 1.0f : 0.5f + divide(x * p, q);
}

#if defined(FOVEAL_CUDA)

__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __forceinline__ float normal_cdf(float x) { return fitted_normal_cdf(x); }

#else

// 2^r for |r| <= 1/2: a minimax polynomial, its relative error 3e-9 before rounding.
FOVEAL_INLINE Vector<float> fraction_to_power(Vector<float> r) {
  Vector<float> p = 1.5594676e-4f * r + 1.34066434e-3f;
  p = p * r + 9.6176928e-3f;
  p = p * r + 5.55031039e-2f;
  p = p * r + 0.240226522f;
  p = p * r + 0.693147242f;
  return p * r + 1.0f;
}

// Adding it to |x| < 2^21 rounds x to an integer n, and leaves n + 127 in the lowest bits: the exponent of 2^n.
constexpr float rounding_shift = 0x1.8p23f + 127;
FOVEAL_INLINE Vector<float> rounded_to_power(Vector<float> shifted) { return (Vector<float>)((Bits32)shifted << 23); }

// exp, within 2 units in the last place. Infinite above 88.4 and zero below -87.7, a little early.
FOVEAL_INLINE Vector<float> exponential(Vector<float> x) {
  x = x < -88.0f ? broadcast(-88.0f) : x > 89.0f ? broadcast(89.0f) : x;
  const Vector<float> shifted = x * 1.44269504f + rounding_shift;
  const Vector<float> n = shifted - rounding_shift;
  const Vector<float> r = ((x - n * 0.693145752f) - n * 1.42860677e-6f) * 1.44269504f;
  return fraction_to_power(r) * rounded_to_power(shifted);
}

// exp(logit - most), for most of the logits or the logarithm of their sum of exponentials: a weight, or what becomes
// one. Its error is that of a float32 logit; zero below 1e-38.
FOVEAL_INLINE Vector<float> softmax_weight(Vector<float> logit, Vector<float> most) {
  const Vector<float> x = (logit - most) * 1.44269504f;
  const Vector<float> shifted = x + rounding_shift;
  const Vector<float> power = fraction_to_power(x - (shifted - rounding_shift)) * rounded_to_power(shifted);
  return x < -126.0f ? Vector<float>{} : power;
}

FOVEAL_INLINE Vector<float> normal_cdf(Vector<float> x) { return fitted_normal_cdf(x); }

FOVEAL_INLINE Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = exp(x[i]);
  return x;
}

FOVEAL_INLINE Vector<double> softmax_weight(Vector<double> logit, Vector<double> most) {
  return exponential(logit - most);
}

FOVEAL_INLINE Vector<double> normal_cdf(Vector<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = 0.5 * erfc(-0.7071067811865476 * x[i]);
  return x;
}

#endif

template <class V>
struct Activated {
  V value, slope;
};

template <Act act, class S, class V>
FOVEAL_HOST_DEVICE V sigmoid_argument(V x) {
  return act == Act::silu ? x : x * (S(1.5957691216057308) + S(0.07135481627260025) * x * x);
}

// act(x), for V a scalar S or a vector of S.
template <Act act, class S, class V>
FOVEAL_HOST_DEVICE V activate(V x) {
  if constexpr (act == Act::gelu) return x * normal_cdf(x);
  if constexpr (act == Act::relu) return x < S(0) ? V{} : x;
  if constexpr (act == Act::silu || act == Act::gelu_tanh) {
    return x / (S(1) + exponential(-sigmoid_argument<act, S>(x)));
  }
  return x;
}

// act(x) and its derivative there.
template <Act act, class S, class V>
FOVEAL_HOST_DEVICE Activated<V> activate_with_slope(V x) {
  if constexpr (act == Act::gelu) {
    const V cdf = normal_cdf(x), density = S(0.3989422804014327) * exponential(S(-0.5) * x * x);
    return {x * cdf, cdf + x * density};
  }
  if constexpr (act == Act::relu) return {x < S(0) ? V{} : x, x <= S(0) ? V{} : V{} + S(1)};
  if constexpr (act == Act::silu || act == Act::gelu_tanh) {
    const V argument = sigmoid_argument<act, S>(x);
    const V decay = exponential(argument < S(0) ? argument : -argument), rest = S(1) / (S(1) + decay);
    const V sigmoid = argument < S(0) ? decay * rest : rest;
    const V rate = act == Act::silu ? V{} + S(1) : S(1.5957691216057308) + S(0.21406444881780076) * x * x;
    return {x * sigmoid, sigmoid + x * rate * decay * rest * rest};
  }
  return {x, V{} + S(1)};
}

// The gradient of x from that of act(x).
template <Act act, class S, class V>
FOVEAL_HOST_DEVICE V through_activation(V grad, V slope) {
  if constexpr (act == Act::relu) return slope == S(0) ? V{} : grad;  // 0 times infinity is 0 there
  if constexpr (act == Act::identity) return grad;
  return grad * slope;
}

template <Act act>
struct ActType {
  static constexpr Act value = act;
};

// Call `function(ActType<act>())`.
template <class F>
FOVEAL_HOST_DEVICE void with_act(Act act, F&& function) {
  switch (act) {
    case Act::gelu: return function(ActType<Act::gelu>());
    case Act::gelu_tanh: return function(ActType<Act::gelu_tanh>());
    case Act::relu: return function(ActType<Act::relu>());
    case Act::silu: return function(ActType<Act::silu>());
    case Act::identity: return function(ActType<Act::identity>());
  }
}

}  // namespace FOVEAL_ISA
}  // namespace foveal
