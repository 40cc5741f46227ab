// The entry points of one instruction set; every table comes from one translation unit.
#pragma once
#include "abi.h"
#include "plan.h"
#include "team.h"

namespace quire {

// All are called by every thread of a team at once.
struct Functions {
  void (*forward)(Thread&, const Model&, const Batch&, const AttentionPlan&, const Buffers&);
  void (*logits)(Thread&, const Model&, const float* hidden, int64_t num_rows,
                 const AdapterPlan* adapters, float* narrow, uint16_t* halves, float* out);
  void (*likeliest)(Thread&, const Model&, const Likeliest&);
  void (*argmax)(Thread&, const Logits&, int64_t* ids, float* highest);
  void (*draw)(Thread&, const Logits&, const Draw&, int64_t* ids);
  void (*top)(Thread&, const Logits&, int64_t k, float* values, int64_t* ids);
  void (*log_probabilities)(Thread&, const Logits&, const int64_t* targets, int64_t k,
                            int64_t* ids, float* values, int64_t* ranks);
};

struct Isa {
  const char* name;
  bool (*is_supported)();
  Functions functions;
};

extern const Isa generic_isa;
#if defined(__x86_64__)
extern const Isa avx2_isa;
extern const Isa avx512_isa;
#endif
// Null where they were not built: by a compiler that does not know the instructions, or, of those
// that are computed otherwise, unless QUIRE_EMULATE_ISAS is defined.
extern const Isa* const avx512bf16_isa;
extern const Isa* const amx_isa;
extern const Isa* const avx512bf16_emulated_isa;
extern const Isa* const amx_emulated_isa;

}  // namespace quire
