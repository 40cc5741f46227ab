// What is done token by token: embedding, norms, rotation, and the way into the KV cache.
#pragma once
#include "cache_rows.h"
#include "float_values.h"
#include "gemm.h"
#include "int_codes.h"

namespace quire {
namespace QUIRE_ISA {

// Apply a norm to `size` numbers; `out` may be `x`.
inline void normalize(const Norm& norm, const float* x, int64_t size, float* out) {
  if (norm.kind == kNoNorm) {
    if (out != x) std::memcpy(out, x, size * sizeof(float));
    return;
  }
  const int64_t whole = size / kLanes * kLanes;
  float mean = 0.0f;
  if (norm.kind == kLayerNorm) {
    vf total = all(0.0f);
    for (int64_t i = 0; i < whole; i += kLanes) total += load(x + i);
    float s = sum(total);
    for (int64_t i = whole; i < size; ++i) s += x[i];
    mean = s / static_cast<float>(size);
  }
  vf squares = all(0.0f);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const vf d = load(x + i) - mean;
    squares = d * d + squares;
  }
  float s = sum(squares);
  for (int64_t i = whole; i < size; ++i) s += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / std::sqrt(s / static_cast<float>(size) + norm.eps);
  for (int64_t i = 0; i < whole; i += kLanes) {
    vf v = (load(x + i) - mean) * factor;
    if (norm.weight != nullptr) v = v * load(norm.weight + i);
    if (norm.bias != nullptr) v = v + load(norm.bias + i);
    store(out + i, v);
  }
  for (int64_t i = whole; i < size; ++i) {
    float v = (x[i] - mean) * factor;
    if (norm.weight != nullptr) v = v * norm.weight[i];
    if (norm.bias != nullptr) v = v + norm.bias[i];
    out[i] = v;
  }
}

// One row of an embedding that lies in rows.
template <typename T>
inline void copy_row(const T* row, int64_t size, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, load_row(row + i));
  for (; i < size; ++i) out[i] = load_one(row + i);
}

// One row of an embedding that is packed for the product with the output matrix.
inline void unpack_row(const Matrix& table, int64_t id, float* out) {
  const int64_t column = id % kBlock;
  if (table.dtype == kFloat8 || table.dtype == kTable4) {
    read_values(table, id, out);
    return;
  }
  if (table.codes != nullptr) {
    read_codes(table, id, out);
    return;
  }
  if (table.dtype == kBFloat16) {
    const uint16_t* block = block_of<uint16_t>(table, id / kBlock) + 2 * column;
    for (int64_t k = 0; k < table.in; k += 2) {
      out[k] = widen(block[k * kBlock]);
      out[k + 1] = widen(block[k * kBlock + 1]);
    }
  } else {
    const float* block = block_of<float>(table, id / kBlock) + column;
    for (int64_t k = 0; k < table.in; ++k) out[k] = block[k * kBlock];
  }
}

// What an adapter adds to a token's embedding.
template <typename T>
inline void add_embedding(const Adapter& adapter, int64_t id, float* row) {
  const int64_t rank = adapter.embed_a.in, size = adapter.embed_b.in;
  const T* a = static_cast<const T*>(adapter.embed_a.blocks) + id * rank;
  const T* b = static_cast<const T*>(adapter.embed_b.blocks);
  for (int64_t k = 0; k < rank; ++k, b += size) {
    const float input = adapter.embed_scale * load_one(a + k);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(row + i, load_row(b + i) * input + load(row + i));
    for (; i < size; ++i) row[i] += load_one(b + i) * input;
  }
}

// A token's embedding, as it lies in the model, or in the adapter, if there is one. Zeros, if it is
// another rank's.
inline void embed_token(const Model& model, const Adapter* adapter, int64_t id, float* row) {
  const int64_t width = model.embedding_size;
  if (model.comm != nullptr) {
    id -= model.first_token;
    if (id < 0 || id >= model.embed.out) {
      std::fill_n(row, width, 0.0f);
      return;
    }
  }
  const bool is_own = adapter != nullptr && adapter->embed.blocks != nullptr;
  const Matrix& table = is_own ? adapter->embed : model.embed;
  if (model.embed_is_packed && !is_own) {
    unpack_row(table, id, row);
  } else if (table.dtype == kBFloat16) {
    copy_row(static_cast<const uint16_t*>(table.blocks) + id * width, width, row);
  } else {
    copy_row(static_cast<const float*>(table.blocks) + id * width, width, row);
  }
  if (adapter == nullptr || adapter->embed_a.blocks == nullptr) return;
  if (adapter->embed_a.dtype == kBFloat16) {
    add_embedding<uint16_t>(*adapter, id, row);
  } else {
    add_embedding<float>(*adapter, id, row);
  }
}

inline void rotate(const Layer& layer, int64_t position, float* head) {
  const int half = layer.rotary_dim / 2;
  const float* cos = layer.cos + position * half;
  const float* sin = layer.sin + position * half;
  if (layer.interleaved) {
    for (int i = 0; i < half; ++i) {
      const float a = head[2 * i], b = head[2 * i + 1];
      head[2 * i] = a * cos[i] - b * sin[i];
      head[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const vf a = load(head + i), b = load(head + half + i);
    const vf c = load(cos + i), s = load(sin + i);
    store(head + i, a * c - b * s);
    store(head + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

// Norms and rotation of a token's queries and keys; its keys and values into the cache.
template <typename T>
inline void prepare_heads(const Layer& layer, int64_t position, int64_t slot, float* qkv) {
  const int64_t dim = layer.head_dim;
  const int64_t num_heads = layer.num_heads, num_kv_heads = layer.num_kv_heads;
  if (layer.clip_qkv > 0.0f) {
    for (int64_t i = 0; i < (num_heads + 2 * num_kv_heads) * dim; ++i) {
      const float x = qkv[i];
      qkv[i] = x < -layer.clip_qkv ? -layer.clip_qkv : x > layer.clip_qkv ? layer.clip_qkv : x;
    }
  }
  for (int64_t h = 0; h < num_heads + num_kv_heads; ++h) {
    float* head = qkv + h * dim;
    const Norm& norm = h < num_heads ? layer.q_norm : layer.k_norm;
    if (norm.kind != kNoNorm) normalize(norm, head, dim, head);
    if (layer.rotary_dim > 0) rotate(layer, position, head);
  }
  const int64_t size = row_size<T>(dim), first = slot * num_kv_heads * size;
  const float *key = qkv + num_heads * dim, *value = key + num_kv_heads * dim;
  for (int64_t h = 0; h < num_kv_heads; ++h) {
    write_head(key + h * dim, dim, static_cast<T*>(layer.key_cache) + first + h * size);
    write_head(value + h * dim, dim, static_cast<T*>(layer.value_cache) + first + h * size);
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
