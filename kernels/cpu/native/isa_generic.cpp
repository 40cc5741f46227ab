// What needs no more than the CPU has at least: on arm64, that is NEON.
#if defined(__aarch64__)
#define QUIRE_ISA neon
#else
#define QUIRE_ISA generic
#endif
#include "isa.h"

#include "functions.h"

namespace quire {
namespace {
#if defined(__aarch64__)
constexpr char kName[] = "neon";
#else
constexpr char kName[] = "generic";
#endif
bool is_supported() { return true; }
}  // namespace
const Isa generic_isa{kName, is_supported, QUIRE_ISA::kFunctions};
}  // namespace quire
