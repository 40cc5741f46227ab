// What goes over a chunk of keys works on: where they lie, a thread's memory for them, and the
// softmax of their scores.
#pragma once
#include <utility>

#include "plan.h"
#include "rows.h"

namespace quire {
namespace QUIRE_ISA {

struct Attention {
  const Layer* layer;
  const Batch* batch;
  const float* qkv;
  int64_t qkv_width;
  float* out;  // [num_tokens][num_heads * head_dim]
  const AttentionPlan* plan;
  float* partial;
  int64_t partial_width;
};

// Lanes of two vectors, counted through.
template <int... Lane>
inline vf shuffle(vf a, vf b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lane...);
#else
  constexpr vi kLane = {Lane...};  // a constant: made lane by lane, it takes longer than its use
  return __builtin_shuffle(a, b, kLane);
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(QUIRE_WIDE)
// Neighbours within halves of a vector first: these shuffles are one instruction each.
inline void transpose(vf (&rows)[8]) {
  vf t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(rows[i], rows[i + 1]);
    t[i + 1] = shuffle<2, 10, 3, 11, 6, 14, 7, 15>(rows[i], rows[i + 1]);
  }
  vf u[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      u[i + 2 * h] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(t[i + h], t[i + 2 + h]);
      u[i + 2 * h + 1] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(t[i + h], t[i + 2 + h]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(u[i], u[i + 4]);
    rows[i + 4] = shuffle<4, 5, 6, 7, 12, 13, 14, 15>(u[i], u[i + 4]);
  }
}
#else
template <int Half, int... Lane>
inline void transpose_halves(vf (&rows)[kLanes], std::integer_sequence<int, Lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & Half) != 0) continue;
    const vf a = rows[i], b = rows[i + Half];
    rows[i] = shuffle<((Lane & Half) == 0 ? Lane : kLanes + Lane - Half)...>(a, b);
    rows[i + Half] = shuffle<((Lane & Half) == 0 ? Lane + Half : kLanes + Lane)...>(a, b);
  }
  if constexpr (Half > 1) {
    transpose_halves<Half / 2>(rows, std::make_integer_sequence<int, kLanes>());
  }
}

inline void transpose(vf (&rows)[kLanes]) {
  transpose_halves<kLanes / 2>(rows, std::make_integer_sequence<int, kLanes>());
}
#endif

// One thread's memory for attention, laid out anew for each piece.
struct AttentionScratch {
  float* memory;
  float *query, *key, *value, *scores, *part_values, *sum_values;
  float *part_highest, *part_total, *sum_highest, *sum_total;

  void lay_out(int64_t rows, int64_t dim) {
    const int64_t wide = padded(dim, kBlock), row = padded(rows, kBlock);
    const int64_t sizes[] = {rows * wide, wide * kChunk, wide * kChunk, rows * kChunk, rows * wide,
                             rows * wide, row,           row,           row,           row};
    float** places[] = {&query,      &key,          &value,      &scores,      &part_values,
                        &sum_values, &part_highest, &part_total, &sum_highest, &sum_total};
    float* next = memory;
    for (int i = 0; i < 10; ++i) {
      *places[i] = next;
      next += sizes[i];
    }
  }
};

// Where the rows of a chunk lie. Those before `low`, which nobody sees, may lie in blocks that are
// another sequence's by now: slot 0 stands for them, of the block that is always zero.
template <typename T>
inline void find_rows(const Attention& a, int sequence, int head, int64_t first, int low,
                      int count, const T* (&keys)[kChunk], const T* (&values)[kChunk]) {
  const Layer& layer = *a.layer;
  const int64_t size = row_size<T>(layer.head_dim), width = layer.num_kv_heads * size;
  const int32_t* block = a.batch->block_tables + sequence * a.batch->block_table_stride +
                         (first + low) / a.batch->block_size;
  int64_t offset = (first + low) % a.batch->block_size;
  for (int i = 0; i < count; ++i) {
    int64_t at = head * size;
    if (i >= low) {
      at += (*block * a.batch->block_size + offset) * width;
      if (++offset == a.batch->block_size) {
        offset = 0;
        ++block;
      }
    }
    keys[i] = static_cast<const T*>(layer.key_cache) + at;
    values[i] = static_cast<const T*>(layer.value_cache) + at;
    // Blocks lie anywhere: ask for all of them before the first is waited for.
    for (int64_t d = 0; d < size; d += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(keys[i] + d);
      __builtin_prefetch(values[i] + d);
    }
  }
}

// Scores of `used` keys of a chunk, of which it has `count`, become weights by the softmax so far,
// and what was made of earlier keys shrinks accordingly. `Round`: to bfloat16, in the first half of
// each row's memory, and it is the rounded weights that sum up to one.
template <bool Round>
inline void weigh_rows(const Layer& layer, int head, int64_t rows, int64_t first, int count,
                       int used, int64_t first_position, AttentionScratch& s) {
  const int64_t wide = padded(layer.head_dim, kBlock);
  const int group = layer.num_heads / layer.num_kv_heads;
  const float none = -std::numeric_limits<float>::infinity();
  for (int64_t r = 0; r < rows; ++r) {
    float* scores = s.scores + r * kChunk;
    const int64_t position = first_position + r / group;
    // Keys first + low up to first + high - 1 are seen.
    const int64_t high = std::min<int64_t>(count, position + 1 - first);
    const int64_t low =
        layer.sliding_window > 0
            ? std::max<int64_t>(0, position + 1 - layer.sliding_window - first)
            : 0;
    if (high <= low) {
      std::fill(scores, scores + used, 0.0f);
      continue;
    }
    if (layer.softcap > 0.0f) {
      for (int i = 0; i < used; i += kLanes) {
        store(scores + i, tanh(load(scores + i) / layer.softcap) * layer.softcap);
      }
    }
    if (layer.alibi_slopes != nullptr) {
      const float slope = layer.alibi_slopes[head * group + r % group];
      for (int i = 0; i < used; ++i) {
        scores[i] += slope * static_cast<float>(first + i - position);
      }
    }
    for (int64_t i = 0; i < low; ++i) scores[i] = none;
    for (int64_t i = high; i < used; ++i) scores[i] = none;
    vf most = all(none);
    for (int i = 0; i < used; i += kLanes) most = max(load(scores + i), most);
    const float old = s.part_highest[r];
    const float highest = std::max(largest(most), old);
    // Scores that are all -inf weigh nothing; what is no number shows in the sum.
    if (highest == none && std::none_of(scores, scores + used, [](float x) { return x != x; })) {
      std::fill(scores, scores + used, 0.0f);
      continue;
    }
    vf total = all(0.0f);
    for (int i = 0; i < used; i += kLanes) {
      const vf weight = exp(load(scores + i) - highest);
      if constexpr (Round) {
        // Written behind what is still to be read.
        store_row(reinterpret_cast<uint16_t*>(scores) + i, weight);
        total += (vf)(rounded_bits(weight) & 0xffff0000u);
      } else {
        store(scores + i, weight);
        total += weight;
      }
    }
    const float shrink = exp(all(old - highest))[0];
    s.part_total[r] = s.part_total[r] * shrink + sum(total);
    s.part_highest[r] = highest;
    float* values = s.part_values + r * wide;
    for (int64_t d = 0; d < wide; d += kLanes) store(values + d, load(values + d) * shrink);
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
