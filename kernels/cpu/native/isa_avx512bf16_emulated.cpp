// What isa_avx512bf16.cpp computes, on CPUs that cannot: for tests.
#include "isa.h"

#if defined(QUIRE_EMULATE_ISAS)
#define QUIRE_ISA avx512bf16_emulated
#define QUIRE_EMULATE
#define QUIRE_WIDE
#define QUIRE_PAIRS
#include "functions.h"

namespace quire {
namespace {
bool is_supported() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}
constexpr Isa kIsa{"avx512bf16-emulated", is_supported, avx512bf16_emulated::kFunctions};
}  // namespace
const Isa* const avx512bf16_emulated_isa = &kIsa;
}  // namespace quire
#else
namespace quire {
const Isa* const avx512bf16_emulated_isa = nullptr;
}  // namespace quire
#endif
