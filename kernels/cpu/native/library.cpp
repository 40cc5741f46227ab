// The library's door: plain C functions, called from Python by ctypes.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <iterator>
#include <limits>
#include <mutex>
#include <new>
#include <string>

#include "comm.h"
#include "experts.h"
#include "isa.h"
#include "library.h"

namespace quire {
namespace {

// The best first; those that are only for tests come after what runs everywhere.
const Isa* const kAll[] = {
    amx_isa,
    avx512bf16_isa,
#if defined(__x86_64__)
    &avx512_isa,
    &avx2_isa,
#endif
    &generic_isa,
    amx_emulated_isa,
    avx512bf16_emulated_isa,
};

bool is_usable(const Isa* isa) { return isa != nullptr && isa->is_supported(); }

std::atomic<const Isa*> chosen{nullptr};

const Isa& isa() {
  const Isa* found = chosen.load(std::memory_order_acquire);
  if (found == nullptr) {
    found = *std::find_if(std::begin(kAll), std::end(kAll), is_usable);
    chosen.store(found, std::memory_order_release);
  }
  return *found;
}

// Of four tokens, by their bits in a mask: all ones for a token that may come.
constexpr uint32_t kYes = ~uint32_t{0};
constexpr uint32_t kMayCome[16][4] = {
    {0, 0, 0, 0},       {kYes, 0, 0, 0},       {0, kYes, 0, 0},       {kYes, kYes, 0, 0},
    {0, 0, kYes, 0},    {kYes, 0, kYes, 0},    {0, kYes, kYes, 0},    {kYes, kYes, kYes, 0},
    {0, 0, 0, kYes},    {kYes, 0, 0, kYes},    {0, kYes, 0, kYes},    {kYes, kYes, 0, kYes},
    {0, 0, kYes, kYes}, {kYes, 0, kYes, kYes}, {0, kYes, kYes, kYes}, {kYes, kYes, kYes, kYes},
};

// Without a branch for each token: most words of a mask may leave out some of theirs.
void mask_word(float* logits, uint32_t word) {
  constexpr uint32_t kMinusInfinity = 0xff800000;
  for (int64_t first = 0; first < 32; first += 4) {
    const uint32_t* may_come = kMayCome[word >> first & 15];
    uint32_t bits[4];
    std::memcpy(bits, logits + first, sizeof bits);
    for (int64_t i = 0; i < 4; ++i) {
      bits[i] = (bits[i] & may_come[i]) | (kMinusInfinity & ~may_come[i]);
    }
    std::memcpy(logits + first, bits, sizeof bits);
  }
}

// At least as many as a program has: of each layer, and before and after them all.
constexpr size_t kLoopsPerLayer = 28;
constexpr size_t kLoopsBeside = 16;
constexpr size_t kLoopsPerStretch = 4;
constexpr size_t kSumsPerLayer = 2;
constexpr size_t kLoopsPerSum = 2;
constexpr size_t kLoopsPerPieceOfSum = 3;

// Memory for the steps of one model; one step at a time.
struct Context {
  std::mutex in_use;
  Memory x, normed, second, inner, partial, scratch, narrow, halves, rows, logits, shrunk, mixture, summed;

  uint16_t* reserve_halves(const Model& model, int64_t num_rows) {
    return reinterpret_cast<uint16_t*>(halves.reserve(halves_size(model, num_rows)));
  }

  // Null where no row has an adapter.
  const AdapterPlan* reserve_shrunk(AdapterPlan& plan) {
    if (plan.groups.empty()) return nullptr;
    plan.shrunk = shrunk.reserve(static_cast<int64_t>(plan.of_row.size()) * plan.width);
    return &plan;
  }
};

// Loops that the sums over ranks of a step take at most.
size_t exchange_loops(const Model& model, int64_t num_tokens) {
  if (model.comm == nullptr) return 0;
  const int64_t count = num_tokens * std::max(model.hidden_size, model.embedding_size);
  const size_t pieces = static_cast<size_t>(count / model.comm->capacity() + 1);
  const size_t sums = 1 + kSumsPerLayer * model.num_layers;
  return sums * (kLoopsPerSum + kLoopsPerPieceOfSum * pieces);
}

// What a thread of a program that chooses tokens needs room for.
int64_t sampling_scratch(int64_t vocab) {
  return padded(vocab, 128) / 64 + 2 * padded(vocab, 16) + 8192 + 64;
}

// What the functions below have in common: 0, or what went wrong.
template <typename Body>
int guarded(void* context, Body body) {
  try {
    Context& c = *static_cast<Context*>(context);
    std::lock_guard<std::mutex> lock(c.in_use);
    body(c);
  } catch (const std::bad_alloc&) {
    return -1;
  } catch (const std::exception&) {
    return -2;
  }
  return 0;
}

// Run a program of one loop over rows of logits.
int choose(void* context, const Logits& logits, int num_threads,
           const std::function<void(Thread&, const Functions&)>& program) {
  return guarded(context, [&](Context& c) {
    const int count = static_cast<int>(std::clamp<int64_t>(logits.num_rows, 1, std::max(num_threads, 1)));
    const int64_t size = sampling_scratch(logits.vocab);
    const Functions& use = isa().functions;
    run_team(count, 1, c.scratch.reserve(count * size), size,
             [&](Thread& thread) { program(thread, use); });
  });
}


// 16 rows of a weight, one after the other, into one block. A line of memory of each row at a time:
// more would not stay near where rows lie a power of two apart.
template <typename T>
void pack_block(const T* rows, int64_t num_rows, int64_t in, T* block) {
  constexpr int64_t pair = sizeof(T) == 2 ? 2 : 1;
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t wide = padded(in, pair);
  for (int64_t first = 0; first < wide; first += line) {
    const int64_t end = std::min(first + line, wide);
    for (int64_t r = 0; r < 16; ++r) {
      const int64_t whole = r < num_rows ? std::min(end, in / pair * pair) : first;
      for (int64_t k = first; k < whole; k += pair) {
        std::memcpy(block + k * 16 + r * pair, rows + r * in + k, pair * sizeof(T));
      }
      for (int64_t k = whole; k < end; ++k) {
        const bool is_there = r < num_rows && k < in;
        block[k / pair * pair * 16 + r * pair + k % pair] = is_there ? rows[r * in + k] : T{0};
      }
    }
  }
}

template <typename T>
void pack_copy(const Packing& p) {
  const T* rows = static_cast<const T*>(p.rows);
  T* blocks = static_cast<T*>(p.blocks);
  const int64_t wide = padded(p.in, sizeof(T) == 2 ? 2 : 1);
  for (int64_t row = 0; row < p.out; row += 16) {
    pack_block(rows + row * p.in, std::min<int64_t>(16, p.out - row), p.in, blocks + row * wide);
  }
}

template <typename T>
void pack(Thread& thread, T* weight, int64_t out, int64_t in, T* tail, T* copy) {
  const int64_t num_blocks = out / 16;
  thread.share(num_blocks, [&](int64_t b) {
    T* block = weight + b * 16 * in;
    std::memcpy(copy, block, 16 * in * sizeof(T));
    pack_block(copy, 16, in, block);
  });
  if (out % 16 == 0) return;
  thread.share(1, [&](int64_t) {
    pack_block(weight + num_blocks * 16 * in, out % 16, in, tail);
  });
}

}  // namespace
}  // namespace quire

using namespace quire;

QUIRE_API const char* quire_sources() { return QUIRE_SOURCES; }

QUIRE_API const char* quire_isa() { return isa().name; }

QUIRE_API const char* quire_isas() {
  static const std::string names = [] {
    std::string all;
    for (const Isa* each : kAll) {
      if (is_usable(each)) all += (all.empty() ? "" : " ") + std::string(each->name);
    }
    return all;
  }();
  return names.c_str();
}

QUIRE_API int quire_choose_isa(const char* name) {
  for (const Isa* each : kAll) {
    if (is_usable(each) && std::strcmp(each->name, name) == 0) {
      chosen.store(each, std::memory_order_release);
      return 0;
    }
  }
  return -1;
}

QUIRE_API int quire_pack(void* weight, int64_t out, int64_t in, int32_t dtype, void* tail,
                         int num_threads) {
  num_threads = std::max(num_threads, 1);
  try {
    Memory copies;
    run_team(num_threads, 2, copies.reserve(num_threads * 16 * in), 16 * in, [&](Thread& thread) {
      float* copy = thread.scratch();
      if (dtype == kBFloat16) {
        pack(thread, static_cast<uint16_t*>(weight), out, in, static_cast<uint16_t*>(tail),
             reinterpret_cast<uint16_t*>(copy));
      } else {
        pack(thread, static_cast<float*>(weight), out, in, static_cast<float*>(tail), copy);
      }
    });
  } catch (const std::bad_alloc&) {
    return -1;
  } catch (const std::exception&) {
    return -2;
  }
  return 0;
}

QUIRE_API void quire_pack_copies(const Packing* packings, int64_t count) {
  for (const Packing* p = packings; p < packings + count; ++p) {
    p->dtype == kBFloat16 ? pack_copy<uint16_t>(*p) : pack_copy<float>(*p);
  }
}

QUIRE_API void quire_measure(Mixture* mixture) { measure(*mixture); }

QUIRE_API void* quire_context_new() { return new (std::nothrow) Context; }

QUIRE_API void quire_context_free(void* context) { delete static_cast<Context*>(context); }

QUIRE_API int quire_forward(void* context, const Model* model, const Batch* batch,
                            int num_threads) {
  num_threads = std::max(num_threads, 1);
  const int status = guarded(context, [&](Context& c) {
    const AttentionPlan plan = plan_attention(*model, *batch, num_threads);
    int64_t qkv = 0, attended = 0, partial = 0;
    int64_t inner = model->embedding_size;
    bool needs_second = false;
    for (int32_t i = 0; i < model->num_layers; ++i) {
      const Layer& layer = model->layers[i];
      qkv = std::max(qkv, layer.qkv.out);
      attended = std::max(attended, static_cast<int64_t>(layer.num_heads) * layer.head_dim);
      inner = std::max(inner, layer.up.out);
      partial = std::max<int64_t>(partial, (layer.head_dim + 15) / 16 * 16 + 2);
      needs_second |= layer.residual == kParallel && layer.mlp_norm.kind != kNoNorm;
    }
    const int64_t count = batch->num_tokens;
    const int64_t size = scratch_size(*model);
    const int64_t width = std::max(model->hidden_size, model->embedding_size);
    AdapterPlan adapters = plan_adapters(*model, batch->adapter_slots, count);
    MixtureRows mixture;
    float* shared = c.inner.reserve(
        std::max(count * inner, padded(count * qkv, 16) + count * attended));
    const Buffers buffers{c.x.reserve(count * model->hidden_size),
                          c.normed.reserve(count * model->hidden_size),
                          needs_second ? c.second.reserve(count * model->hidden_size) : nullptr,
                          shared,
                          shared + padded(count * qkv, 16),
                          shared,
                          c.partial.reserve(plan.partial_rows * partial),
                          partial,
                          c.reserve_halves(*model, count),
                          c.reserve_shrunk(adapters),
                          reserve_rows(*model, count, c.mixture, mixture),
                          model->comm == nullptr ? nullptr : c.summed.reserve(count * width),
                          model->comm,
                          model->comm == nullptr ? 0 : model->comm->next()};
    const Functions& use = isa().functions;
    const size_t loops =
        kLoopsBeside + model->num_layers * kLoopsPerLayer + mixture_loops(*model, count) +
        exchange_loops(*model, count);
    run_team(num_threads, loops,
             c.scratch.reserve(num_threads * size), size,
             [&](Thread& thread) { use.forward(thread, *model, *batch, plan, buffers); });
  });
  // A rank that fails by itself fails all: they would wait for it.
  if (model->comm == nullptr) return status;
  if (status != 0) model->comm->give_up(status);
  return status != 0 ? status : model->comm->status();
}

QUIRE_API int quire_logits(void* context, const Model* model, const float* hidden,
                           int64_t num_rows, const int32_t* adapter_slots, float* out,
                           int num_threads) {
  num_threads = std::max(num_threads, 1);
  return guarded(context, [&](Context& c) {
    float* narrow = c.narrow.reserve(num_rows * model->project_out.out);
    uint16_t* halves = c.reserve_halves(*model, num_rows);
    AdapterPlan plan = plan_adapters(*model, adapter_slots, num_rows);
    const AdapterPlan* adapters = c.reserve_shrunk(plan);
    const Functions& use = isa().functions;
    const int64_t size = scratch_size(*model);
    run_team(num_threads, kLoopsBeside, c.scratch.reserve(num_threads * size), size,
             [&](Thread& thread) {
               use.logits(thread, *model, hidden, num_rows, adapters, narrow, halves, out);
             });
  });
}

QUIRE_API int quire_likeliest(void* context, const Model* model, const float* hidden,
                              const int64_t* indices, int64_t num_rows,
                              const int32_t* adapter_slots, int64_t* ids, float* highest,
                              int num_threads) {
  num_threads = std::max(num_threads, 1);
  return guarded(context, [&](Context& c) {
    const int64_t width = std::min(kStretch, padded(model->head.out, 16));
    AdapterPlan adapters = plan_adapters(*model, adapter_slots, num_rows);
    const Likeliest what{hidden,
                         indices,
                         num_rows,
                         c.rows.reserve(num_rows * model->hidden_size),
                         c.narrow.reserve(num_rows * model->project_out.out),
                         c.reserve_halves(*model, num_rows),
                         c.logits.reserve(num_rows * width),
                         width,
                         ids,
                         highest,
                         c.reserve_shrunk(adapters)};
    const Functions& use = isa().functions;
    const int64_t size = scratch_size(*model);
    const size_t loops = kLoopsBeside + kLoopsPerStretch * (model->head.out / kStretch + 1);
    run_team(num_threads, loops, c.scratch.reserve(num_threads * size), size,
             [&](Thread& thread) { use.likeliest(thread, *model, what); });
  });
}

QUIRE_API int quire_argmax(void* context, const Logits* logits, int64_t* ids, float* highest,
                           int num_threads) {
  return choose(context, *logits, num_threads, [&](Thread& thread, const Functions& use) {
    use.argmax(thread, *logits, ids, highest);
  });
}

QUIRE_API int quire_draw(void* context, const Logits* logits, const Draw* how, int64_t* ids,
                         int num_threads) {
  return choose(context, *logits, num_threads, [&](Thread& thread, const Functions& use) {
    use.draw(thread, *logits, *how, ids);
  });
}

QUIRE_API int quire_top(void* context, const Logits* logits, int64_t k, float* values,
                        int64_t* ids, int num_threads) {
  return choose(context, *logits, num_threads, [&](Thread& thread, const Functions& use) {
    use.top(thread, *logits, k, values, ids);
  });
}

QUIRE_API int quire_log_probabilities(void* context, const Logits* logits, const int64_t* targets,
                                      int64_t k, int64_t* ids, float* values, int64_t* ranks,
                                      int num_threads) {
  return choose(context, *logits, num_threads, [&](Thread& thread, const Functions& use) {
    use.log_probabilities(thread, *logits, targets, k, ids, values, ranks);
  });
}

QUIRE_API void quire_penalize(float* logits, int64_t stride, const Penalties* p) {
  for (int64_t i = 0; i < p->num_entries; ++i) {
    float& logit = logits[p->rows[i] * stride + p->token_ids[i]];
    logit = logit < 0 ? logit * p->repetition[i] : logit / p->repetition[i];
    logit -= p->frequency[i] * p->counts[i] + (p->counts[i] > 0 ? p->presence[i] : 0.0f);
  }
}

QUIRE_API void quire_mask(float* logits, int64_t stride, int64_t vocab, const int64_t* rows,
                          int64_t num_masks, const uint32_t* words, int64_t num_words) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  for (int64_t m = 0; m < num_masks; ++m, words += num_words) {
    float* row = logits + rows[m] * stride;
    for (int64_t w = 0; w * 32 < vocab; ++w) {
      const uint32_t word = w < num_words ? words[w] : 0;
      const int64_t first = w * 32, count = std::min<int64_t>(32, vocab - first);
      if (word == 0) {
        std::fill(row + first, row + first + count, kNone);
      } else if (count < 32) {
        for (int64_t i = 0; i < count; ++i) {
          if ((word >> i & 1) == 0) row[first + i] = kNone;
        }
      } else if (word != ~uint32_t{0}) {
        mask_word(row + first, word);
      }
    }
  }
}
