#include "isa.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define QUIRE_PAIRS
#define QUIRE_ISA avx512bf16
#include "cpu_x86.h"
#include "functions.h"

namespace quire {
namespace {
constexpr Isa kIsa{"avx512bf16", cpu_has_avx512bf16, avx512bf16::kFunctions};
}  // namespace
const Isa* const avx512bf16_isa = &kIsa;
}  // namespace quire
#else
namespace quire {
const Isa* const avx512bf16_isa = nullptr;
}  // namespace quire
#endif
