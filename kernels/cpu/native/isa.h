// The entry points of one instruction set; every table comes from one translation unit.
#pragma once
#include "abi.h"
#include "plan.h"
#include "team.h"

namespace quire {

struct Isa {
  const char* name;
  bool (*is_supported)();
  // All are called by every thread of a team at once.
  void (*forward)(Thread&, const Model&, const Batch&, const AttentionPlan&, const Buffers&);
  void (*logits)(Thread&, const Model&, const float* hidden, int64_t num_rows, float* narrow,
                 float* out);
};

extern const Isa generic_isa;
#if defined(__x86_64__)
extern const Isa avx2_isa;
extern const Isa avx512_isa;
#endif

}  // namespace quire
