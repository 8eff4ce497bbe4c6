// A small SIMT emulation, for tests on machines without a GPU: the unmodified .cu is compiled by the host compiler with
// testing/include before any CUDA headers. Each thread of a block is a fiber; blocks run one after another. A fiber
// runs until it reaches a barrier or a shuffle, and the order of the fibers turns round at every barrier, so a missing
// barrier shows as wrong sums. Misaligned 16-byte loads and stores throw. Races between blocks, the memory model and
// speed cannot be seen here.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct __half {
  std::uint16_t bits;
};
using cudaStream_t = void *;
enum cudaError_t { cudaSuccess, cudaErrorInsufficientDriver, cudaErrorNoDevice, cudaErrorNoKernelImageForDevice,
                   cudaErrorInvalidDeviceFunction };

namespace emulation {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = std::size_t{128} << 10;

struct Fiber {
  ucontext_t entry;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  bool started = false;
  bool finished = false;
  bool at_barrier = false;
  unsigned shuffled = 0; // shuffles this thread has published
  std::uint32_t published[2] = {};
};

// Runs the blocks of one launch.
class Block {
public:
  static Block &current() { return *instance(); }

  Block(dim3 threads, void (*body)(void *), void *argument)
      : fibers_(threads.x), body_(body), argument_(argument) {
    for (Fiber &fiber : fibers_)
      fiber.stack.reset(new char[kStackBytes]);
  }

  void run() {
    instance() = this;
    for (Fiber &fiber : fibers_) {
      fiber.started = fiber.finished = fiber.at_barrier = false;
      fiber.shuffled = 0;
    }
    bool forward = true;
    while (!all(&Fiber::finished)) {
      bool progress = false;
      for (std::size_t i = 0; i < fibers_.size(); ++i) {
        thread = static_cast<unsigned>(forward ? i : fibers_.size() - 1 - i);
        if (fibers_[thread].finished || fibers_[thread].at_barrier || !ready(thread))
          continue;
        progress = true;
        resume();
        if (error)
          std::rethrow_exception(std::exchange(error, nullptr));
      }
      if (!progress) {
        // A thread that has left counts as arrived, as on hardware.
        for (const Fiber &fiber : fibers_)
          if (!fiber.finished && !fiber.at_barrier)
            throw std::runtime_error("emulation: threads wait for one another, a shuffle is divergent");
        for (Fiber &fiber : fibers_)
          fiber.at_barrier = false;
        forward = !forward;
      }
    }
  }

  void barrier() {
    fibers_[thread].at_barrier = true;
    yield();
  }

  std::uint32_t shuffle_xor(std::uint32_t value, unsigned lane_mask) {
    Fiber &own = fibers_[thread];
    Fiber &other = fibers_[thread ^ lane_mask];
    own.published[own.shuffled++ % 2] = value;
    if (!ready(thread))
      yield(); // until the whole warp has published as many, so two places for them are enough
    return other.published[(own.shuffled - 1) % 2];
  }

  unsigned thread = 0;
  unsigned block = 0;
  std::exception_ptr error;

private:
  static Block *&instance() {
    static Block *block = nullptr;
    return block;
  }

  bool all(bool Fiber::*flag) const {
    for (const Fiber &fiber : fibers_)
      if (!(fiber.*flag))
        return false;
    return true;
  }

  bool ready(unsigned index) const {
    const unsigned first = index / kWarp * kWarp;
    for (unsigned i = first; i < first + kWarp && i < fibers_.size(); ++i)
      if (fibers_[i].shuffled < fibers_[index].shuffled)
        return false;
    return true;
  }

  // The first entry needs a context of its own; later switches avoid swapcontext and its system calls.
  void resume() {
    Fiber &fiber = fibers_[thread];
    if (_setjmp(scheduler_) != 0)
      return;
    if (fiber.started)
      _longjmp(fiber.state, 1);
    fiber.started = true;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, &Block::enter, 0);
    setcontext(&fiber.entry);
  }

  static void enter() {
    Block &block = current();
    try {
      block.body_(block.argument_);
    } catch (...) {
      block.error = std::current_exception();
    }
    block.fibers_[block.thread].finished = true;
    _longjmp(block.scheduler_, 1);
  }

  void yield() {
    if (_setjmp(fibers_[thread].state) == 0)
      _longjmp(scheduler_, 1);
  }

  std::vector<Fiber> fibers_;
  jmp_buf scheduler_;
  void (*body_)(void *);
  void *argument_;
};

// Reads of threadIdx.x and blockIdx.x.
struct ThreadIndex {
  operator unsigned() const { return Block::current().thread; }
};
struct BlockIndex {
  operator unsigned() const { return Block::current().block; }
};
template <class Index> struct Index3 {
  Index x;
};

inline void check_alignment(const void *pointer) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0)
    throw std::runtime_error("emulation: misaligned 16-byte access");
}

template <class To, class From> To reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

} // namespace emulation

static const emulation::Index3<emulation::ThreadIndex> threadIdx;
static const emulation::Index3<emulation::BlockIndex> blockIdx;

inline void __syncthreads() { emulation::Block::current().barrier(); }

inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  return emulation::reinterpret<float>(emulation::Block::current().shuffle_xor(
      emulation::reinterpret<std::uint32_t>(value), static_cast<unsigned>(lane_mask)));
}

inline uint4 __ldcs(const uint4 *pointer) {
  emulation::check_alignment(pointer);
  uint4 value;
  std::memcpy(&value, pointer, sizeof(value));
  return value;
}

inline void __stcs(float4 *pointer, float4 value) {
  emulation::check_alignment(pointer);
  std::memcpy(pointer, &value, sizeof(value));
}

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) { return emulation::reinterpret<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulation::reinterpret<unsigned>(value); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half half) {
  const int exponent = half.bits >> 10 & 0x1f, fraction = half.bits & 0x3ff;
  const float sign = half.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 0x1f)
    return fraction != 0 ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(static_cast<float>(fraction + 0x400), exponent - 25));
}
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = 0;
  return cudaSuccess;
}
inline const char *cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "emulated"; }

template <class Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters), dim3 grid, dim3 threads, void **arguments, std::size_t,
                             cudaStream_t) {
  struct Call {
    void (*kernel)(Parameters);
    Parameters *parameters;
  } call{kernel, static_cast<Parameters *>(arguments[0])};
  const auto body = [](void *argument) {
    const Call &made = *static_cast<Call *>(argument);
    made.kernel(*made.parameters);
  };
  emulation::Block block(threads, body, &call);
  for (block.block = 0; block.block < grid.x; ++block.block)
    block.run();
  return cudaSuccess;
}
