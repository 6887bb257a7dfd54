// What every source of the compiled library shares. Plain C++: no PyTorch, so kernels compile in a moment.
//
// Files: `op.h` holds an op's arguments and the arithmetic of one element, for every target; `op_kernel.cpp` its CPU
// loops, compiled once per instruction set into a namespace of that name; `op.cpp` takes tensors and is compiled once.
// `op.cu` is all of the op on a GPU (attention's kernels: `attention_*.cu`). FOVEAL_CUDA says that one of those is
// compiled: by nvcc or, for tests, for the host.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FOVEAL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FOVEAL_HOST_DEVICE inline __attribute__((always_inline))
#endif

#if defined(FOVEAL_CUDA)
#define FOVEAL_ISA cuda
#elif !defined(FOVEAL_ISA)
#define FOVEAL_ISA baseline
#endif

namespace foveal {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {  // on GPUs alone
  uint16_t bits;
};

enum class Dtype { float32, float64, bfloat16 };

// Arithmetic of a stored type: half types are computed in float.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

template <class T>
struct Type {
  using type = T;
};

// Call `function(Type<T>())` with the C++ type of a dtype.
template <class F>
inline __attribute__((always_inline)) void with_type(Dtype dtype, F&& function) {
  switch (dtype) {
    case Dtype::float32: return function(Type<float>());
    case Dtype::float64: return function(Type<double>());
    case Dtype::bfloat16: return function(Type<bfloat16>());
  }
}

// The compiled instruction set, or of several the widest that this CPU has, at most the one that FOVEAL_CPU_ISA names.
enum class InstructionSet { baseline, avx2, avx512 };
InstructionSet instruction_set();

// Run `body(context, begin, end)` over [0, count) on PyTorch's threads, at least `grain` items each.
void run_parallel(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
int64_t thread_count();
[[noreturn]] void out_of_memory(int64_t bytes);

}  // namespace foveal

// Declares `foveal::name(args)`, which calls the kernel compiled for this CPU: the only one there is, or the widest.
#if defined(FOVEAL_CUDA)
#define FOVEAL_KERNEL(name, Args)
#elif defined(FOVEAL_ONLY)
#define FOVEAL_KERNEL(name, Args)                                               \
  namespace foveal {                                                            \
  namespace FOVEAL_ONLY { void name(const Args&); }                             \
  static inline void name(const Args& args) { return FOVEAL_ONLY::name(args); } \
  }
#elif defined(__x86_64__)
#define FOVEAL_KERNEL(name, Args)                                  \
  namespace foveal {                                               \
  namespace baseline { void name(const Args&); }                   \
  namespace avx2 { void name(const Args&); }                       \
  namespace avx512 { void name(const Args&); }                     \
  static inline void name(const Args& args) {                      \
    switch (instruction_set()) {                                   \
      case InstructionSet::avx512: return avx512::name(args);      \
      case InstructionSet::avx2: return avx2::name(args);          \
      case InstructionSet::baseline: return baseline::name(args);  \
    }                                                              \
  }                                                                \
  }
#else
#define FOVEAL_KERNEL(name, Args)                                            \
  namespace foveal {                                                         \
  namespace baseline { void name(const Args&); }                             \
  static inline void name(const Args& args) { return baseline::name(args); } \
  }
#endif
