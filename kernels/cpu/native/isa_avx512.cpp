#if defined(__x86_64__)
#define QUIRE_ISA avx512
#include "isa.h"

#include "functions.h"

namespace quire {
namespace {
bool is_supported() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"); }
}  // namespace
const Isa avx512_isa{"avx512", is_supported, avx512::kFunctions};
}  // namespace quire
#endif
