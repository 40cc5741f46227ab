// Products with weights whose entries lie as bfloat16 tables, one for each output, with its scale in
// them: see BFloat16Table in table_layout.h. Inputs are rounded to bfloat16 once, as those of plain
// bfloat16 weights are.
//
// A vector of codes is of one output, and so are the rows of 32 columns that are looked up for it: so
// in tiles weights come first, and inputs are turned to columns of rows. An output of a row is summed
// up in a tile over all columns, whatever the number of rows: bits are the same for one and for many.
#pragma once
#include "block_pairs.h"
#include "chunk.h"
#include "float_codes.h"
#include "int_codes.h"
#include "outliers.h"
#include "table_layout.h"
#include "tiles.h"
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace quire {
namespace QUIRE_ISA {

inline bool has_bfloat16_tables(const Matrix& weight) {
  return weight.codes->has_bfloat16_tables != 0;
}

// Where blocks lie, and how many steps of columns they have.
inline const char* step_codes(const Matrix& weight, const char* block) {
  return block + layout_of(*weight.codes, weight.in, weight.dtype).head;
}

inline const uint16_t* step_tables(const Matrix& weight, const char* block) {
  return reinterpret_cast<const uint16_t*>(step_codes(weight, block) - kTableBytes);
}

inline int64_t num_steps(const Matrix& weight) {
  return padded(weight.in, weight.codes->unit) / kColumnsOfStep;
}

#if defined(QUIRE_TILES)
static_assert(kVectors == 1);

// Inputs as tiles of [16 pairs of columns][16 rows][2]: of groups of 32 rows, for each 32 columns one
// tile, or two. Up to 16 rows lie without a gap: what a tile has beyond them is whatever follows.
struct TurnedInputs {
  uint16_t* first;
  int64_t rows, wide;

  int64_t rows_of(int64_t row) const { return std::min<int64_t>(32, rows - row / 32 * 32); }
  bool are_few(int64_t row) const { return rows_of(row) <= 16; }
  // Bytes from a pair to the next, and numbers from 32 columns to the next.
  int64_t stride(int64_t row) const { return are_few(row) ? 4 * rows_of(row) : 64; }
  int64_t step(int64_t row) const { return are_few(row) ? kDepth * rows_of(row) : 2 * kTile; }
  uint16_t* at(int64_t row, int64_t k) const {
    return first + row / 32 * 32 * wide + k / kDepth * step(row) + row % 32 / 16 * kTile;
  }
};

// Columns `k` to k + 31 of up to 16 rows, from `row` on.
inline void turn_columns(const Product& p, const TurnedInputs& tiles, int64_t row, int64_t k) {
  const Codes& codes = *p.weight->codes;
  const int64_t count = std::min<int64_t>(16, p.rows - row), depth = p.weight->in;
  const bool is_plain = codes.order == nullptr && codes.factors == nullptr && k + kDepth <= depth;
  vf pairs[16] = {};
  for (int64_t r = 0; r < count; ++r) {
    const float* from = p.x + (row + r) * p.ldx;
    float rest[kDepth] = {};
    if (is_plain) {
      from += k;
    } else {
      arrange_columns(codes, from, k, std::min(k + kDepth, depth), rest - k);
      from = rest;
    }
    uint16_t halves[kDepth];
    store_row(halves, load(from));
    store_row(halves + kLanes, load(from + kLanes));
    std::memcpy(&pairs[r], halves, sizeof halves);
  }
  uint16_t* out = tiles.at(row, k);
  if (tiles.stride(row) == 4) {  // one row lies as it is
    std::memcpy(out, &pairs[0], sizeof pairs[0]);
    return;
  }
  transpose(pairs);
  const int64_t stride = tiles.stride(row), bytes = std::min<int64_t>(stride, 64);
  char* to = reinterpret_cast<char*>(out);
  for (int i = 0; i < 16; ++i, to += stride) std::memcpy(to, &pairs[i], bytes);
}

inline TurnedInputs turn_to_tiles(Thread& thread, const Product& p, uint16_t* halves) {
  const TurnedInputs tiles{halves, p.rows, num_steps(*p.weight) * kColumnsOfStep};
  constexpr int64_t kAtOnce = 512;
  const int64_t pieces = (tiles.wide + kAtOnce - 1) / kAtOnce;
  thread.share((p.rows + 15) / 16 * pieces, [&](int64_t item) {
    const int64_t begin = item % pieces * kAtOnce, end = std::min(begin + kAtOnce, tiles.wide);
    for (int64_t k = begin; k < end; k += kDepth) turn_columns(p, tiles, item / pieces * 16, k);
  });
  return tiles;
}

// An output's 128 columns: a row of each of four tiles, `kTile` numbers apart.
inline void look_up_output(const char* codes, const uint16_t* table, uint16_t* rows) {
#if defined(__AVX512BW__)
  const __m512i words = _mm512_loadu_si512(codes);
  // Of an index, five bits count; the fifth does not matter in a table that is there twice.
  const __m512i entries =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
  _mm512_store_si512(rows, _mm512_permutexvar_epi16(words, entries));
  _mm512_store_si512(rows + kTile,
                     _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), entries));
  _mm512_store_si512(rows + 2 * kTile,
                     _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), entries));
  _mm512_store_si512(rows + 3 * kTile,
                     _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), entries));
#else
  for (int64_t k = 0; k < kColumnsOfStep; ++k) {
    const Nibble place = place_in_step(k, 0);
    const int code = static_cast<uint8_t>(codes[place.byte]) >> place.shift & 15;
    rows[k / kDepth * kTile + k % kDepth] = table[code];
  }
#endif
}

// Blocks that are gone over at once: of one weight or two.
template <int Blocks>
struct TableBlocks {
  const Matrix* weights[Blocks];
  int64_t numbers[Blocks];
  const char* codes[Blocks];
  const uint16_t* tables[Blocks];
  int64_t steps;
  int64_t ahead;  // from a block's end to what is gone over next of it

  // A quarter of a step's codes, to tiles of [block][4][16 outputs][32].
  template <bool Asks>
  void look_up(int64_t step, int quarter, uint16_t* tiles) const {
    const int64_t place = step * kBytesOfStep + quarter * 256;
    int64_t later = place + kCodesAhead;
    const int64_t beyond = later - steps * kBytesOfStep;
    if (beyond >= 0) later += ahead;
    // Tables come with the first codes of what is next.
    const bool asks_for_tables = Asks && beyond >= 0 && beyond < kTableBytes;
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int o = 4 * quarter + i;
        if constexpr (Asks) __builtin_prefetch(codes[b] + later + i * 64);
        if (asks_for_tables) __builtin_prefetch(codes[b] + later - kTableBytes + i * 64);
        look_up_output(codes[b] + place + i * 64, tables[b] + o * 16,
                       tiles + b * 4 * kTile + o * kDepth);
      }
    }
  }
};

// Sums of a block and up to 16 rows of inputs: [16 outputs][16 rows]. They are in tiles 0 to 3, those
// of one block beside each other; inputs in 4 and 5, weights in 6 and 7.
constexpr int64_t kTileSums = 16 * 16;

template <int Count, typename With>
inline void each_tile(With with) {
  with(std::integral_constant<int, 0>());
  if constexpr (Count > 1) with(std::integral_constant<int, 1>());
  if constexpr (Count > 2) with(std::integral_constant<int, 2>());
  if constexpr (Count > 3) with(std::integral_constant<int, 3>());
}

// Adds products of a step: of `Inputs` tiles of inputs with each block. Between, calls `beside` with
// the number of each quarter: what it does runs beside tiles.
template <int Inputs, int Blocks, typename Beside>
inline void add_step(const TurnedInputs& x, int64_t row, int64_t step, const uint16_t* tiles,
                     Beside beside) {
  static_assert(Inputs * Blocks <= 4 && Blocks <= 2);
  const uint16_t* inputs = x.at(row, step * kColumnsOfStep);
  const int64_t stride = x.stride(row), of_chunk = x.step(row);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c, inputs += of_chunk, tiles += kTile) {
    beside(c);
    tile_load<4>(inputs, stride);
    if constexpr (Inputs == 2) tile_load<5>(inputs + kTile, stride);
    each_tile<Blocks>([&](auto b) {
      constexpr int kWeights = 6 + b() % 2;
      tile_load<kWeights>(tiles + b() * 4 * kTile, 64);
      tile_dot<b() * Inputs, kWeights, 4>();
      if constexpr (Inputs == 2) tile_dot<b() * Inputs + 1, kWeights, 5>();
    });
  }
}

// What is stored is loaded as a tile only when it has left the store buffer: so the next step is
// looked up before one is multiplied, also that of the blocks which come next.
struct LookedUp {
  alignas(64) uint16_t memory[2][2 * 4 * kTile];
  int current = 0;
  bool is_there = false;
};

// sums[b][16 rows at a time][16 outputs][16 rows] of the only group; `following` may be null.
template <int Inputs, int Blocks>
inline void sum_one_group(const TableBlocks<Blocks>& blocks, const TableBlocks<Blocks>* following,
                          const TurnedInputs& x, LookedUp& tiles, float* sums) {
  if (!tiles.is_there) {
    for (int q = 0; q < 4; ++q) {
      blocks.template look_up<true>(0, q, tiles.memory[tiles.current]);
    }
  }
  each_tile<Inputs * Blocks>([](auto i) { tile_zero<i()>(); });
  for (int64_t s = 0; s < blocks.steps; ++s) {
    uint16_t* next = tiles.memory[1 - tiles.current];
    add_step<Inputs, Blocks>(x, 0, s, tiles.memory[tiles.current], [&](int quarter) {
      if (s + 1 < blocks.steps) {
        blocks.template look_up<true>(s + 1, quarter, next);
      } else if (following != nullptr) {
        following->template look_up<true>(0, quarter, next);
      }
    });
    tiles.current = 1 - tiles.current;
  }
  tiles.is_there = following != nullptr;
  each_tile<Inputs * Blocks>([&](auto i) { tile_store<i()>(sums + i() * kTileSums, 64); });
}

// Groups whose sums wait for each other while steps are looked up once for them, and how many of these
// at a time: no more than stay near.
constexpr int64_t kTableGroups = 8, kStepsAtOnce = 4;

// The same of some groups, one after the other.
template <int Blocks>
inline void sum_groups(const TableBlocks<Blocks>& blocks, const TurnedInputs& x, int64_t row,
                       int64_t rows, float* sums) {
  alignas(64) uint16_t memory[kStepsAtOnce][Blocks * 4 * kTile];
  const int64_t steps = blocks.steps;
  for (int64_t first = 0; first < steps; first += kStepsAtOnce) {
    const int64_t count = std::min(kStepsAtOnce, steps - first);
    for (int64_t s = 0; s < count; ++s) {
      for (int q = 0; q < 4; ++q) blocks.template look_up<true>(first + s, q, memory[s]);
    }
    for (int64_t r = 0; r < rows; r += 32) {
      float* of_group = sums + r / 32 * 4 * kTileSums;
      auto add = [&](auto inputs) {
        constexpr int kTiles = inputs() * Blocks;
        if (first == 0) {
          each_tile<kTiles>([](auto i) { tile_zero<i()>(); });
        } else {
          each_tile<kTiles>([&](auto i) { tile_load<i()>(of_group + i() * kTileSums, 64); });
        }
        for (int64_t s = 0; s < count; ++s) {
          add_step<inputs(), Blocks>(x, row + r, first + s, memory[s], [](int) {});
        }
        each_tile<kTiles>([&](auto i) { tile_store<i()>(of_group + i() * kTileSums, 64); });
      };
      if (x.are_few(row + r)) {
        add(std::integral_constant<int, 1>());
      } else {
        add(std::integral_constant<int, 2>());
      }
    }
  }
}

// A product, and the inputs of outliers as rows, `p.x`, or, where there are more than a few, as
// columns of rows.
struct TurnedProduct {
  const Product& p;
  const TurnedInputs& x;
  const float* columns;
};

// Adds outliers to the sums of a group, and turns those to rows of [32].
inline void turn_sums(const TurnedProduct& t, const Matrix& weight, int64_t first, int64_t row,
                      int64_t rows, const float* sums, float* out) {
  const Codes& codes = *weight.codes;
  const bool has_outliers = codes.outlier_first != nullptr;
  const int64_t count = std::min<int64_t>(kBlock, weight.out - first);
  for (int64_t r = 0; r < rows; r += 16, sums += kTileSums) {
    vf square[kLanes];
#pragma GCC unroll 16
    for (int o = 0; o < kLanes; ++o) square[o] = load(sums + o * 16);
    if (has_outliers && t.columns != nullptr) {
      const int64_t wide = padded(t.p.rows, kRowsTogether);
      vf(&one)[1][kLanes] = reinterpret_cast<vf(&)[1][kLanes]>(square);
      add_outliers_to_columns<1>(codes, codes.outlier_first + first, count, t.columns + row + r,
                                 wide, one);
    }
    transpose(square);
    const int64_t some = std::min<int64_t>(16, rows - r);
    for (int64_t i = 0; i < some; ++i) store(out + (r + i) * kPairWidth, square[i]);
  }
  if (has_outliers && t.columns == nullptr) {
    add_outliers(weight, first, t.p.x + row * t.p.ldx, t.p.ldx, rows, out, kPairWidth);
  }
}

// Sums of a group of rows with all blocks, to their places.
template <int Blocks>
inline void finish_group(const TurnedProduct& t, const TableBlocks<Blocks>& blocks, int64_t row,
                         const float* sums) {
  constexpr int kOfPair = Blocks == 1 ? 1 : 2;
  const int64_t rows = t.x.rows_of(row), of_block = t.x.are_few(row) ? kTileSums : 2 * kTileSums;
  alignas(64) float values[32 * kPairWidth];
  for (int b = 0; b < Blocks; b += kOfPair) {
    for (int j = 0; j < kOfPair; ++j, sums += of_block) {
      turn_sums(t, *blocks.weights[b + j], blocks.numbers[b + j] * kBlock, row, rows, sums,
                values + j * kBlock);
    }
    finish_pair(t.p, blocks.numbers[b] * kBlock, kOfPair, values, row, rows);
  }
}

template <int Blocks>
inline void multiply_table_blocks(const TurnedProduct& t, const TableBlocks<Blocks>& blocks,
                                  const TableBlocks<Blocks>* following, LookedUp& tiles) {
  alignas(64) float sums[kTableGroups * 4 * kTileSums];
  const TurnedInputs& x = t.x;
  if (x.rows <= 16) {
    sum_one_group<1>(blocks, following, x, tiles, sums);
    finish_group(t, blocks, 0, sums);
    return;
  }
  if (x.rows <= 32) {
    sum_one_group<2>(blocks, following, x, tiles, sums);
    finish_group(t, blocks, 0, sums);
    return;
  }
  for (int64_t row = 0; row < x.rows; row += kTableGroups * 32) {
    const int64_t rows = std::min(kTableGroups * 32, x.rows - row);
    sum_groups(blocks, x, row, rows, sums);
    for (int64_t r = 0; r < rows; r += 32) {
      finish_group(t, blocks, row + r, sums + r / 32 * 4 * kTileSums);
    }
  }
}

// A factor has such tables, too, and takes its inputs in the weight's order, times the same factors.
inline void multiply_bfloat16_tables(Thread& thread, const Product& product, uint16_t* halves) {
  if (product.rows == 0) return;
  Product p = product;
  const Matrix& weight = *p.weight;
  const TurnedInputs x = turn_to_tiles(thread, p, halves);
  const float* columns = nullptr;
  auto has_outliers = [](const Matrix* m) {
    return m != nullptr && m->codes->outlier_first != nullptr;
  };
  if (has_outliers(p.weight) || has_outliers(p.factor)) {
    // Behind the rounded ones.
    float* memory = reinterpret_cast<float*>(
        reinterpret_cast<char*>(halves) +
        padded(p.rows, 16) * rounded_table_row_bytes(*weight.codes, weight.in));
    if (p.rows > kFewRows) {
      columns = turn_inputs(thread, product, memory);
    } else {
      p.x = arrange_inputs(thread, product, memory);
      if (p.x != product.x) p.ldx = weight.in;
    }
  }
  const TurnedProduct t{p, x, columns};
  const bool is_gated = p.factor != nullptr;
  const int64_t num_blocks = (weight.out + kBlock - 1) / kBlock;
  const int64_t at_once = codes_at_once(weight, num_blocks), step = is_gated ? 1 : 2;
  thread.share((num_blocks + at_once - 1) / at_once, [&](int64_t item) {
    const int64_t end = std::min(num_blocks, (item + 1) * at_once);
    auto blocks_at = [&](int64_t b, auto count) {
      TableBlocks<count()> blocks;
      for (int i = 0; i < count(); ++i) {
        const int64_t number = is_gated ? b : b + i;
        const Matrix& m = is_gated && i == 1 ? *p.factor : weight;
        const char* block = codes_block(m, number);
        blocks.weights[i] = &m;
        blocks.numbers[i] = number;
        blocks.codes[i] = step_codes(m, block);
        blocks.tables[i] = step_tables(m, block);
        prefetch_gains(p, number * kBlock);
        prefetch_outliers(m, number * kBlock);
      }
      // What follows a block is gone over beside it: up to the next of its weight's that is not.
      blocks.steps = num_steps(weight);
      blocks.ahead = step * weight.codes->block_bytes - blocks.steps * kBytesOfStep;
      return blocks;
    };
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    LookedUp tiles;
    int64_t b = item * at_once;
    if (b + step <= end) {
      TableBlocks<2> blocks = blocks_at(b, two);
      for (; b + step <= end; b += step) {
        const bool is_last = b + 2 * step > end;
        const TableBlocks<2> following = is_last ? blocks : blocks_at(b + step, two);
        multiply_table_blocks<2>(t, blocks, is_last ? nullptr : &following, tiles);
        blocks = following;
      }
    }
    if (b < end) multiply_table_blocks<1>(t, blocks_at(b, one), nullptr, tiles);
  });
}
#else
// A block's weights, [in][16].
inline const float* widen_tables_block(const Matrix& weight, int64_t b, float* out) {
  const char* block = codes_block(weight, b);
  const char* codes = step_codes(weight, block);
  const uint16_t* tables = step_tables(weight, block);
  for (int64_t k = 0; k < weight.in; ++k) {
    const char* step = codes + k / kColumnsOfStep * kBytesOfStep;
    for (int64_t o = 0; o < kBlock; ++o) {
      const Nibble place = place_in_step(k % kColumnsOfStep, o);
      const int code = static_cast<uint8_t>(step[place.byte]) >> place.shift & 15;
      out[k * kBlock + o] = widen(tables[o * 16 + code]);
    }
  }
  return out;
}

// Such weights are packed for tiles: where there are none, they are no more than right. Inputs stay
// as they are.
inline void multiply_bfloat16_tables(Thread& thread, const Product& product, uint16_t* halves) {
  if (product.rows == 0) return;
  Product p = product;
  p.x = arrange_inputs(thread, product, reinterpret_cast<float*>(halves));
  if (p.x != product.x) p.ldx = p.weight->in;
  thread.share((p.weight->out + kBlock - 1) / kBlock, [&](int64_t b) {
    float* wide = thread.scratch();
    float* wide_other = wide + p.weight->in * kBlock;
    multiply_block(p, widen_tables_block(*p.weight, b, wide),
                   p.factor == nullptr ? nullptr : widen_tables_block(*p.factor, b, wide_other),
                   b * kBlock);
  });
}
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
