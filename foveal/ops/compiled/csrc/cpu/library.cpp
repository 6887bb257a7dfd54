// What the kernels ask of the process: PyTorch's threads and the CPU's instruction set.
#include <stdlib.h>
#include <string.h>

#include "tensor.h"

namespace foveal {

InstructionSet instruction_set() {
#if defined(FOVEAL_ONLY)
  return InstructionSet::FOVEAL_ONLY;
#else
  static const InstructionSet chosen = [] {
#if defined(__x86_64__)
    const char* limit = getenv("FOVEAL_CPU_ISA");
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool below_avx512 = limit != nullptr && strcmp(limit, "avx512") != 0;
    const bool below_avx2 = limit != nullptr && strcmp(limit, "baseline") == 0;
    if (avx512 && !below_avx512) return InstructionSet::avx512;
    if (avx2 && !below_avx2) return InstructionSet::avx2;
#endif
    return InstructionSet::baseline;
  }();
  return chosen;
#endif
}

void run_parallel(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count > 0) {
    torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
  }
}

void out_of_memory(int64_t bytes) { STD_TORCH_CHECK(false, "there is no memory for ", bytes, " bytes"); }

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace foveal

extern "C" __attribute__((visibility("default"))) const char* foveal_instruction_set() {
  switch (foveal::instruction_set()) {
    case foveal::InstructionSet::avx512: return "avx512";
    case foveal::InstructionSet::avx2: return "avx2";
    case foveal::InstructionSet::baseline: break;
  }
  return "baseline";
}
