// Products of bfloat16 weights with activations that are rounded to bfloat16 for it, by the dot
// products that some CPUs have, and the choice between these and those of gemm.h.
//
// As there, an output is accumulated in float32 in one order, which the instructions set (of tiles,
// the even and the odd inputs apart), whatever the number of rows.
#pragma once
#include "bfloat16_tables.h"
#include "block_pairs.h"
#include "float8_tiles.h"
#include "float_codes.h"
#include "int_codes.h"
#include "plan.h"
#include "table_codes.h"
#include "tiles.h"

namespace quire {
namespace QUIRE_ISA {

// Where a row's inputs lie, 32 at a time, once rounded: the row behind the one before; or, of
// tiles, in the tile of 16 rows. What is missing of the last 32 is zero.
inline int64_t place_of(int64_t row, int64_t k, int64_t depth) {
  const int64_t wide = padded(depth, kDepth);
  if (!kTiles) return row * wide + k;
  return row / 16 * 16 * wide + k * 16 + row % 16 * kDepth;
}

inline void round_row(const float* x, int64_t depth, int64_t row, uint16_t* halves) {
  int64_t k = 0;
  for (; k + kDepth <= depth; k += kDepth) {
    uint16_t* out = halves + place_of(row, k, depth);
    for (int i = 0; i < kDepth; i += kLanes) store_row(out + i, load(x + k + i));
  }
  if (k == depth) return;
  uint16_t* out = halves + place_of(row, k, depth);
  for (int64_t i = 0; i < kDepth; ++i) out[i] = k + i < depth ? narrow(x[k + i]) : 0;
}

struct BlockPair {
  const uint16_t* blocks[2];  // see block_pairs.h
  int64_t first;              // output

  int count() const { return blocks[1] != nullptr ? 2 : 1; }
};

#if defined(QUIRE_TILES)
constexpr int kTilesAhead = 8;           // of each block
constexpr int64_t kRowsOfTiles = 2 * 16;

// The pair stays near while rows are gone over, two tiles at a time.
inline void multiply_pair(const Product& p, const BlockPair& pair, const uint16_t* halves) {
  const int64_t depth = p.weight->in, wide = padded(depth, kDepth);
  const int64_t whole = depth / kDepth, rest = depth % kDepth;
  alignas(64) uint16_t tails[2][kTile];
  if (rest > 0) {
    for (int i = 0; i < pair.count(); ++i) {
      std::copy_n(pair.blocks[i] + whole * kTile, rest * kBlock, tails[i]);
      std::fill(tails[i] + rest * kBlock, tails[i] + kTile, 0);
    }
  }
  alignas(64) float sums[kRowsOfTiles * kPairWidth];
  for (int64_t row = 0; row < p.rows; row += kRowsOfTiles) {
    const int64_t rows = std::min(kRowsOfTiles, p.rows - row);
    const uint16_t* x = halves + row * wide;
    with_counts((rows + 15) / 16, pair.count(), [&](auto as, auto bs) {
      zero_sums<as(), bs()>();
      add_tiles<as(), bs(), kTilesAhead>({{x, x + 16 * wide}, 2 * kDepth, kTile},
                                         {{pair.blocks[0], pair.blocks[1]}, 64, kTile}, whole);
      if (rest > 0) {
        x += whole * kTile;
        add_tiles<as(), bs(), 0>({{x, x + 16 * wide}, 2 * kDepth, kTile},
                                 {{tails[0], tails[1]}, 64, kTile}, 1);
      }
      store_sums<as(), bs()>(sums, kPairWidth);
    });
    finish_pair(p, pair.first, pair.count(), sums, row, rows);
  }
}
#endif

#if defined(QUIRE_PAIRS)
static_assert(kVectors == 1);

template <int Rows, int Blocks>
inline void sum_pairs(const uint16_t* x, int64_t ldx, int64_t depth, const BlockPair& pair,
                      float* sums) {
  vf acc[Rows][Blocks];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) acc[r][b] = all(0.0f);
  }
  for (int64_t k = 0; k < depth; k += 2) {
    vu weights[Blocks];
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
      const uint16_t* w = pair.blocks[b] + k * kBlock;
      if constexpr (Rows <= 2) __builtin_prefetch(w + 1024);
      weights[b] = load_as<vu>(w);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      uint32_t inputs;
      std::memcpy(&inputs, x + r * ldx + k, sizeof inputs);
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) acc[r][b] = add_pairs(acc[r][b], weights[b], inputs + vu{});
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) store(sums + r * kPairWidth + b * kBlock, acc[r][b]);
  }
}

template <int Rows = kMostRows>
inline void sum_rows(int64_t rows, const uint16_t* x, int64_t ldx, int64_t depth,
                     const BlockPair& pair, float* sums) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      sum_rows<Rows - 1>(rows, x, ldx, depth, pair, sums);
      return;
    }
  }
  if (pair.count() == 2) {
    sum_pairs<Rows, 2>(x, ldx, depth, pair, sums);
  } else {
    sum_pairs<Rows, 1>(x, ldx, depth, pair, sums);
  }
}

inline void multiply_pair(const Product& p, const BlockPair& pair, const uint16_t* halves) {
  const int64_t depth = p.weight->in, wide = padded(depth, kDepth);
  const int64_t passes = (p.rows + kMostRows - 1) / kMostRows;
  const int64_t step = (p.rows + passes - 1) / passes;
  float sums[kMostRows * kPairWidth];
  for (int64_t row = 0; row < p.rows; row += step) {
    const int64_t rows = std::min(step, p.rows - row);
    sum_rows(rows, halves + row * wide, wide, depth, pair, sums);
    finish_pair(p, pair.first, pair.count(), sums, row, rows);
  }
}
#endif

#if defined(QUIRE_TILES) || defined(QUIRE_PAIRS)
inline void multiply_rounded(Thread& thread, const Product& p, uint16_t* halves) {
  const int64_t depth = p.weight->in;
  thread.share(p.rows, [&](int64_t r) { round_row(p.x + r * p.ldx, depth, r, halves); });
  const int64_t num_blocks = (p.weight->out + kBlock - 1) / kBlock;
  const int64_t num_items = (num_blocks + kBlocksAtOnce - 1) / kBlocksAtOnce;
  thread.share(num_items, [&](int64_t item) {
    const int64_t end = std::min(num_blocks, (item + 1) * kBlocksAtOnce);
    int64_t b = item * kBlocksAtOnce;
    while (b < end) {
      const uint16_t *block = block_of<uint16_t>(*p.weight, b), *second = nullptr;
      const int64_t first = b++ * kBlock;
      if (p.factor != nullptr) {
        second = block_of<uint16_t>(*p.factor, first / kBlock);
      } else if (b < end) {
        second = block_of<uint16_t>(*p.weight, b++);
        prefetch_gains(p, first + kBlock);
      }
      prefetch_gains(p, first);
      multiply_pair(p, {{block, second}, first}, halves);
    }
  });
}
#endif

// A product whose inputs were shrunk for what adapters add to it, if there are any.
inline void multiply_shrunk(Thread& thread, const Product& p, uint16_t* halves) {
  switch (p.weight->dtype) {
    case kFloat32:
      multiply_blocks<float>(thread, p);
      return;
    case kInt8:
    case kInt4:
      multiply_codes(thread, p, halves);
      return;
    case kTable4:
      if (has_bfloat16_tables(*p.weight)) {
        multiply_bfloat16_tables(thread, p, halves);
        return;
      }
      multiply_tables(thread, p, halves);
      return;
    case kFloat8:
#if defined(QUIRE_TILES)
      if (has_float8_tiles(p)) {
        multiply_float8_tiles(thread, p, halves);
        return;
      }
#endif
      multiply_float_codes(thread, p, halves);
      return;
  }
#if defined(QUIRE_TILES) || defined(QUIRE_PAIRS)
  multiply_rounded(thread, p, halves);
#else
  multiply_blocks<uint16_t>(thread, p);
#endif
}

// To be called by all threads of the team, which all leave it when the product is complete.
// `halves` is memory for the rounded rows: see Buffers.
inline void multiply(Thread& thread, const Product& p, uint16_t* halves) {
  if (p.adapters != nullptr) shrink(thread, *p.adapters, p.delta, p.x, p.ldx);
  multiply_shrunk(thread, p, halves);
}

}  // namespace QUIRE_ISA
}  // namespace quire
