// Products with weights in entries of one table, by tiles of bfloat16.
//
// An input goes in two, x = upper + lower, each rounded to bfloat16; what is left is 2^-18 of it. An
// entry of a table is two as well, and of the four products that of the lower ones is left out. So an error stays below 2^-15 of the sum of the sizes of what is added up; of
// inputs below 1e-33, whose lower parts are subnormal, tiles hold the upper ones alone.
//
// The parts have sums of their own, of a stretch of columns at a time, which are added up before they
// are scaled: so a few rows have the parts of their inputs in one tile, more have a tile for each,
// and bits are the same.
#pragma once
#include "block_pairs.h"
#include "float_codes.h"
#include "tile_decoders.h"

namespace quire {
namespace QUIRE_ISA {

#if defined(QUIRE_TILES)
// Inputs in two, as tiles: of up to 16 rows that follow each other, for each 32 columns, first those
// of the upper parts, then those of the lower. Of up to 8 rows both parts are in one tile, in as many
// rows of it; further rows are whatever follows. These have their upper parts alone, too, with zeros
// for the lower.
struct SplitRows {
  uint16_t* first;
  int64_t rows, wide;

  static constexpr int64_t kGroup = 16, kFew = 8;

  int64_t rows_of(int64_t row) const { return std::min(kGroup, rows - row / kGroup * kGroup); }
  bool are_few(int64_t row) const { return rows_of(row) <= kFew; }
  uint16_t* at(int64_t row, int64_t k) const {
    return first + row / kGroup * kGroup * 2 * wide + k / kDepth * step(row) +
           row % kGroup * kDepth;
  }
  // From there to the lower part, to the next 32 columns, and to the same upper part alone.
  int64_t part(int64_t row) const { return (are_few(row) ? rows_of(row) : kGroup) * kDepth; }
  int64_t step(int64_t row) const { return 2 * part(row); }
  int64_t alone() const { return 2 * kFew * wide; }
};

// Columns `begin` to end - 1 of row `r`, `x`; `begin` is a multiple of 32.
inline void split_columns(const SplitRows& rows, int64_t r, const float* x, int64_t begin,
                          int64_t end) {
  const int64_t part = rows.part(r), step = rows.step(r), alone = rows.alone();
  const bool are_few = rows.are_few(r);
  uint16_t* upper = rows.at(r, begin);
  for (int64_t k = begin; k < end; k += kDepth, upper += step) {
    float rest[kDepth];
    const float* from = x + k;
    if (k + kDepth > end) {
      std::fill(std::copy(from, x + end, rest), rest + kDepth, 0.0f);
      from = rest;
    }
#pragma GCC unroll 2
    for (int i = 0; i < kDepth; i += kLanes) {
      const vf fours = load(from + i);
      vf parts[2];
      split(shuffle<0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15>(fours, fours), parts[0],
            parts[1]);
      store_row(upper + i, parts[0]);
      store_row(upper + part + i, parts[1]);
      if (are_few) {
        store_row(upper + alone + i, parts[0]);
        store_row(upper + alone + part + i, all(0.0f));
      }
    }
  }
}

// Columns of a row that one thread takes at a time: so that threads share one row, too.
constexpr int64_t kColumnsToSplit = 1024;

// Brings the inputs of a product in order, where `p.x` then points to, and in two.
inline SplitRows split_inputs(Thread& thread, Product& p, uint16_t* halves) {
  const Codes& codes = *p.weight->codes;
  const int64_t depth = p.weight->in, rows = p.rows, ldx = p.ldx;
  const float* x = p.x;
  float* arranged = nullptr;
  if (codes.order != nullptr || codes.factors != nullptr) {
    arranged = reinterpret_cast<float*>(halves);
    halves += padded(rows, 16) * arranged_row_bytes(codes, depth) / 2;
    p.x = arranged;
    p.ldx = depth;
  }
  const SplitRows split_rows{halves, rows, padded(depth, kDepth)};
  const int64_t pieces = (depth + kColumnsToSplit - 1) / kColumnsToSplit;
  thread.share(rows * pieces, [&](int64_t item) {
    const int64_t r = item / pieces, begin = item % pieces * kColumnsToSplit;
    const int64_t end = std::min(depth, begin + kColumnsToSplit);
    const float* from = x + r * ldx;
    if (arranged != nullptr) {
      float* to = arranged + r * depth;
      arrange_columns(codes, from, begin, end, to);
      from = to;
    }
    split_columns(split_rows, r, from, begin, end);
  });
  return split_rows;
}

// Tiles of weights that are near: those of 32 columns after the other, of each the blocks' one after
// the other, of these the parts.
constexpr int64_t kMostTiles = 16;

// Columns that are summed up before they are added to others.
template <typename Decoder>
inline int64_t columns_of_stretch(const Codes& codes) {
  return codes.scales_units ? codes.unit : kMostTiles / 2 / Decoder::kParts * kDepth;
}

// Sums of 16 rows by 16 outputs of upper parts of inputs with block `b` in tile `b`, of lower parts in
// tile 2 + b. `Few`: both are rows of tile `b`. `weights_of` says where the weights of a chunk are.
template <int Parts, bool Few, int Blocks, typename Weights>
inline void add_chunks(const SplitRows& rows, int64_t row, int64_t k, int64_t count,
                       Weights weights_of) {
  static_assert(Parts == 1 || Parts == 2);
  const uint16_t* x = rows.at(row, k);
  const int64_t step = rows.step(row), second = Few ? rows.alone() : rows.part(row);
  zero_sums<Few ? 1 : 2, Blocks>();
  for (int64_t c = 0; c < count; ++c, x += step) {
    const uint16_t* weights = weights_of(c);
    tile_load<4>(x, 2 * kDepth);
    tile_load<6>(weights, 64);
    tile_dot<0, 4, 6>();
    if constexpr (Blocks == 2) {
      tile_load<7>(weights + Parts * kTile, 64);
      tile_dot<1, 4, 7>();
    }
    if constexpr (!Few || Parts == 2) tile_load<5>(x + second, 2 * kDepth);
    if constexpr (!Few) {
      tile_dot<2, 5, 6>();
      if constexpr (Blocks == 2) tile_dot<3, 5, 7>();
    }
    if constexpr (Parts == 2) {
      tile_load<6>(weights + kTile, 64);
      tile_dot<0, Few ? 5 : 4, 6>();
      if constexpr (Blocks == 2) {
        tile_load<7>(weights + 3 * kTile, 64);
        tile_dot<1, Few ? 5 : 4, 7>();
      }
    }
  }
}

// What a stretch adds to sums of the rows of a group.
template <int Parts, int Blocks, typename Weights>
inline void add_stretch(const SplitRows& x, int64_t row, int64_t k, int64_t count,
                        const vf (&scales)[2], float* sums, Weights weights_of) {
  alignas(64) float found[2 * 16 * kPairWidth];
  const int64_t count_of_rows = x.rows_of(row);
  const float* lower = found + 16 * kPairWidth;
  if (count_of_rows <= SplitRows::kFew) {
    add_chunks<Parts, true, Blocks>(x, row, k, count, weights_of);
    store_sums<1, Blocks>(found, kPairWidth);
    lower = found + count_of_rows * kPairWidth;
  } else {
    add_chunks<Parts, false, Blocks>(x, row, k, count, weights_of);
    store_sums<2, Blocks>(found, kPairWidth);
  }
  for (int64_t r = 0; r < count_of_rows; ++r) {
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
      const int64_t at = r * kPairWidth + b * kBlock;
      store(sums + at, (load(found + at) + load(lower + at)) * scales[b] + load(sums + at));
    }
  }
}

// Blocks of one weight, or of two that are alike, gone over at once.
struct CodedBlocks {
  const Matrix* weights[2];
  int64_t numbers[2];
};

// sums[rows][32]: what the blocks make of rows `row` to row + rows - 1, `row` the first of a group.
template <typename Decoder, int Blocks>
inline void sum_blocks(const CodedBlocks& blocks, const SplitRows& x, int64_t row, int64_t rows,
                       float* sums) {
  constexpr int kParts = Decoder::kParts;
  const Matrix& weight = *blocks.weights[0];
  const Codes& codes = *weight.codes;
  const CodesLayout layout = layout_of(codes, weight.in, weight.dtype);
  const int64_t stretch = columns_of_stretch<Decoder>(codes);
  const Decoder decoders[2] = {
      Decoder(codes, blocks.numbers[0]),
      Decoder(*blocks.weights[Blocks - 1]->codes, blocks.numbers[Blocks - 1])};
  const char* all_codes[Blocks];
#pragma GCC unroll 2
  for (int b = 0; b < Blocks; ++b) {
    all_codes[b] = codes_block(*blocks.weights[b], blocks.numbers[b]);
  }
  vf scales[2] = {all(1.0f), all(1.0f)};
  alignas(64) uint16_t tiles[kMostTiles * kTile];
  for (int64_t r = 0; r < rows; ++r) {
    for (int b = 0; b < Blocks; ++b) store(sums + r * kPairWidth + b * kBlock, all(0.0f));
  }
  // Of the last unit, columns may be missing that fill up the last chunk.
  const int64_t end = padded(weight.in, codes.unit);
  constexpr int64_t kChunkTiles = Blocks * kParts * kTile;
  const int64_t stretch_bytes =
      codes.scales_units ? layout.unit_bytes : stretch / kDepth * Decoder::kBytes;
  const bool is_one_group = rows <= SplitRows::kGroup;
  const int64_t ahead = is_one_group ? padded(kCodesAhead, codes.scales_units ? stretch_bytes : 64)
                                     : stretch_bytes;
  const int64_t skipped =
      Blocks == 2 && blocks.weights[0] == blocks.weights[1] ? codes.block_bytes : 0;
  for (int64_t k = 0, s = 0; k < weight.in; k += stretch, ++s) {
    const int64_t columns = std::min(stretch, weight.in - k);
    const int64_t count = (columns + kDepth - 1) / kDepth;
    const char *from[Blocks], *later[Blocks];
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
      from[b] = all_codes[b] + s * stretch_bytes;
      if (codes.scales_units) {
        scales[b] = load(reinterpret_cast<const float*>(from[b])) * Decoder::kScale;
      }
      // What follows the block is the other one, which is read already.
      later[b] = from[b] + ahead;
      if (s * stretch_bytes + ahead >= codes.block_bytes) later[b] += skipped;
      if (codes.scales_units) {
        __builtin_prefetch(later[b]);
        later[b] += layout.front;
      }
      from[b] += layout.head + layout.front;
    }
    auto prefetch = [&](int b, int64_t c) {
#pragma GCC unroll 8
      for (int64_t line = 0; line < Decoder::kBytes; line += 64) {
        __builtin_prefetch(later[b] + c * Decoder::kBytes + line);
      }
    };
    auto decode = [&](int64_t c, uint16_t* tile) {
      const int64_t left = end - k - c * kDepth;
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b, tile += kParts * kTile) {
        const char* chunk = from[b] + c * Decoder::kBytes;
        if (left >= kDepth) {
          decoders[b].decode(chunk, tile);
          continue;
        }
        char rest[Decoder::kBytes] = {};
        std::copy_n(chunk, left * Decoder::kBytes / kDepth, rest);
        decoders[b].decode(rest, tile);
      }
    };
    if (is_one_group) {
      // Chunk by chunk, so that memory is read all the time.
      add_stretch<kParts, Blocks>(x, row, k, count, scales, sums, [&](int64_t c) {
        uint16_t* tile = tiles + c % (kMostTiles * kTile / kChunkTiles) * kChunkTiles;
        for (int b = 0; b < Blocks; ++b) prefetch(b, c);
        decode(c, tile);
        return tile;
      });
      continue;
    }
    for (int64_t c = 0; c < count; ++c) decode(c, tiles + c * kChunkTiles);
    for (int64_t r = 0; r < rows; r += SplitRows::kGroup) {
      add_stretch<kParts, Blocks>(x, row + r, k, count, scales, sums + r * kPairWidth,
                                  [&](int64_t c) {
                                    const int b = static_cast<int>(r / SplitRows::kGroup);
                                    if (b < Blocks) prefetch(b, c);
                                    return tiles + c * kChunkTiles;
                                  });
    }
  }
  if (codes.scales_units) return;
#pragma GCC unroll 2
  for (int b = 0; b < Blocks; ++b) {
    const vf scale = load(reinterpret_cast<const float*>(all_codes[b])) * Decoder::kScale;
    for (int64_t r = 0; r < rows; ++r) {
      float* sum = sums + r * kPairWidth + b * kBlock;
      store(sum, load(sum) * scale);
    }
  }
}

// Two pairs of blocks, for up to 8 rows: sums[i][rows][32] are what sum_blocks makes of pair `i`, bit
// by bit. The products of one block wait for each other; with four of them, they wait in turns.
template <typename Decoder>
inline void sum_two_pairs(const CodedBlocks (&pairs)[2], const SplitRows& x,
                          float (*sums)[SplitRows::kFew * kPairWidth]) {
  constexpr int kParts = Decoder::kParts, kBlocks = 4;
  constexpr int64_t kSum = 16 * kBlock;
  const Matrix& weight = *pairs[0].weights[0];
  const Codes& codes = *weight.codes;
  const CodesLayout layout = layout_of(codes, weight.in, weight.dtype);
  const int64_t stretch = columns_of_stretch<Decoder>(codes);
  const int64_t stretch_bytes =
      codes.scales_units ? layout.unit_bytes : stretch / kDepth * Decoder::kBytes;
  const int64_t ahead = padded(kCodesAhead, codes.scales_units ? stretch_bytes : 64);
  const int64_t end = padded(weight.in, codes.unit), rows = x.rows;
  const Decoder decoder[2] = {Decoder(codes, 0), Decoder(*pairs[0].weights[1]->codes, 0)};
  // What follows the block is gone over beside it: up to the weight's next that is not.
  const int64_t skipped = codes.block_bytes * (pairs[0].weights[0] == pairs[0].weights[1] ? 3 : 1);
  const char* all_codes[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    const CodedBlocks& pair = pairs[b / 2];
    all_codes[b] = codes_block(*pair.weights[b % 2], pair.numbers[b % 2]);
    for (int64_t r = 0; r < rows; ++r) store(sums[b / 2] + r * kPairWidth + b % 2 * kBlock, vf{});
  }
  // What is stored is loaded as a tile only when it has left the store buffer: so the next chunk is
  // decoded before one is multiplied.
  alignas(64) uint16_t memory[2][kBlocks * kParts * kTile];
  uint16_t *tiles = memory[0], *next_tiles = memory[1];
  alignas(64) float found[kBlocks * kSum];
  auto decode = [&](int64_t k, int64_t c, uint16_t* tile) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b, tile += kParts * kTile) {
      const char* unit = all_codes[b] + k / stretch * stretch_bytes;
      const char* chunk = unit + layout.head + layout.front + c * Decoder::kBytes;
      const bool is_last = k / stretch * stretch_bytes + ahead >= codes.block_bytes;
      const int64_t later = ahead + (is_last ? skipped : 0);
      if (codes.scales_units && c == 0) __builtin_prefetch(unit + later);
#pragma GCC unroll 8
      for (int64_t line = 0; line < Decoder::kBytes; line += 64) {
        __builtin_prefetch(chunk + later + line);
      }
      const int64_t left = end - k - c * kDepth;
      char rest[Decoder::kBytes];
      if (left < kDepth) {
        std::fill(std::copy_n(chunk, left * Decoder::kBytes / kDepth, rest),
                  rest + Decoder::kBytes, 0);
        chunk = rest;
      }
      decoder[b % 2].decode(chunk, tile);
    }
  };
  decode(0, 0, tiles);
  for (int64_t k = 0; k < weight.in; k += stretch) {
    const int64_t count = (std::min(stretch, weight.in - k) + kDepth - 1) / kDepth;
    const int64_t at = k / stretch * stretch_bytes;
    const uint16_t* inputs = x.at(0, k);
    zero_sums<2, 2>();
    for (int64_t c = 0; c < count; ++c, inputs += x.step(0)) {
      if (c + 1 < count) {
        decode(k, c + 1, next_tiles);
      } else if (k + stretch < weight.in) {
        decode(k + stretch, 0, next_tiles);
      }
      tile_load<4>(inputs, 2 * kDepth);
      if constexpr (kParts == 2) tile_load<5>(inputs + x.alone(), 2 * kDepth);
      auto add = [&](auto number) {
        constexpr int b = number(), kWeights = 6 + b % 2;
        const uint16_t* tile = tiles + b * kParts * kTile;
        tile_load<kWeights>(tile, 64);
        tile_dot<b, 4, kWeights>();
        if constexpr (kParts == 2) {
          tile_load<kWeights>(tile + kTile, 64);
          tile_dot<b, 5, kWeights>();
        }
      };
      add(std::integral_constant<int, 0>());
      add(std::integral_constant<int, 1>());
      add(std::integral_constant<int, 2>());
      add(std::integral_constant<int, 3>());
      std::swap(tiles, next_tiles);
    }
    tile_store<0>(found, 64);
    tile_store<1>(found + kSum, 64);
    tile_store<2>(found + 2 * kSum, 64);
    tile_store<3>(found + 3 * kSum, 64);
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      vf scale = all(1.0f);
      if (codes.scales_units) {
        scale = load(reinterpret_cast<const float*>(all_codes[b] + at)) * Decoder::kScale;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float* sum = found + b * kSum + r * kBlock;
        float* out = sums[b / 2] + r * kPairWidth + b % 2 * kBlock;
        store(out, (load(sum) + load(sum + rows * kBlock)) * scale + load(out));
      }
    }
  }
  if (codes.scales_units) return;
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
    const vf scale = load(reinterpret_cast<const float*>(all_codes[b])) * Decoder::kScale;
    for (int64_t r = 0; r < rows; ++r) {
      float* out = sums[b / 2] + r * kPairWidth + b % 2 * kBlock;
      store(out, load(out) * scale);
    }
  }
}

// Call `with` with a null pointer to the type that decodes a weight.
template <typename With>
inline void with_tile_decoder(const Matrix& weight, With with) {
  static_cast<void>(weight);
  with(static_cast<const TableTiles*>(nullptr));
}

template <int Blocks>
inline void sum_blocks(const CodedBlocks& blocks, const SplitRows& x, int64_t row, int64_t rows,
                       float* sums) {
  with_tile_decoder(*blocks.weights[0], [&](auto* kind) {
    using Decoder = std::remove_cvref_t<decltype(*kind)>;
    sum_blocks<Decoder, Blocks>(blocks, x, row, rows, sums);
  });
}

// Whether a weight's products go by tiles, whatever the number of rows.
inline bool has_float_tiles(const Matrix& weight) {
  const Codes& codes = *weight.codes;
  return weight.dtype == kTable4 && !codes.has_tables && (!codes.scales_units || codes.unit % kDepth == 0);
}

// Rows whose sums wait for each other while codes are decoded once for them.
constexpr int64_t kRowsDecodedFor = 256;

inline void multiply_float_tiles(Thread& thread, const Product& product, uint16_t* halves) {
  if (product.rows == 0) return;
  Product p = product;
  const SplitRows x = split_inputs(thread, p, halves);
  const bool is_gated = p.factor != nullptr;
  const bool is_alike = !is_gated || are_alike(*p.weight, *p.factor);
  const int64_t num_blocks = (p.weight->out + kBlock - 1) / kBlock;
  const int64_t at_once = 2 * kBlocksAtOnce;
  const int64_t num_items = (num_blocks + at_once - 1) / at_once;
  thread.share(num_items, [&](int64_t item) {
    const int64_t end = std::min(num_blocks, (item + 1) * at_once);
    float sums[kRowsDecodedFor * kPairWidth];
    auto pair_at = [&](int64_t b) {
      const int64_t second = is_gated ? b : b + 1;
      prefetch_gains(p, b * kBlock);
      if (!is_gated && second < end) prefetch_gains(p, second * kBlock);
      return CodedBlocks{{p.weight, is_gated ? p.factor : p.weight}, {b, second}};
    };
    auto finish = [&](const CodedBlocks& pair, int count, int64_t row, int64_t rows, float* found) {
      for (int i = 0; i < count; ++i) {
        add_outliers(*pair.weights[i], pair.numbers[i] * kBlock, p.x + row * p.ldx, p.ldx, rows,
                     found + i * kBlock, kPairWidth);
      }
      finish_pair(p, pair.numbers[0] * kBlock, count, found, row, rows);
    };
    const int64_t step = is_gated ? 1 : 2;
    int64_t b = item * at_once;
    if (p.rows <= SplitRows::kFew && is_alike) {
      for (; b + 2 * step <= end; b += 2 * step) {
        const CodedBlocks pairs[2] = {pair_at(b), pair_at(b + step)};
        float found[2][SplitRows::kFew * kPairWidth];
        with_tile_decoder(*p.weight, [&](auto* kind) {
          sum_two_pairs<std::remove_cvref_t<decltype(*kind)>>(pairs, x, found);
        });
        for (int i = 0; i < 2; ++i) finish(pairs[i], 2, 0, p.rows, found[i]);
      }
    }
    for (; b < end; b += step) {
      const int count = is_gated || b + 1 < end ? 2 : 1;
      const CodedBlocks pair = pair_at(b);
      for (int64_t row = 0; row < p.rows; row += kRowsDecodedFor) {
        const int64_t rows = std::min(kRowsDecodedFor, p.rows - row);
        if (count == 2 && is_alike) {
          sum_blocks<2>(pair, x, row, rows, sums);
        } else {
          sum_blocks<1>(pair, x, row, rows, sums);
          if (count == 2) sum_blocks<1>({{p.factor}, {b}}, x, row, rows, sums + kBlock);
        }
        finish(pair, count, row, rows, sums);
      }
    }
  });
}
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
