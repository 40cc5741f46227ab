#include "isa.h"

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // the latter in older clang
#define QUIRE_TILES
#define QUIRE_ISA amx
#include "cpu_x86.h"
#include "functions.h"

namespace quire {
namespace {
constexpr Isa kIsa{"amx", cpu_has_amx, amx::kFunctions};
}  // namespace
const Isa* const amx_isa = &kIsa;
}  // namespace quire
#else
namespace quire {
const Isa* const amx_isa = nullptr;
}  // namespace quire
#endif
