#if defined(__x86_64__)
#define QUIRE_ISA avx2
#include "isa.h"

#include "functions.h"

namespace quire {
namespace {
bool is_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace
const Isa avx2_isa{"avx2", is_supported, avx2::kFunctions};
}  // namespace quire
#endif
