// Attention over a bfloat16 cache by tiles: scores are keys times queries, so that rows of the cache
// are tiles as they lie there; what they weigh of the values is weights times values. What codes
// stand for is rounded to bfloat16 first.
//
// The borders are those of attention.h, and the softmax is its own. Queries and weights are rounded
// to bfloat16. A row's sums are made by the same instructions whatever rows are beside it, and keys
// that it does not see add nothing to them, so that its bits are its own here as well.
#pragma once
#include "chunk.h"
#include "tiles.h"

namespace quire {
namespace QUIRE_ISA {

// Queries, scaled, as tiles [16 rows][32 dims] that are pairs of dims of each row: what keys are
// multiplied with. What is missing of the last rows and dims is zero.
void tile_queries(const Attention& a, int64_t first_token, int head, int64_t rows,
                  AttentionScratch& s);

// One chunk for all rows: as load_chunk and attend_chunk do it.
template <typename T>
void attend_chunk_by_tiles(const Attention& a, int sequence, int head, int64_t rows, int64_t first,
                           int low, int count, int64_t first_position, AttentionScratch& s);

#if defined(QUIRE_TILES)
static_assert(kLanes == 16 && kBlock == 16 && kChunk % 32 == 0);
constexpr int64_t kPairTile = 16 * 32;  // numbers: 16 pairs of inputs, 16 outputs

inline void tile_queries(const Attention& a, int64_t first_token, int head, int64_t rows,
                         AttentionScratch& s) {
  const Layer& layer = *a.layer;
  const int64_t dim = layer.head_dim, steps = padded(dim, kDepth) / kDepth;
  const int group = layer.num_heads / layer.num_kv_heads;
  auto* tiles = reinterpret_cast<uint16_t*>(s.query);
  for (int64_t first = 0; first < rows; first += 16) {
    for (int64_t step = 0; step < steps; ++step, tiles += kPairTile) {
      vf pairs[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) pairs[r] = all(0.0f);
      for (int64_t r = 0; r < std::min<int64_t>(16, rows - first); ++r) {
        const int64_t row = first + r;
        const float* query = a.qkv + (first_token + row / group) * a.qkv_width +
                             (head * group + row % group) * dim;
        uint16_t rounded[kDepth];
        const int64_t d = step * kDepth;
        for (int64_t i = 0; i < kDepth; i += kLanes) {
          if (d + i + kLanes <= dim) {
            store_row(rounded + i, load(query + d + i) * layer.scale);
            continue;
          }
          for (int64_t l = i; l < i + kLanes; ++l) {
            rounded[l] = d + l < dim ? narrow(query[d + l] * layer.scale) : 0;
          }
        }
        pairs[r] = load_as<vf>(rounded);
      }
      transpose(pairs);
      std::memcpy(tiles, pairs, sizeof pairs);
    }
  }
}

template <typename T>
inline void copy_head(const T* row, int64_t dim, uint16_t* out) {
  if constexpr (kIsCode<T>) {
    const float scale = row_scale(row, dim);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store_row(out + d, load_part(row, d, scale));
    for (; d < dim; ++d) out[d] = narrow(load_element(row, d, scale));
  } else {
    std::copy_n(row, dim, out);
  }
}

// Values as tiles of 32 keys, in pairs, and 16 dims, those of one 16 dims in order of their keys.
// Keys that are missing of the last tile are zero.
inline void tile_values(const uint16_t* const (&values)[kChunk], int count, int64_t dim,
                        uint16_t* tiles) {
  const int used = static_cast<int>(padded(count, 32));
  const uint16_t none[kBlock] = {};
  for (int i = 0; i < used; i += 2) {
    uint16_t* out = tiles + i / 32 * kPairTile + i % 32 * kBlock;
    const uint16_t* even = i < count ? values[i] : nullptr;
    const uint16_t* odd = i + 1 < count ? values[i + 1] : nullptr;
    int64_t d = 0;
    for (; d + kBlock <= dim; d += kBlock, out += kChunk / 32 * kPairTile) {
      const vh lower = load_as<vh>(even != nullptr ? even + d : none);
      const vh upper = load_as<vh>(odd != nullptr ? odd + d : none);
      const vu pairs = __builtin_convertvector(lower, vu) | __builtin_convertvector(upper, vu) << 16;
      std::memcpy(out, &pairs, sizeof pairs);
    }
    if (d == dim) continue;
    for (int64_t c = 0; c < kBlock; ++c) {
      const bool is_there = d + c < dim;
      out[2 * c] = is_there && even != nullptr ? even[d + c] : 0;
      out[2 * c + 1] = is_there && odd != nullptr ? odd[d + c] : 0;
    }
  }
}

// Keys as tiles [16 keys][32 dims], where they lie if whole tiles of bfloat16 lie in whole blocks,
// else copied.
struct KeyTiles {
  const uint16_t* first[kChunk / 16];
  int64_t stride;  // bytes
};

template <typename T>
inline KeyTiles tile_keys(const Attention& a, const T* const (&keys)[kChunk], int low, int count,
                          AttentionScratch& s) {
  const int64_t dim = a.layer->head_dim;
  const int used = static_cast<int>(padded(count, 16));
  KeyTiles tiles{};
  if constexpr (!kIsCode<T>) {
    const int64_t width = a.layer->num_kv_heads * dim;
    if (dim % kDepth == 0 && a.batch->block_size % 16 == 0) {
      tiles.stride = 2 * width;
      for (int i = 0; i < used; i += 16) {
        // By a key that is seen: those before it may be anywhere, by their own pointers.
        const int seen = low < i + 16 ? std::max(low, i) : i;
        tiles.first[i / 16] = keys[seen] - (seen - i) * width;
      }
      return tiles;
    }
  }
  const int64_t wide = padded(dim, kDepth);
  auto* copy = reinterpret_cast<uint16_t*>(s.key);
  tiles.stride = 2 * wide;
  for (int i = 0; i < used; ++i, copy += wide) {
    if (i % 16 == 0) tiles.first[i / 16] = copy;
    const int64_t size = i < count ? dim : 0;
    if (i < count) copy_head(keys[i], dim, copy);
    std::fill(copy + size, copy + wide, 0);
  }
  return tiles;
}

// Scores [rows][kChunk] of the first `used` keys.
inline void score_tiles(const KeyTiles& keys, int64_t rows, int used, int64_t dim,
                        AttentionScratch& s) {
  const int64_t steps = padded(dim, kDepth) / kDepth;
  const auto* queries = reinterpret_cast<const uint16_t*>(s.query);
  alignas(64) float by_key[32 * 32];
  for (int key = 0; key < used; key += 32) {
    for (int64_t row = 0; row < rows; row += 32) {
      const uint16_t* query = queries + row / 16 * steps * kPairTile;
      with_counts((used - key + 15) / 16, (rows - row + 15) / 16, [&](auto as, auto bs) {
        const int next = as == 2 ? key / 16 + 1 : key / 16;
        zero_sums<as(), bs()>();
        add_tiles<as(), bs(), 0>({{keys.first[key / 16], keys.first[next]}, keys.stride, kDepth},
                                 {{query, query + steps * kPairTile}, 64, kPairTile}, steps);
        store_sums<as(), bs()>(by_key, 32);
        for (int i = 0; i < as; ++i) {
          for (int j = 0; j < bs; ++j) {
            vf square[16];
#pragma GCC unroll 16
            for (int k = 0; k < 16; ++k) square[k] = load(by_key + (16 * i + k) * 32 + 16 * j);
            transpose(square);
            float* out = s.scores + (row + 16 * j) * kChunk + key + 16 * i;
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r) store(out + r * kChunk, square[r]);
          }
        }
      });
    }
  }
}

// Add what the weights, which lie in the first half of each row of scores, take of the values.
inline void weigh_tiles(int64_t rows, int used, int64_t dim, AttentionScratch& s) {
  const int64_t wide = padded(dim, kBlock);
  const auto* weights = reinterpret_cast<const uint16_t*>(s.scores);
  const auto* values = reinterpret_cast<const uint16_t*>(s.value);
  constexpr int64_t row_size = 2 * kChunk, column_size = kChunk / 32 * kPairTile;
  for (int64_t d = 0; d < wide; d += 32) {
    const uint16_t* value = values + d / 16 * column_size;
    for (int64_t row = 0; row < rows; row += 32) {
      const uint16_t* weight = weights + row * row_size;
      float* sums = s.part_values + row * wide + d;
      with_counts((rows - row + 15) / 16, (wide - d) / 16, [&](auto as, auto bs) {
        load_sums<as(), bs()>(sums, wide);
        add_tiles<as(), bs(), 0>({{weight, weight + 16 * row_size}, 2 * row_size, 32},
                                 {{value, value + column_size}, 64, kPairTile}, used / 32);
        store_sums<as(), bs()>(sums, wide);
      });
    }
  }
}

template <typename T>
inline void attend_chunk_by_tiles(const Attention& a, int sequence, int head, int64_t rows,
                                  int64_t first, int low, int count, int64_t first_position,
                                  AttentionScratch& s) {
  const int64_t dim = a.layer->head_dim;
  const int used = static_cast<int>(padded(count, 32));
  const T *keys[kChunk], *values[kChunk];
  find_rows(a, sequence, head, first, low, count, keys, values);
  const KeyTiles tiles = tile_keys(a, keys, low, count, s);
  auto* value_tiles = reinterpret_cast<uint16_t*>(s.value);
  if constexpr (kIsCode<T>) {
    // Tiles take the first half of this memory.
    uint16_t* halves = value_tiles + padded(dim, kBlock) * kChunk;
    const uint16_t* rows_of_halves[kChunk];
    for (int i = 0; i < count; ++i, halves += dim) {
      copy_head(values[i], dim, halves);
      rows_of_halves[i] = halves;
    }
    tile_values(rows_of_halves, count, dim, value_tiles);
  } else {
    tile_values(values, count, dim, value_tiles);
  }
  score_tiles(tiles, rows, static_cast<int>(padded(count, 16)), dim, s);
  weigh_rows<true>(*a.layer, head, rows, first, count, used, first_position, s);
  weigh_tiles(rows, used, dim, s);
}
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
