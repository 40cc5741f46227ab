// Causal attention over the paged KV cache, with a running softmax (Milakov and Gimelshein,
// arXiv:1805.02867; Dao et al., arXiv:2205.14135).
//
// Keys are taken in chunks, and chunks in parts, whose borders are fixed places in the sequence;
// parts are merged in ascending order. So a token's result has the same bits whatever is computed
// beside it, and on however many threads.
#pragma once
#include "attention_tiles.h"
#include "chunk.h"

namespace quire {
namespace QUIRE_ISA {

// A chunk of keys as blocks [16 keys][dim][16], of values as blocks [16 dims][keys][16].
template <typename T>
inline void load_chunk(const Attention& a, int sequence, int head, int64_t first, int low,
                       int count, AttentionScratch& s) {
  const Layer& layer = *a.layer;
  const int64_t dim = layer.head_dim, wide = padded(dim, kBlock);
  const T *keys[kChunk], *values[kChunk];
  find_rows(a, sequence, head, first, low, count, keys, values);
  float scales[kChunk];  // of keys
  for (int i = 0; i < count; ++i) {
    const T* value = values[i];
    const float scale = row_scale(value, dim);
    scales[i] = row_scale(keys[i], dim);
    int64_t d = 0;
    for (; d + kBlock <= dim; d += kBlock) {
      float* out = s.value + (d / kBlock * kChunk + i) * kBlock;
      for (int v = 0; v < kBlock; v += kLanes) store(out + v, load_part(value, d + v, scale));
    }
    for (; d < wide; ++d) {
      s.value[(d / kBlock * kChunk + i) * kBlock + d % kBlock] =
          d < dim ? load_element(value, d, scale) : 0;
    }
  }
  for (int64_t b = 0; b < wide / kBlock; ++b) {
    std::fill(s.value + (b * kChunk + count) * kBlock, s.value + (b + 1) * kChunk * kBlock, 0.0f);
  }
  const int whole = count / kLanes * kLanes;
  const int64_t whole_dim = dim / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    float* out = s.key + i / kBlock * dim * kBlock + i % kBlock;
    for (int64_t d = 0; d < whole_dim; d += kLanes) {
      vf rows[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) rows[l] = load_part(keys[i + l], d, scales[i + l]);
      transpose(rows);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) store(out + (d + l) * kBlock, rows[l]);
    }
    for (int64_t d = whole_dim; d < dim; ++d) {
      for (int l = 0; l < kLanes; ++l) {
        out[d * kBlock + l] = load_element(keys[i + l], d, scales[i + l]);
      }
    }
  }
  for (int i = whole; i < padded(count, kBlock); ++i) {
    float* out = s.key + i / kBlock * dim * kBlock + i % kBlock;
    if (i >= count) {
      for (int64_t d = 0; d < dim; ++d) out[d * kBlock] = 0.0f;
      continue;
    }
    for (int64_t d = 0; d < whole_dim; d += kLanes) {
      const vf part = load_part(keys[i], d, scales[i]);
      for (int l = 0; l < kLanes; ++l) out[(d + l) * kBlock] = part[l];
    }
    for (int64_t d = whole_dim; d < dim; ++d) {
      out[d * kBlock] = load_element(keys[i], d, scales[i]);
    }
  }
}

template <bool Accumulate>
inline void all_rows(int64_t rows, const float* x, int64_t ldx, int64_t depth, const float* block,
                     float* out, int64_t ldo) {
  const int64_t passes = (rows + kMostRows - 1) / kMostRows;
  const int64_t step = (rows + passes - 1) / passes;
  for (int64_t row = 0; row < rows; row += step) {
    const int count = static_cast<int>(std::min(step, rows - row));
    tile<Accumulate>(count, x + row * ldx, ldx, depth, block, out + row * ldo, ldo);
  }
}

// One chunk for all rows: scores, their softmax so far, and what it weighs of the values.
inline void attend_chunk(const Layer& layer, int head, int64_t rows, int64_t first, int count,
                         int64_t first_position, AttentionScratch& s) {
  const int64_t dim = layer.head_dim, wide = padded(dim, kBlock);
  const int used = static_cast<int>(padded(count, kBlock));
  for (int b = 0; b < used; b += kBlock) {
    all_rows<false>(rows, s.query, dim, dim, s.key + b * dim, s.scores + b, kChunk);
  }
  weigh_rows<false>(layer, head, rows, first, count, used, first_position, s);
  for (int64_t d = 0; d < wide; d += kBlock) {
    all_rows<true>(rows, s.scores, kChunk, used, s.value + d * kChunk, s.part_values + d, wide);
  }
}

// Bring rows of one part's results into the sums; `stride` lies between the rows of each.
inline void merge_rows(int64_t rows, int64_t wide, const float* highest, const float* total,
                       int64_t stride, const float* values, int64_t values_stride,
                       AttentionScratch& s) {
  for (int64_t r = 0; r < rows; ++r) {
    const float part_highest = highest[r * stride];
    if (total[r * stride] == 0.0f) continue;  // nothing in that part is seen
    const float most = std::max(part_highest, s.sum_highest[r]);
    const float keep = exp(all(s.sum_highest[r] - most))[0];
    const float take = exp(all(part_highest - most))[0];
    s.sum_highest[r] = most;
    s.sum_total[r] = s.sum_total[r] * keep + total[r * stride] * take;
    const float* from = values + r * values_stride;
    float* to = s.sum_values + r * wide;
    for (int64_t d = 0; d < wide; d += kLanes) {
      store(to + d, load(to + d) * keep + load(from + d) * take);
    }
  }
}

inline void clear(int64_t rows, int64_t wide, float* highest, float* total, float* values) {
  std::fill(highest, highest + rows, -std::numeric_limits<float>::infinity());
  std::fill(total, total + rows, 0.0f);
  std::fill(values, values + rows * wide, 0.0f);
}

// Divide by the sums, and bring the rows, which are ordered by query and then head, to their place.
inline void finish_rows(const Attention& a, int sequence, int first_query, int num_queries,
                        int head, const AttentionScratch& s) {
  const int64_t dim = a.layer->head_dim, wide = padded(dim, kBlock);
  const int num_heads = a.layer->num_heads, group = num_heads / a.layer->num_kv_heads;
  const int64_t token = a.batch->query_start_loc[sequence] + first_query;
  for (int64_t r = 0; r < static_cast<int64_t>(num_queries) * group; ++r) {
    const float* values = s.sum_values + r * wide;
    const float factor = 1.0f / s.sum_total[r];
    float* out = a.out + ((token + r / group) * num_heads + head * group + r % group) * dim;
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(out + d, load(values + d) * factor);
    for (; d < dim; ++d) out[d] = values[d] * factor;
  }
}

template <typename T>
inline void attend_piece(const Attention& a, const Piece& piece, int head, AttentionScratch& s) {
  const Layer& layer = *a.layer;
  const Batch& batch = *a.batch;
  const int64_t dim = layer.head_dim, wide = padded(dim, kBlock);
  const int group = layer.num_heads / layer.num_kv_heads;
  const int64_t rows = static_cast<int64_t>(piece.num_queries) * group;
  constexpr bool by_tiles = kTiles && !std::is_same_v<T, float>;
  s.lay_out(by_tiles ? padded(rows, 16) : rows, dim);
  const int64_t start = batch.query_start_loc[piece.sequence];
  const int64_t num_new = batch.query_start_loc[piece.sequence + 1] - start;
  const int64_t first_position = batch.seq_lens[piece.sequence] - num_new + piece.first_query;
  const int64_t end = first_position + piece.num_queries;  // of the keys that are seen
  if constexpr (by_tiles) {
    tile_queries(a, start + piece.first_query, head, rows, s);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = start + piece.first_query + r / group;
      const float* query = a.qkv + token * a.qkv_width + (head * group + r % group) * dim;
      for (int64_t d = 0; d < dim; ++d) s.query[r * dim + d] = query[d] * layer.scale;
    }
  }
  int64_t first_seen = 0;
  if (layer.sliding_window > 0) {
    first_seen = std::max<int64_t>(0, first_position + 1 - layer.sliding_window);
  }
  const int64_t begin = first_seen / kChunk * kChunk;
  const bool is_whole = piece.part < 0;
  int64_t part = piece.part, last_part = piece.part;
  if (is_whole) {
    clear(rows, wide, s.sum_highest, s.sum_total, s.sum_values);
    part = begin / kPart;
    last_part = (end - 1) / kPart;
  }
  for (; part <= last_part; ++part) {
    clear(rows, wide, s.part_highest, s.part_total, s.part_values);
    const int64_t part_end = std::min<int64_t>(end, (part + 1) * kPart);
    for (int64_t first = std::max<int64_t>(begin, part * kPart); first < part_end;
         first += kChunk) {
      const int count = static_cast<int>(std::min<int64_t>(kChunk, end - first));
      const int low = static_cast<int>(std::max<int64_t>(0, first_seen - first));
      if constexpr (by_tiles) {
        attend_chunk_by_tiles<T>(a, piece.sequence, head, rows, first, low, count, first_position,
                                 s);
      } else {
        load_chunk<T>(a, piece.sequence, head, first, low, count, s);
        attend_chunk(layer, head, rows, first, count, first_position, s);
      }
    }
    if (is_whole) {
      merge_rows(rows, wide, s.part_highest, s.part_total, 1, s.part_values, wide, s);
    }
  }
  if (is_whole) {
    finish_rows(a, piece.sequence, piece.first_query, piece.num_queries, head, s);
    return;
  }
  float* out = a.partial + (piece.slot + head * rows) * a.partial_width;
  for (int64_t r = 0; r < rows; ++r, out += a.partial_width) {
    std::memcpy(out, s.part_values + r * wide, wide * sizeof(float));
    out[wide] = s.part_highest[r];
    out[wide + 1] = s.part_total[r];
  }
}

inline void merge_pieces(const Attention& a, const Merge& merge, int head, AttentionScratch& s) {
  const Layer& layer = *a.layer;
  const int64_t wide = padded(layer.head_dim, kBlock);
  const int64_t rows =
      static_cast<int64_t>(merge.num_queries) * (layer.num_heads / layer.num_kv_heads);
  s.lay_out(rows, layer.head_dim);
  clear(rows, wide, s.sum_highest, s.sum_total, s.sum_values);
  for (int64_t part = 0; part < merge.num_parts; ++part) {
    const int64_t slot =
        merge.slot + part * merge.num_queries * a.plan->num_heads + head * rows;
    const float* from = a.partial + slot * a.partial_width;
    merge_rows(rows, wide, from + wide, from + wide + 1, a.partial_width, from, a.partial_width, s);
  }
  finish_rows(a, merge.sequence, merge.first_query, merge.num_queries, head, s);
}

// To be called by all threads of the team, which all leave it when all tokens are done.
inline void attend(Thread& thread, const Attention& a, AttentionScratch& s) {
  const int64_t num_kv_heads = a.layer->num_kv_heads;
  const auto num_pieces = static_cast<int64_t>(a.plan->pieces.size());
  thread.share(num_pieces * num_kv_heads, [&](int64_t item) {
    const Piece& piece = a.plan->pieces[item / num_kv_heads];
    const int head = static_cast<int>(item % num_kv_heads);
    with_cache_type(a.layer->cache_dtype, [&](auto* type) {
      attend_piece<std::remove_pointer_t<decltype(type)>>(a, piece, head, s);
    });
  });
  if (a.plan->merges.empty()) return;
  const auto num_merges = static_cast<int64_t>(a.plan->merges.size());
  thread.share(num_merges * num_kv_heads, [&](int64_t item) {
    merge_pieces(a, a.plan->merges[item / num_kv_heads], static_cast<int>(item % num_kv_heads), s);
  });
}

}  // namespace QUIRE_ISA
}  // namespace quire
