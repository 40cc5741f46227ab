// The library's door: plain C functions, called from Python by ctypes.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <iterator>
#include <mutex>
#include <new>

#include "isa.h"

#define QUIRE_API extern "C" __attribute__((visibility("default")))

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

// At least as many as a program has: of each layer, and before and after them all.
constexpr size_t kLoopsPerLayer = 24;
constexpr size_t kLoopsBeside = 16;

// Memory for the steps of one model; one step at a time.
struct Context {
  std::mutex in_use;
  Memory x, normed, second, inner, partial, scratch, narrow, halves;

  uint16_t* reserve_halves(const Model& model, int64_t num_rows) {
    return reinterpret_cast<uint16_t*>(halves.reserve(halves_size(model, num_rows)));
  }
};

// 16 rows of a weight, one after the other, into one block.
template <typename T>
void pack_block(const T* rows, int64_t num_rows, int64_t in, T* block) {
  constexpr int64_t pair = sizeof(T) == 2 ? 2 : 1;
  for (int64_t r = 0; r < 16; ++r) {
    for (int64_t k = 0; k < in; ++k) {
      block[(k / pair * 16 + r) * pair + k % pair] = r < num_rows ? rows[r * in + k] : T{0};
    }
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

// Functions return 0, -1 when there is not enough memory, -2 when a thread cannot be started.

QUIRE_API const char* quire_isa() { return isa().name; }

// The name of each instruction set that this machine has, the best first; null after the last.
QUIRE_API const char* quire_isa_at(int index) {
  for (const Isa* each : kAll) {
    if (is_usable(each) && index-- == 0) return each->name;
  }
  return nullptr;
}

// Use this instruction set from now on, by all threads; -1 if it is unknown or not there.
QUIRE_API int quire_choose_isa(const char* name) {
  for (const Isa* each : kAll) {
    if (is_usable(each) && std::strcmp(each->name, name) == 0) {
      chosen.store(each, std::memory_order_release);
      return 0;
    }
  }
  return -1;
}

QUIRE_API int64_t quire_struct_size(int which) {
  const int64_t sizes[] = {sizeof(Norm), sizeof(Matrix), sizeof(Layer), sizeof(Model),
                           sizeof(Batch)};
  return which >= 0 && which < 5 ? sizes[which] : -1;
}

// Bring a weight [out, in] into blocks, in place; what is left over of the last goes to `tail`.
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

QUIRE_API void* quire_context_new() { return new (std::nothrow) Context; }

QUIRE_API void quire_context_free(void* context) { delete static_cast<Context*>(context); }

QUIRE_API int quire_forward(void* context, const Model* model, const Batch* batch,
                            int num_threads) {
  num_threads = std::max(num_threads, 1);
  try {
    Context& c = *static_cast<Context*>(context);
    std::lock_guard<std::mutex> lock(c.in_use);
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
                          c.reserve_halves(*model, count)};
    const Isa& use = isa();
    run_team(num_threads, kLoopsBeside + model->num_layers * kLoopsPerLayer,
             c.scratch.reserve(num_threads * size), size,
             [&](Thread& thread) { use.forward(thread, *model, *batch, plan, buffers); });
  } catch (const std::bad_alloc&) {
    return -1;
  } catch (const std::exception&) {
    return -2;
  }
  return 0;
}

QUIRE_API int quire_logits(void* context, const Model* model, const float* hidden,
                           int64_t num_rows, float* out, int num_threads) {
  num_threads = std::max(num_threads, 1);
  try {
    Context& c = *static_cast<Context*>(context);
    std::lock_guard<std::mutex> lock(c.in_use);
    float* narrow = c.narrow.reserve(num_rows * model->project_out.out);
    uint16_t* halves = c.reserve_halves(*model, num_rows);
    const Isa& use = isa();
    const int64_t size = scratch_size(*model);
    run_team(num_threads, kLoopsBeside, c.scratch.reserve(num_threads * size), size,
             [&](Thread& thread) {
               use.logits(thread, *model, hidden, num_rows, narrow, halves, out);
             });
  } catch (const std::bad_alloc&) {
    return -1;
  } catch (const std::exception&) {
    return -2;
  }
  return 0;
}
