#define QUIRE_ISA generic
#include "isa.h"

#include "functions.h"

namespace quire {
namespace {
bool is_supported() { return true; }
}  // namespace
const Isa generic_isa{"generic", is_supported, generic::kFunctions};
}  // namespace quire
