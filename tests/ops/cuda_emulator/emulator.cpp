// A grid of blocks of threads on one thread of the host: every thread of a block is a fiber, which runs until it waits
// for the others. Fibers begin, once, with ucontext and switch with setjmp, which makes no system call.
#include "emulated_cuda.h"

#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace foveal::emulator {
namespace {

constexpr size_t stack_size = 256 << 10;

enum class State { ready, at_barrier, in_warp, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

using Meeting = std::array<Slot, 32>;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[stack_size]};  // not touched before it is used
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  State state;
  dim3 index;
  int number;
  unsigned mask;  // of the warp's operation that it waits for
  Slot mine;      // what it came with, and what all came with
  std::shared_ptr<Meeting> met;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> copies;
};

std::mutex one_grid;
std::mt19937 order(1);
std::vector<Fiber> fibers;
std::vector<char> shared;
char* shared_begin;
size_t shared_size;
Fiber* current;
jmp_buf scheduler;
const std::function<void()>* body;
const char* failure;

void wait(State state) {
  current->state = state;
  if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}

// A fiber is one thread of every block, one after the other.
void enter() {
  for (;;) {
    (*body)();
    wait(State::done);
  }
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = stack_size;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

// An operation of a warp begins when all lanes of its mask that still run have come to it.
bool warp_is_complete(size_t first, size_t end, unsigned mask) {
  for (size_t i = first; i < end; ++i) {
    const Fiber& fiber = fibers[i];
    if (!(mask >> (i - first) & 1) || fiber.state == State::done) continue;
    if (fiber.state != State::in_warp || fiber.mask != mask) return false;
  }
  return true;
}

// Let the lanes of a warp go on that wait for nobody any more; false if there are none.
bool release_warp(size_t first, size_t end) {
  bool any = false;
  for (size_t i = first; i < end; ++i) {
    if (fibers[i].state != State::in_warp || !warp_is_complete(first, end, fibers[i].mask)) continue;
    const unsigned mask = fibers[i].mask;
    const auto meeting = std::make_shared<Meeting>();
    for (size_t j = first; j < end; ++j) {
      if (!(mask >> (j - first) & 1) || fibers[j].state != State::in_warp) continue;
      (*meeting)[j - first] = fibers[j].mine;
      fibers[j].met = meeting, fibers[j].state = State::ready;
    }
    any = true;
  }
  return any;
}

// Let all threads go on from a barrier; false if some have not come to it.
bool release_block(size_t threads) {
  for (size_t i = 0; i < threads; ++i) {
    if (fibers[i].state != State::at_barrier && fibers[i].state != State::done) return false;
  }
  for (size_t i = 0; i < threads; ++i) {
    if (fibers[i].state == State::at_barrier) fibers[i].state = State::ready;
  }
  return true;
}

[[noreturn]] void give_up(const char* why) {
  for (Fiber& fiber : fibers) fiber.started = false;  // where they stopped they would never go on
  throw std::runtime_error(why);
}

void run_block(size_t threads) {
  memset(shared_begin, 0xff, shared_size);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::ready, fiber.number = int(i);
    fiber.index = {unsigned(i) % blockDim.x, unsigned(i) / blockDim.x % blockDim.y, unsigned(i) / blockDim.x / blockDim.y};
    fiber.groups.clear(), fiber.copies.clear();
  }
  std::vector<size_t> turn(threads), warps((threads + 31) / 32);
  std::iota(turn.begin(), turn.end(), 0);
  std::iota(warps.begin(), warps.end(), 0);
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), order);
    for (size_t warp : warps) {
      const size_t first = 32 * warp, end = std::min(first + 32, threads);
      do {
        std::shuffle(turn.begin() + first, turn.begin() + end, order);
        for (size_t n = first; n < end; ++n) {
          if (fibers[turn[n]].state == State::ready) resume(fibers[turn[n]]);
          if (failure) give_up(failure);
        }
      } while (release_warp(first, end));
    }
    if (std::all_of(turn.begin(), turn.end(), [](size_t i) { return fibers[i].state == State::done; })) return;
    if (!release_block(threads)) give_up("emulated kernel: threads wait for others that never come");
  }
}

}  // namespace

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> alone(one_grid);
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024) throw std::runtime_error("emulated launch: " + std::to_string(threads) + " threads");
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff) throw std::runtime_error("emulated launch: too large a grid");
  if (shared_bytes > 227 << 10) throw std::runtime_error("emulated launch: too much shared memory");
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  shared.resize(shared_bytes + 16);
  shared_begin = shared.data() + (16 - reinterpret_cast<uintptr_t>(shared.data()) % 16) % 16;
  shared_size = shared_bytes, gridDim = grid, blockDim = block, body = &kernel, failure = nullptr;
  std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (uint64_t i : blocks) {
    blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    run_block(threads);
  }
}

void fail(const char* why) {
  failure = why;
  wait(State::done);
}

char* shared_bytes(size_t size) {
  if (size > shared_size) fail("emulated kernel: it uses more shared memory than it was launched with");
  return shared_begin;
}

void check_aligned(const void* at, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) fail("emulated kernel: an address is not a multiple of the access's size");
}

void wait_for_block() { wait(State::at_barrier); }

int lane() { return current->number % 32; }

const Slot* meet_warp(unsigned mask, const void* mine, size_t size) {
  if (size) memcpy(current->mine.bytes, mine, size);
  current->mask = mask;
  wait(State::in_warp);
  return current->met->data();
}

void copy_later(void* to, const void* from, size_t bytes) {
  check_aligned(to, bytes);
  check_aligned(from, bytes);
  current->copies.push_back({to, from, bytes});
}

void end_group() { current->groups.push_back(std::move(current->copies)), current->copies.clear(); }

void finish_groups(size_t pending) {
  for (; current->groups.size() > pending; current->groups.pop_front()) {
    for (const Copy& copy : current->groups.front()) memcpy(copy.to, copy.from, copy.bytes);
  }
}

float float_of(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

float float_of(float16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31  ? fraction ? NAN : INFINITY
                     : exponent == 0 ? ldexpf(fraction, -24)
                                     : ldexpf(1024 + fraction, exponent - 25);
  return x.bits >> 15 ? -size : size;
}

// Both round to nearest, ties to even.
uint16_t bits_of(bfloat16, float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t bits_of(float16, float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  const float size = fabsf(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | uint16_t(nearbyintf(size * 0x1p24f));
  const uint32_t bits = __float_as_uint(size) - (112u << 23);
  return sign | uint16_t((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

}  // namespace foveal::emulator
