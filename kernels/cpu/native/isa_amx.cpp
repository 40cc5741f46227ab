#include "isa.h"

// Older clang writes the latter.
#if (defined(__AMX_BF16__) && defined(__AMX_INT8__)) || (defined(__AMXBF16__) && defined(__AMXINT8__))
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
