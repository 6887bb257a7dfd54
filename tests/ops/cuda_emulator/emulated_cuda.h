// CUDA's names for the host compiler. Kernels keep their text; every thread of a block is a fiber (emulator.cpp).
//
// What it makes visible: a missing barrier (in random order every warp runs as far as it can without the others, and in
// a warp every lane; so do the blocks of a grid), shared memory that nobody wrote (it begins as NaN), a copy read before
// it was waited for (it happens then), a barrier or a warp's operation that not all reach (an error), an address out of
// step with the size of a load.
// What it cannot show: races within the accesses between two barriers, memory coherence, speed.
#pragma once

#include <math.h>
#include <stddef.h>
#include <string.h>

#include <functional>

#include "common.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};

extern dim3 gridDim, blockDim, blockIdx, threadIdx;  // of the fiber that runs

namespace foveal::emulator {

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

char* shared_bytes(size_t size);
void wait_for_block();

void check_aligned(const void* at, size_t bytes);

// Gives every lane of `mask` a view of what each of them (at most 32 bytes) came with: element `lane` of the result.
struct Slot {
  alignas(8) char bytes[32];
};
const Slot* meet_warp(unsigned mask, const void* mine, size_t size);
int lane();

// Remembers a copy, ends a group of them, carries out all but the last `pending` groups.
void copy_later(void* to, const void* from, size_t bytes);
void end_group();
void finish_groups(size_t pending);

template <class T>
T value_of(const Slot& slot) {
  T value;
  memcpy(&value, slot.bytes, sizeof value);
  return value;
}

template <class T>
T from_lane(unsigned mask, T value, int source) {
  const T seen = value_of<T>(meet_warp(mask, &value, sizeof value)[source & 31]);
  return mask >> (source & 31) & 1 ? seen : value;
}

float float_of(bfloat16 x);
float float_of(float16 x);
uint16_t bits_of(bfloat16, float x);
uint16_t bits_of(float16, float x);

}  // namespace foveal::emulator

inline void __syncthreads() { foveal::emulator::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffff) { foveal::emulator::meet_warp(mask, nullptr, 0); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = foveal::emulator::lane();
  return foveal::emulator::from_lane(mask, value, lane / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = foveal::emulator::lane(), source = lane ^ bits;
  return foveal::emulator::from_lane(mask, value, source / width == lane / width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = foveal::emulator::lane(), source = lane + delta;
  return foveal::emulator::from_lane(mask, value, source / width == lane / width ? source : lane);
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float __uint_as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float p, float q) { return p / q; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

namespace foveal::cuda {

template <class Shared>
Shared& shared_memory() {
  return *reinterpret_cast<Shared*>(emulator::shared_bytes(sizeof(Shared)));
}

template <class To, class From>
To* as(From* from) {
  emulator::check_aligned(from, sizeof(To));
  return reinterpret_cast<To*>(from);
}

template <class T>
float2 floats_of(T, uint32_t pair) {
  return {emulator::float_of(T{uint16_t(pair)}), emulator::float_of(T{uint16_t(pair >> 16)})};
}
template <class T>
uint32_t pair_of(T, float low, float high) {
  return emulator::bits_of(T(), low) | uint32_t(emulator::bits_of(T(), high)) << 16;
}

// The warp's part of mma.cuh: every lane finds its four sums from what all hold.
template <class T, int parts>
void multiply_fragments(float (&d)[4], const uint32_t* a, const uint32_t* b) {
  struct Fragments {
    uint32_t a[2 * parts], b[parts];
  } mine;
  memcpy(mine.a, a, sizeof mine.a);
  memcpy(mine.b, b, sizeof mine.b);
  const emulator::Slot* all = emulator::meet_warp(0xffffffff, &mine, sizeof mine);
  const int group = emulator::lane() / 4, member = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * member + i % 2;
    for (int part = 0; part < parts; ++part) {
      for (int pair = 0; pair < 4; ++pair) {
        const float2 left = floats_of(T(), emulator::value_of<Fragments>(all[4 * group + pair]).a[2 * part + i / 2]);
        const float2 right = floats_of(T(), emulator::value_of<Fragments>(all[4 * column + pair]).b[part]);
        d[i] += left.x * right.x + left.y * right.y;
      }
    }
  }
}
template <class T>
void mma_16x8x16(T, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments<T, 2>(d, a, b);
}
template <class T>
void mma_16x8x8(T, float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  multiply_fragments<T, 1>(d, a, &b);
}

// Every lane reads its row when it comes, so what others have stored must have been waited for.
struct MatrixRow {
  uint16_t values[8];
};
inline const emulator::Slot* meet_with_rows(const void* row) {
  emulator::check_aligned(row, 16);
  MatrixRow mine;
  memcpy(&mine, row, sizeof mine);
  return emulator::meet_warp(0xffffffff, &mine, sizeof mine);
}
inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const emulator::Slot* rows = meet_with_rows(row);
  const int group = emulator::lane() / 4, member = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) memcpy(&to[i], rows[8 * i + group].bytes + 4 * member, 4);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  const emulator::Slot* rows = meet_with_rows(row);
  const int group = emulator::lane() / 4, member = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int r) { return uint32_t(emulator::value_of<MatrixRow>(rows[8 * i + r]).values[group]); };
    to[i] = at(2 * member) | at(2 * member + 1) << 16;
  }
}

template <int bytes>
void copy_async(void* shared, const void* global) {
  emulator::copy_later(shared, global, bytes);
}
inline void commit_copies() { emulator::end_group(); }
template <int pending>
void wait_for_copies() {
  emulator::finish_groups(pending);
}

struct Stream {
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments&&... arguments) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    emulator::run(grid, block, shared, [&] { kernel(Parameters(arguments)...); });
  }
};

}  // namespace foveal::cuda
