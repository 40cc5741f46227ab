// Products with weights in codes that stand for floats, e4m3 or entries of one table, by tiles of
// bfloat16.
//
// An input goes in two, x = upper + lower, each rounded to bfloat16; what is left is 2^-18 of it. A
// code of e4m3 is a bfloat16; an entry of a table is two, and of the four products that of the lower
// ones is left out. So an error stays below 2^-15 of the sum of the sizes of what is added up.
//
// The parts have sums of their own, of a stretch of columns at a time, which are added up before they
// are scaled: so a few rows have the parts of their inputs in one tile, more have a tile for each,
// and bits are the same.
#pragma once
#include "block_pairs.h"
#include "float_codes.h"
#include "tiles.h"
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace quire {
namespace QUIRE_ISA {

#if defined(QUIRE_TILES)
static_assert(kVectors == 1);

// Where a number of a chunk's column `k` lies in a tile. Of each four columns, those that make a pair
// are two apart: that is how codes lie.
inline int place_in_tile(int k, int output) {
  const int pair = k / 4 * 2 + k % 2;
  return pair * 32 + output * 2 + k % 4 / 2;
}

// What of a number bfloat16 holds, and what is left.
inline void split(vf x, vf& upper, vf& lower) {
  upper = (vf)(rounded_bits(x) & 0xffff0000u);
  const vf size = upper < 0.0f ? -upper : upper;
  lower = size <= std::numeric_limits<float>::max() ? x - upper : all(0.0f);
}

#if defined(__AVX512BW__)
// Numbers of 16 bits that look-ups are made in.
inline __m512i twice(const uint16_t (&entries)[16]) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries)));
}
#endif

// A decoder brings the codes of 32 columns of a block, `kBytes` of them, to `kParts` tiles of
// [16 pairs of columns][16 outputs][2]. Scales are to be multiplied with `kScale` before.
//
// e4m3 is bfloat16 with fewer digits, but for the bias of its exponent: with 112 set before its four
// bits, it is 2^-8 as large. Tiles take subnormal numbers for zero, so what a subnormal code stands
// for is looked up; in a weight that has few of them, only where there is one.
template <bool Subnormals>
struct Float8Tiles {
  static constexpr int kParts = 1;
  static constexpr int64_t kBytes = 512;
  static constexpr float kScale = 0x1p8f;

  Float8Tiles(const Codes&, int64_t) {}

#if defined(__AVX512BW__)
  void decode(const char* codes, uint16_t* tile) const {
    constexpr uint16_t kSmall[16] = {0, 110 << 7, 111 << 7, 111 << 7 | 64, 112 << 7, 112 << 7 | 32,
                                     112 << 7 | 64, 112 << 7 | 96};
    const __m512i digits = _mm512_set1_epi16(0x07f0), bias = _mm512_set1_epi16(0x3800);
    const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
    const __m512i sign_and_digits = _mm512_or_si512(sign, digits);
    const __m512i exponents = _mm512_set1_epi8(0x78);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __builtin_prefetch(codes + i * 64 + kCodesAhead);
      const __m512i quads = _mm512_loadu_si512(codes + i * 64);
      const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(quads, 8), 4);
      const __m512i odd = _mm512_srai_epi16(quads, 4);
      const __mmask64 small = _mm512_testn_epi8_mask(quads, exponents);
      uint16_t* out = tile + i * 64;
      if (Subnormals || __builtin_expect(small != 0, 0)) {
        const __m512i table = twice(kSmall);
        const __mmask32 evens = _mm512_testn_epi16_mask(quads, _mm512_set1_epi16(0x0078));
        const __mmask32 odds = _mm512_testn_epi16_mask(quads, _mm512_set1_epi16(0x7800));
        // a & b | c
        __m512i first = _mm512_ternarylogic_epi32(even, digits, bias, 0xea);
        __m512i second = _mm512_ternarylogic_epi32(odd, digits, bias, 0xea);
        first = _mm512_mask_permutexvar_epi16(first, evens, quads, table);
        second = _mm512_mask_permutexvar_epi16(second, odds, _mm512_srli_epi16(quads, 8), table);
        _mm512_store_si512(out, _mm512_ternarylogic_epi32(even, sign, first, 0xea));
        _mm512_store_si512(out + 32, _mm512_ternarylogic_epi32(odd, sign, second, 0xea));
      } else {
        _mm512_store_si512(out, _mm512_ternarylogic_epi32(even, sign_and_digits, bias, 0xea));
        _mm512_store_si512(out + 32, _mm512_ternarylogic_epi32(odd, sign_and_digits, bias, 0xea));
      }
    }
  }
#else
  void decode(const char* codes, uint16_t* tile) const {
    for (int k = 0; k < kDepth; ++k) {
      for (int o = 0; o < kBlock; ++o) {
        const uint8_t code = static_cast<uint8_t>(codes[k / 4 * 64 + o * 4 + k % 4]);
        tile[place_in_tile(k, o)] = narrow(value_of_float8(code) / kScale);
      }
    }
  }
#endif
};

struct TableTiles {
  static constexpr int kParts = 2;
  static constexpr int64_t kBytes = 256;
  static constexpr float kScale = 1.0f;
  uint16_t upper[16], lower[16];

  TableTiles(const Codes& codes, int64_t) {
    static_assert(kLanes == 16);
    vf parts[2];
    split(load(codes.tables), parts[0], parts[1]);
    store_row(upper, parts[0]);
    store_row(lower, parts[1]);
  }

#if defined(__AVX512BW__)
  // Both columns of a pair are in one byte of an output: it comes to both places of the pair, each
  // time shifted by what leaves its own half at the bottom. A look-up takes five bits of an index,
  // of which the table, being there twice, leaves four.
  void decode(const char* codes, uint16_t* tile) const {
    alignas(64) static constexpr uint16_t kWords[32] = {0, 0, 0,  0,  1,  1,  1,  1,  8,  8,  8,
                                                        8, 9, 9,  9,  9,  2,  2,  2,  2,  3,  3,
                                                        3, 3, 10, 10, 10, 10, 11, 11, 11, 11};
    const __m512i word = _mm512_load_si512(kWords);
    const __m512i shift = _mm512_set1_epi64(0x000c'0008'0004'0000);
    const __m512i uppers = twice(upper), lowers = twice(lower);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(codes + i * 64 + kCodesAhead);
      const __m512i bytes = _mm512_loadu_si512(codes + i * 64);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i from = _mm512_add_epi16(word, _mm512_set1_epi16(j / 2 * 16 + j % 2 * 4));
        const __m512i found = _mm512_srlv_epi16(_mm512_permutexvar_epi16(from, bytes), shift);
        uint16_t* out = tile + (i * 4 + j) * 32;
        _mm512_store_si512(out, _mm512_permutexvar_epi16(found, uppers));
        _mm512_store_si512(out + kTile, _mm512_permutexvar_epi16(found, lowers));
      }
    }
  }
#else
  void decode(const char* codes, uint16_t* tile) const {
    Codes about{};  // one table
    for (int k = 0; k < kDepth; ++k) {
      const Nibble place = table_place(about, k);
      for (int o = 0; o < kBlock; ++o) {
        const int byte = static_cast<uint8_t>(codes[place.byte + place_of_output(about, o)]);
        const int code = byte >> place.shift & 15;
        tile[place_in_tile(k, o)] = upper[code];
        tile[place_in_tile(k, o) + kTile] = lower[code];
      }
    }
  }
#endif
};

// Inputs in two, as tiles: of up to 16 rows that follow each other, for each 32 columns, first those
// of the upper parts, then those of the lower. Of up to 8 rows both parts are in one tile, in as many
// rows of it; the others are whatever follows.
struct SplitRows {
  uint16_t* first;
  int64_t rows, wide;

  static constexpr int64_t kGroup = 16, kFew = 8;

  int64_t rows_of(int64_t row) const { return std::min(kGroup, rows - row / kGroup * kGroup); }
  // From a chunk to the next, and from an upper part to its lower one.
  int64_t step(int64_t row) const { return 2 * part(row); }
  int64_t part(int64_t row) const {
    const int64_t count = rows_of(row);
    return (count <= kFew ? count : kGroup) * kDepth;
  }
  uint16_t* at(int64_t row, int64_t k) const {
    return first + row / kGroup * kGroup * 2 * wide + k / kDepth * step(row) +
           row % kGroup * kDepth;
  }
};

// Some columns of a row, which may end before the last 32 do.
inline void split_columns(const float* x, int64_t columns, uint16_t* upper, int64_t part,
                          int64_t step) {
  for (int64_t k = 0; k < columns; k += kDepth, upper += step) {
    float rest[kDepth];
    const float* from = x + k;
    if (k + kDepth > columns) {
      std::fill(std::copy(from, x + columns, rest), rest + kDepth, 0.0f);
      from = rest;
    }
#pragma GCC unroll 2
    for (int i = 0; i < kDepth; i += kLanes) {
      const vf four = load(from + i);
      vf parts[2];
      split(shuffle<0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15>(four, four), parts[0],
            parts[1]);
      store_row(upper + i, parts[0]);
      store_row(upper + part + i, parts[1]);
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
    split_columns(from + begin, end - begin, split_rows.at(r, begin), split_rows.part(r),
                  split_rows.step(r));
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

// Sums of 16 rows by 16 outputs: of upper parts with a block's upper ones in tile `b`, of lower with
// upper ones in 2 + b, of upper with lower ones in 4 + b. `Few`: upper and lower parts of inputs are
// rows of the same tile.
template <int Parts, bool Few, int Blocks>
inline void add_chunks(const uint16_t* x, int64_t part, int64_t step, const uint16_t* weights,
                       int64_t count) {
  static_assert(Parts == 1 || Parts == 2);
  tile_zero<0>();
  if constexpr (Blocks == 2) tile_zero<1>();
  if constexpr (!Few) tile_zero<2>();
  if constexpr (!Few && Blocks == 2) tile_zero<3>();
  if constexpr (Parts == 2) tile_zero<4>();
  if constexpr (Parts == 2 && Blocks == 2) tile_zero<5>();
  for (int64_t c = 0; c < count; ++c, x += step, weights += Blocks * Parts * kTile) {
    const uint16_t* second = weights + Parts * kTile;  // block
    tile_load<6>(x, 2 * kDepth);
    tile_load<7>(weights, 64);
    tile_dot<0, 6, 7>();
    if constexpr (Parts == 2) {
      tile_load<7>(weights + kTile, 64);
      tile_dot<4, 6, 7>();
      if constexpr (Blocks == 2) {
        tile_load<7>(second + kTile, 64);
        tile_dot<5, 6, 7>();
      }
    }
    if constexpr (Blocks == 2) {
      tile_load<7>(second, 64);
      tile_dot<1, 6, 7>();
    }
    if constexpr (!Few) {
      tile_load<6>(x + part, 2 * kDepth);
      if constexpr (Blocks == 2) tile_dot<3, 6, 7>();
      tile_load<7>(weights, 64);
      tile_dot<2, 6, 7>();
    }
  }
}

// What a stretch adds to sums of some rows of one group.
template <int Parts, int Blocks>
inline void add_stretch(const SplitRows& x, int64_t row, int64_t k, const uint16_t* weights,
                        int64_t count, const vf (&scales)[2], float* sums) {
  alignas(64) float found[6][16 * kBlock];
  const int64_t rows = x.rows_of(row), part = x.part(row), step = x.step(row);
  const bool is_few = rows <= SplitRows::kFew;
  if (is_few) {
    add_chunks<Parts, true, Blocks>(x.at(row, k), part, step, weights, count);
  } else {
    add_chunks<Parts, false, Blocks>(x.at(row, k), part, step, weights, count);
    tile_store<2>(found[2], 64);
    if constexpr (Blocks == 2) tile_store<3>(found[3], 64);
  }
  tile_store<0>(found[0], 64);
  if constexpr (Blocks == 2) tile_store<1>(found[1], 64);
  if constexpr (Parts == 2) tile_store<4>(found[4], 64);
  if constexpr (Parts == 2 && Blocks == 2) tile_store<5>(found[5], 64);
  for (int64_t r = 0; r < rows; ++r, sums += kPairWidth) {
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
      const float* lower = is_few ? found[b] + rows * kBlock : found[2 + b];
      vf rest = load(lower + r * kBlock);
      if constexpr (Parts == 2) rest += load(found[4 + b] + r * kBlock);
      const vf sum = load(found[b] + r * kBlock) + rest;
      store(sums + b * kBlock, sum * scales[b] + load(sums + b * kBlock));
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
  for (int64_t k = 0, s = 0; k < weight.in; k += stretch, ++s) {
    const int64_t columns = std::min(stretch, weight.in - k);
    const int64_t count = (columns + kDepth - 1) / kDepth;
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
      const char* from = all_codes[b] + layout.head + layout.front;
      if (codes.scales_units) {
        from += s * layout.unit_bytes;
        scales[b] = load(reinterpret_cast<const float*>(from - layout.front)) * Decoder::kScale;
      } else {
        from += k / kDepth * Decoder::kBytes;
      }
      uint16_t* tile = tiles + b * kParts * kTile;
      for (int64_t c = 0; c < count; ++c) {
        const int64_t left = end - k - c * kDepth;
        if (left < kDepth) {
          char rest[Decoder::kBytes + kCodesAhead] = {};
          std::copy_n(from + c * Decoder::kBytes, left * Decoder::kBytes / kDepth, rest);
          decoders[b].decode(rest, tile);
        } else {
          decoders[b].decode(from + c * Decoder::kBytes, tile);
        }
        tile += Blocks * kParts * kTile;
      }
    }
    for (int64_t r = 0; r < rows; r += SplitRows::kGroup) {
      add_stretch<kParts, Blocks>(x, row + r, k, tiles, count, scales, sums + r * kPairWidth);
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

template <int Blocks>
inline void sum_blocks(const CodedBlocks& blocks, const SplitRows& x, int64_t row, int64_t rows,
                       float* sums) {
  const Matrix& weight = *blocks.weights[0];
  if (weight.dtype == kTable4) {
    sum_blocks<TableTiles, Blocks>(blocks, x, row, rows, sums);
  } else if (weight.codes->has_subnormals) {
    sum_blocks<Float8Tiles<true>, Blocks>(blocks, x, row, rows, sums);
  } else {
    sum_blocks<Float8Tiles<false>, Blocks>(blocks, x, row, rows, sums);
  }
}

// Whether a weight's products go by tiles, whatever the number of rows.
inline bool has_float_tiles(const Matrix& weight) {
  const Codes& codes = *weight.codes;
  return !codes.has_tables && (!codes.scales_units || codes.unit % kDepth == 0);
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
  const int64_t at_once = kBlocksAtOnce * (num_blocks >= kManyBlocks ? 2 : 1);
  const int64_t num_items = (num_blocks + at_once - 1) / at_once;
  thread.share(num_items, [&](int64_t item) {
    const int64_t end = std::min(num_blocks, (item + 1) * at_once);
    float sums[kRowsDecodedFor * kPairWidth];
    for (int64_t b = item * at_once; b < end; b += is_gated ? 1 : 2) {
      const int count = is_gated || b + 1 < end ? 2 : 1;
      const int64_t first = b * kBlock;
      const CodedBlocks blocks{{p.weight, is_gated ? p.factor : p.weight},
                               {b, is_gated ? b : b + 1}};
      prefetch_gains(p, first);
      if (!is_gated && count == 2) prefetch_gains(p, first + kBlock);
      for (int64_t row = 0; row < p.rows; row += kRowsDecodedFor) {
        const int64_t rows = std::min(kRowsDecodedFor, p.rows - row);
        if (count == 2 && is_alike) {
          sum_blocks<2>(blocks, x, row, rows, sums);
        } else {
          sum_blocks<1>(blocks, x, row, rows, sums);
          if (count == 2) {
            sum_blocks<1>({{p.factor}, {b}}, x, row, rows, sums + kBlock);
          }
        }
        for (int i = 0; i < count; ++i) {
          add_outliers(*blocks.weights[i], blocks.numbers[i] * kBlock, p.x + row * p.ldx, p.ldx,
                       rows, sums + i * kBlock, kPairWidth);
        }
        finish_pair(p, first, count, sums, row, rows);
      }
    }
  });
}
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
