// A whole step: tokens in, hidden states out, keys and values into the cache.
#pragma once
#include "attention.h"
#include "dots.h"
#include "exchange.h"
#include "mixture.h"
#include "plan.h"
#include "sampling.h"

namespace quire {
namespace QUIRE_ISA {

// What the step begins with: tokens' embeddings, or what the layers before these made.
inline void embed(Thread& thread, const Model& model, const Batch& batch, const Buffers& buffers,
                  Exchange& exchange) {
  const int64_t hidden = model.hidden_size, width = model.embedding_size;
  if (batch.hidden_in != nullptr) {
    thread.share(batch.num_tokens, [&](int64_t t) {
      std::memcpy(buffers.x + t * hidden, batch.hidden_in + t * hidden, hidden * sizeof(float));
    });
    return;
  }
  const bool projects = model.project_in.blocks != nullptr || model.project_in.tail != nullptr;
  float* x = buffers.x;
  float* rows = projects ? buffers.inner : x;
  float* found = exchange.is_on() ? exchange.parts(batch.num_tokens * width) : rows;
  thread.share(batch.num_tokens, [&](int64_t t) {
    float* row = found + t * width;
    const Adapter* adapter = buffers.adapters == nullptr ? nullptr : buffers.adapters->of_row[t];
    embed_token(model, adapter, batch.input_ids[t], row);
    if (model.embedding_scale != 0.0f) {
      for (int64_t i = 0; i < width; ++i) row[i] *= model.embedding_scale;
    }
  });
  if (exchange.is_on()) {
    exchange.add(thread, batch.num_tokens * width, width,
                 [&](int64_t first, int64_t count, const float* sums) {
                   std::memcpy(rows + first, sums, count * sizeof(float));
                 });
  }
  if (projects) {
    multiply(thread, {rows, width, batch.num_tokens, x, hidden, &model.project_in},
             buffers.halves);
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

// A layer, and where its deltas begin among all.
struct Place {
  const Layer& layer;
  int64_t first_delta;
};

// The product of `count` rows with a weight, and what a norm makes of it, added to `x`. Of a weight
// that ranks share it is added up over these before that.
inline void add_product(Thread& thread, const float* input, int64_t size, int64_t count,
                        const Matrix& weight, int64_t delta, const Norm& norm,
                        const Buffers& rows, Exchange& exchange) {
  const int64_t hidden = weight.out;
  Product p{input, size, count, rows.x, hidden, &weight, Then::kAdd};
  p.adapters = rows.adapters;
  p.delta = delta;
  if (exchange.is_on()) {
    p.y = exchange.parts(count * hidden);
    p.then = Then::kStore;
    multiply(thread, p, rows.halves);
    add_sums(thread, exchange, count, hidden, norm, rows.x);
    return;
  }
  if (norm.kind == kNoNorm) {
    multiply(thread, p, rows.halves);
    return;
  }
  p.y = rows.normed;
  p.then = Then::kStore;
  multiply(thread, p, rows.halves);
  thread.share(count, [&](int64_t t) {
    float* row = rows.normed + t * hidden;
    normalize(norm, row, hidden, row);
    for (int64_t i = 0; i < hidden; ++i) rows.x[t * hidden + i] += row[i];
  });
}

// The attention of one layer, added to `x`.
inline void run_attention(Thread& thread, const Model& model, const Place& place,
                          const Batch& batch, const AttentionPlan& plan, const Buffers& rows,
                          AttentionScratch& scratch, Exchange& exchange) {
  const Layer& layer = place.layer;
  const int64_t hidden = model.hidden_size, count = batch.num_tokens;
  const int64_t width = layer.qkv.out, heads = static_cast<int64_t>(layer.num_heads) * layer.head_dim;
  const float* input = layer.residual == kPost ? rows.x : rows.normed;
  Product p{input, hidden, count, rows.qkv, width, &layer.qkv};
  p.adapters = rows.adapters;
  p.delta = place.first_delta + kQkv;
  multiply(thread, p, rows.halves);
  thread.share(count, [&](int64_t t) {
    float* qkv = rows.qkv + t * width;
    with_cache_type(layer.cache_dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      prepare_heads<T>(layer, batch.positions[t], batch.slot_mapping[t], qkv);
    });
  });
  attend(thread,
         {&layer, &batch, rows.qkv, width, rows.attended, &plan, rows.partial, rows.partial_width},
         scratch);
  add_product(thread, rows.attended, heads, count, layer.out, place.first_delta + kOut,
              layer.attention_post_norm, rows, exchange);
}

// What comes before the last projection of an MLP on `input`, to `rows.inner`.
inline void run_up(Thread& thread, const Model& model, const Place& place, int64_t count,
                   const float* input, const Buffers& rows) {
  const Layer& layer = place.layer;
  const int64_t hidden = model.hidden_size, size = layer.up.out;
  Product up{input, hidden, count, rows.inner, size, &layer.up, Then::kActivate, layer.activation};
  up.adapters = rows.adapters;
  up.delta = up.factor_delta = place.first_delta + kUp;
  if (layer.gated) {
    up.weight = &layer.gate;
    up.delta = place.first_delta + kGate;
  }
  if (layer.gated == kGatedAtOnce) {
    up.factor = &layer.up;
    up.then = Then::kActivateAndMultiply;
  }
  multiply(thread, up, rows.halves);
  if (layer.gated == kGatedApart) {
    up.weight = &layer.up;
    up.delta = up.factor_delta;
    up.then = Then::kMultiply;
    multiply_shrunk(thread, up, rows.halves);  // for adapters, the gate's inputs were shrunk
  }
}

// The mixture of experts of one layer on `input`, added to `x`.
inline void run_mixture(Thread& thread, const Model& model, const Place& place, int64_t count,
                        const float* input, const Buffers& rows, Exchange& exchange) {
  const Layer& layer = place.layer;
  const Mixture& mixture = *layer.mixture;
  const int64_t hidden = model.hidden_size, size = layer.up.out;
  const int64_t number = place.first_delta / kNumProjections;
  route_rows(thread, mixture, number, input, hidden, count, rows);
  if (size > 0) {  // an expert that all tokens have
    run_up(thread, model, place, count, input, rows);
    Product down{rows.inner, size, count, rows.normed, hidden, &layer.down};
    down.adapters = rows.adapters;
    down.delta = place.first_delta + kDown;
    multiply(thread, down, rows.halves);
  }
  run_experts(thread, mixture, number, layer.activation, hidden, rows);
  add_mixture(thread, mixture, size > 0, layer.mlp_post_norm, hidden, count, rows, exchange);
}

// The MLP of one layer on `input`, added to `x`.
inline void run_mlp(Thread& thread, const Model& model, const Place& place, const Batch& batch,
                    const float* input, const Buffers& rows, Exchange& exchange) {
  const Layer& layer = place.layer;
  const int64_t count = batch.num_tokens, size = layer.up.out;
  if (layer.mixture != nullptr) {
    run_mixture(thread, model, place, count, input, rows, exchange);
    return;
  }
  run_up(thread, model, place, count, input, rows);
  add_product(thread, rows.inner, size, count, layer.down, place.first_delta + kDown,
              layer.mlp_post_norm, rows, exchange);
}

inline void forward(Thread& thread, const Model& model, const Batch& batch, const AttentionPlan& plan,
                    const Buffers& rows) {
  const TileSession session;
  const int64_t hidden = model.hidden_size, count = batch.num_tokens;
  AttentionScratch scratch;
  scratch.memory = thread.scratch();
  Exchange exchange(rows);
  embed(thread, model, batch, rows, exchange);
  for (int32_t i = 0; i < model.num_layers; ++i) {
    const Layer& layer = model.layers[i];
    const Place place{layer, int64_t{i} * kNumProjections};
    if (layer.residual != kPost) {
      normalize_all(thread, layer.attention_norm, rows.x, count, hidden, rows.normed);
    }
    const float* mlp_input = rows.normed;
    if (layer.residual == kParallel && layer.mlp_norm.kind != kNoNorm) {
      normalize_all(thread, layer.mlp_norm, rows.x, count, hidden, rows.second);
      mlp_input = rows.second;
    }
    run_attention(thread, model, place, batch, plan, rows, scratch, exchange);
    if (layer.residual == kSequential) {
      normalize_all(thread, layer.mlp_norm, rows.x, count, hidden, rows.normed);
    } else if (layer.residual == kPost) {
      normalize_all(thread, layer.attention_norm, rows.x, count, hidden, rows.x);
      mlp_input = rows.x;
    }
    run_mlp(thread, model, place, batch, mlp_input, rows, exchange);
    if (layer.residual == kPost) {
      normalize_all(thread, layer.mlp_norm, rows.x, count, hidden, rows.x);
    }
  }
  normalize_all(thread, model.final_norm, rows.x, count, hidden, batch.hidden);
}

inline void soften(const Model& model, float* row, int64_t count) {
  if (model.logits_softcap <= 0.0f) return;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(row + i, tanh(load(row + i) / model.logits_softcap) * model.logits_softcap);
  }
  for (; i < count; ++i) row[i] = tanh(all(row[i] / model.logits_softcap))[0] * model.logits_softcap;
}

// What the head is multiplied with: `hidden`, or what is projected from it to `narrow`. It is shrunk
// already for what adapters add.
inline Product head_product(Thread& thread, const Model& model, const float* hidden,
                            int64_t num_rows, const AdapterPlan* adapters, float* narrow,
                            uint16_t* halves) {
  Product p{hidden, model.hidden_size, num_rows, nullptr, model.head.out, &model.head};
  p.adapters = adapters;
  p.delta = int64_t{model.num_layers} * kNumProjections;
  if (model.project_out.blocks != nullptr || model.project_out.tail != nullptr) {
    const int64_t size = model.project_out.out;
    multiply(thread, {hidden, model.hidden_size, num_rows, narrow, size, &model.project_out},
             halves);
    p.x = narrow;
    p.ldx = size;
  }
  if (adapters != nullptr) shrink(thread, *adapters, p.delta, p.x, p.ldx);
  return p;
}

// Logits of some rows of hidden states, [num_rows][vocab_size].
inline void logits(Thread& thread, const Model& model, const float* hidden, int64_t num_rows,
                   const AdapterPlan* adapters, float* narrow, uint16_t* halves, float* out) {
  const TileSession session;
  Product p = head_product(thread, model, hidden, num_rows, adapters, narrow, halves);
  p.y = out;
  multiply_shrunk(thread, p, halves);
  const int64_t vocab = model.head.out;
  thread.share(num_rows, [&](int64_t r) { soften(model, out + r * vocab, vocab); });
}

// The likeliest token after some rows of hidden states, and its logit: no number where one of the
// row's logits is none. No more than a stretch of the logits is there at a time.
inline void likeliest(Thread& thread, const Model& model, const Likeliest& what) {
  const TileSession session;
  const int64_t hidden = model.hidden_size;
  thread.share(what.num_rows, [&](int64_t r) {
    std::memcpy(what.rows + r * hidden, what.hidden + what.indices[r] * hidden,
                hidden * sizeof(float));
    what.ids[r] = model.first_token;
    what.highest[r] = -std::numeric_limits<float>::infinity();
  });
  Product p = head_product(thread, model, what.rows, what.num_rows, what.adapters, what.narrow,
                           what.halves);
  p.y = what.logits;
  p.ldy = what.width;
  const Matrix& head = model.head;
  for (int64_t first = 0; first < head.out; first += what.width) {
    Matrix part = head;
    part.out = std::min(what.width, head.out - first);
    part.blocks = static_cast<const char*>(head.blocks) + first / kBlock * block_bytes(head);
    if (head.bias != nullptr) part.bias = head.bias + first;
    Codes codes{};
    if (head.codes != nullptr) {
      codes = *head.codes;
      if (codes.has_tables) codes.tables += first * 16;
      if (codes.outlier_first != nullptr) codes.outlier_first += first;
      part.codes = &codes;
    }
    p.weight = &part;
    p.skipped = first;
    multiply_shrunk(thread, p, what.halves);
    thread.share(what.num_rows, [&](int64_t r) {
      float* logits = what.logits + r * what.width;
      soften(model, logits, part.out);
      find_highest(logits, part.out, model.first_token + first, what.ids[r], what.highest[r]);
    });
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
