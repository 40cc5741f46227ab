// A whole step: tokens in, hidden states out, keys and values into the cache.
#pragma once
#include "attention.h"
#include "dots.h"
#include "plan.h"

namespace quire {
namespace QUIRE_ISA {

inline void embed(Thread& thread, const Model& model, const Batch& batch, float* x, float* narrow,
                  uint16_t* halves) {
  const int64_t hidden = model.hidden_size, width = model.embedding_size;
  const bool projects = model.project_in.blocks != nullptr || model.project_in.tail != nullptr;
  float* rows = projects ? narrow : x;
  thread.share(batch.num_tokens, [&](int64_t t) {
    const int64_t id = batch.input_ids[t];
    float* row = rows + t * width;
    if (model.embed_is_packed) {
      unpack_row(model.embed, id, row);
    } else if (model.embed.dtype == kBFloat16) {
      copy_row(static_cast<const uint16_t*>(model.embed.blocks) + id * width, width, row);
    } else {
      copy_row(static_cast<const float*>(model.embed.blocks) + id * width, width, row);
    }
    if (model.embedding_scale != 0.0f) {
      for (int64_t i = 0; i < width; ++i) row[i] *= model.embedding_scale;
    }
  });
  if (projects) {
    multiply(thread, {rows, width, batch.num_tokens, x, hidden, &model.project_in}, halves);
  }
  if (model.positions == nullptr) return;
  thread.share(batch.num_tokens, [&](int64_t t) {
    for (int64_t i = 0; i < hidden; ++i) {
      const int64_t at = batch.positions[t] * hidden + i;
      x[t * hidden + i] += model.dtype == kBFloat16
                               ? widen(static_cast<const uint16_t*>(model.positions)[at])
                               : static_cast<const float*>(model.positions)[at];
    }
  });
}

inline void normalize_all(Thread& thread, const Norm& norm, const float* x, int64_t num_tokens,
                          int64_t size, float* out) {
  thread.share(num_tokens, [&](int64_t t) { normalize(norm, x + t * size, size, out + t * size); });
}

// What a norm makes of `x`, added to `out`.
inline void add_normalized(Thread& thread, const Norm& norm, float* x, int64_t num_tokens, int64_t size,
                           float* out) {
  thread.share(num_tokens, [&](int64_t t) {
    float* row = x + t * size;
    normalize(norm, row, size, row);
    for (int64_t i = 0; i < size; ++i) out[t * size + i] += row[i];
  });
}

// The attention of one layer, added to `x`.
inline void run_attention(Thread& thread, const Model& model, const Layer& layer, const Batch& batch,
                          const AttentionPlan& plan, const Buffers& rows,
                          AttentionScratch& scratch) {
  const int64_t hidden = model.hidden_size, count = batch.num_tokens;
  const int64_t width = layer.qkv.out, heads = static_cast<int64_t>(layer.num_heads) * layer.head_dim;
  const float* input = layer.residual == kPost ? rows.x : rows.normed;
  multiply(thread, {input, hidden, count, rows.qkv, width, &layer.qkv},
             rows.halves);
  thread.share(count, [&](int64_t t) {
    float* qkv = rows.qkv + t * width;
    if (layer.cache_dtype == kBFloat16) {
      prepare_heads<uint16_t>(layer, batch.positions[t], batch.slot_mapping[t], qkv);
    } else {
      prepare_heads<float>(layer, batch.positions[t], batch.slot_mapping[t], qkv);
    }
  });
  attend(thread,
         {&layer, &batch, rows.qkv, width, rows.attended, &plan, rows.partial, rows.partial_width},
         scratch);
  if (layer.attention_post_norm.kind == kNoNorm) {
    multiply(thread, {rows.attended, heads, count, rows.x, hidden, &layer.out, Then::kAdd},
             rows.halves);
  } else {
    multiply(thread, {rows.attended, heads, count, rows.normed, hidden, &layer.out},
             rows.halves);
    add_normalized(thread, layer.attention_post_norm, rows.normed, count, hidden, rows.x);
  }
}

// The MLP of one layer on `input`, added to `x`.
inline void run_mlp(Thread& thread, const Model& model, const Layer& layer, const Batch& batch,
                    const float* input, const Buffers& rows) {
  const int64_t hidden = model.hidden_size, count = batch.num_tokens, size = layer.up.out;
  Product up{input, hidden, count, rows.inner, size, &layer.up, Then::kActivate, layer.activation};
  if (layer.gated) {
    up.weight = &layer.gate;
    up.factor = &layer.up;
    up.then = Then::kActivateAndMultiply;
  }
  multiply(thread, up, rows.halves);
  if (layer.mlp_post_norm.kind == kNoNorm) {
    multiply(thread, {rows.inner, size, count, rows.x, hidden, &layer.down, Then::kAdd},
             rows.halves);
  } else {
    multiply(thread, {rows.inner, size, count, rows.normed, hidden, &layer.down},
             rows.halves);
    add_normalized(thread, layer.mlp_post_norm, rows.normed, count, hidden, rows.x);
  }
}

inline void forward(Thread& thread, const Model& model, const Batch& batch, const AttentionPlan& plan,
                    const Buffers& rows) {
  const TileSession session;
  const int64_t hidden = model.hidden_size, count = batch.num_tokens;
  AttentionScratch scratch;
  scratch.memory = thread.scratch();
  embed(thread, model, batch, rows.x, rows.inner, rows.halves);
  for (int32_t i = 0; i < model.num_layers; ++i) {
    const Layer& layer = model.layers[i];
    if (layer.residual != kPost) {
      normalize_all(thread, layer.attention_norm, rows.x, count, hidden, rows.normed);
    }
    const float* mlp_input = rows.normed;
    if (layer.residual == kParallel && layer.mlp_norm.kind != kNoNorm) {
      normalize_all(thread, layer.mlp_norm, rows.x, count, hidden, rows.second);
      mlp_input = rows.second;
    }
    run_attention(thread, model, layer, batch, plan, rows, scratch);
    if (layer.residual == kSequential) {
      normalize_all(thread, layer.mlp_norm, rows.x, count, hidden, rows.normed);
    } else if (layer.residual == kPost) {
      normalize_all(thread, layer.attention_norm, rows.x, count, hidden, rows.x);
      mlp_input = rows.x;
    }
    run_mlp(thread, model, layer, batch, mlp_input, rows);
    if (layer.residual == kPost) {
      normalize_all(thread, layer.mlp_norm, rows.x, count, hidden, rows.x);
    }
  }
  normalize_all(thread, model.final_norm, rows.x, count, hidden, batch.hidden);
}

// Logits of some rows of hidden states, [num_rows][vocab_size].
inline void logits(Thread& thread, const Model& model, const float* hidden, int64_t num_rows,
                   float* narrow, uint16_t* halves, float* out) {
  const TileSession session;
  const float* x = hidden;
  int64_t width = model.hidden_size;
  if (model.project_out.blocks != nullptr || model.project_out.tail != nullptr) {
    const int64_t size = model.project_out.out;
    multiply(thread, {x, width, num_rows, narrow, size, &model.project_out}, halves);
    x = narrow;
    width = size;
  }
  const int64_t vocab = model.head.out;
  multiply(thread, {x, width, num_rows, out, vocab, &model.head}, halves);
  if (model.logits_softcap <= 0.0f) return;
  thread.share(num_rows, [&](int64_t r) {
    float* row = out + r * vocab;
    int64_t i = 0;
    for (; i + kLanes <= vocab; i += kLanes) {
      store(row + i, tanh(load(row + i) / model.logits_softcap) * model.logits_softcap);
    }
    for (; i < vocab; ++i) row[i] = tanh(all(row[i] / model.logits_softcap))[0] * model.logits_softcap;
  });
}

}  // namespace QUIRE_ISA
}  // namespace quire
