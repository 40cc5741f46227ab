// In a file of its own: compiled for no instruction set, it runs on every CPU.
#include "cpu_x86.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdint>

namespace quire {
namespace {

// State that the system saves for threads, by the bits of XCR0.
constexpr uint64_t kAvx512State = 0xe6;
constexpr uint64_t kTileState = 0x60000;

struct Features {
  bool avx512 = false;
  bool vnni = false;
  bool avx512_bf16 = false;
  bool amx = false;
};

Features read_features() {
  Features found;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c >> 27 & 1) == 0) return found;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const uint64_t state = static_cast<uint64_t>(high) << 32 | low;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const uint32_t last = a;
  const uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
  const uint32_t all = f | dq | bw | vl;
  found.avx512 = (b & all) == all && (state & kAvx512State) == kAvx512State;
  found.vnni = (c >> 11 & 1) != 0;
  const uint32_t bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;
  const uint32_t tiles = bf16 | tile | int8;
  found.amx = (d & tiles) == tiles && (state & kTileState) == kTileState;
  if (last >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avx512_bf16 = (a >> 5 & 1) != 0;
  return found;
}

// Linux saves 8 kB more for each thread of a process that asks for it once; its children inherit
// that.
bool ask_for_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool cpu_has_avx512bf16() {
  const Features found = read_features();
  return found.avx512 && found.vnni && found.avx512_bf16;
}

bool cpu_has_amx() {
  // No function-local static: a process may be forked while another thread is in here.
  static std::atomic<int> answer{-1};
  int known = answer.load(std::memory_order_acquire);
  if (known < 0) {
    const Features found = read_features();
    known = found.avx512 && found.vnni && found.avx512_bf16 && found.amx && ask_for_tiles();
    answer.store(known, std::memory_order_release);
  }
  return known == 1;
}

}  // namespace quire
#endif
