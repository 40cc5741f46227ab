// Products of weights in integer codes, of 8 or 4 bits, with activations that are rounded for it: to
// 16 bits, by a step for each unit of columns, or to 8 by one step for the row.
//
// Over a unit, products are summed as integers: exactly, in whatever order, by whatever instruction.
// What the units make is summed in float32, in ascending order, whatever the number of rows. A step
// that is no number makes every sum none that its row has a part in.
#pragma once
#include "gemm.h"
#include "int_tiles.h"
#include "int_units.h"
#include "rounding.h"

namespace quire {
namespace QUIRE_ISA {

// sums[b][r][0:16]: what `Blocks` blocks make of `Rows` rows, straight from their codes.
template <bool Nibbles, int Rows, int Blocks>
inline void sum_few(const Matrix& weight, const CodesLayout& layout, const RoundedRows& x,
                    const char* const (&blocks)[Blocks], float* sums) {
  vf result[Blocks][Rows][kVectors];
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) result[b][r][v] = all(0.0f);
    }
  }
  const int64_t unit = weight.codes->unit, num_steps = unit / (2 * kPairs<Nibbles>);
  for (int64_t u = 0; u < layout.num_units; ++u) {
    vi acc[Blocks][Rows][kVectors];
    const char* codes[Blocks];
    const uint32_t* inputs[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      inputs[r] = reinterpret_cast<const uint32_t*>(x.row(r)) + u * (unit / 2);
    }
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      codes[b] = codes_of_unit(layout, blocks[b], u);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[b][r][v] = vi{};
      }
    }
    for (int64_t i = 0; i < num_steps; ++i) {
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) {
        const char* at = codes[b] + i * 64;
        __builtin_prefetch(at + kCodesAhead);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          vu pairs[kPairs<Nibbles>];
          widen_codes<Nibbles>(load_as<vu>(at + 4 * v * kLanes), pairs);
#pragma GCC unroll 4
          for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kPairs<Nibbles>; ++j) {
              acc[b][r][v] =
                  add_int_pairs(acc[b][r][v], pairs[j], inputs[r][i * kPairs<Nibbles> + j] + vu{});
            }
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      const UnitScales scales = load_scales(weight, layout, blocks[b], u);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const float step = x.steps[u * x.rows + r];
        const int32_t total = x.totals[u * x.rows + r];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const vi sum = acc[b][r][v] - scales.zeros[v] * total;
          result[b][r][v] =
              __builtin_convertvector(sum, vf) * (scales.scales[v] * step) + result[b][r][v];
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        vf value = result[b][r][v];
        if (layout.front == 0) {
          value = value * load(reinterpret_cast<const float*>(blocks[b]) + v * kLanes);
        }
        store(sums + (b * Rows + r) * kBlock + v * kLanes, value);
      }
    }
  }
}

// Adds what a widened unit makes of some rows, the first of which is `row`, to sums [rows][16].
template <int Rows>
inline void add_unit(const uint32_t* wide, int64_t unit, const UnitScales& scales,
                     const RoundedRows& x, int64_t row, int64_t u, float* sums) {
  vi acc[Rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = vi{};
  }
  const uint32_t* inputs = reinterpret_cast<const uint32_t*>(x.row(row)) + u * (unit / 2);
  const int64_t stride = x.stride / 4;
  for (int64_t i = 0; i < unit / 2; ++i) {
    vu pairs[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) pairs[v] = load_as<vu>(wide + i * kBlock + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const vu input = inputs[r * stride + i] + vu{};
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = add_int_pairs(acc[r][v], pairs[v], input);
    }
  }
  const float* steps = x.steps + u * x.rows + row;
  const int32_t* totals = x.totals + u * x.rows + row;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const vi sum = acc[r][v] - scales.zeros[v] * totals[r];
      add_scaled(sum, scales, v, steps[r], sums + r * kBlock);
    }
  }
}

// sums[r][0:16]: what a block makes of rows `row` to row + rows - 1, but for the block's scales.
template <bool Nibbles>
inline void sum_many(const Matrix& weight, const CodesLayout& layout, const RoundedRows& x,
                     int64_t row, int64_t rows, const char* block, float* sums) {
  const int64_t unit = weight.codes->unit;
  const int64_t passes = (rows + kMostRows - 1) / kMostRows;
  const int64_t step = (rows + passes - 1) / passes;
  alignas(64) uint32_t wide[kMostUnit / 2 * kBlock];
  for (int64_t u = 0; u < layout.num_units; ++u) {
    const UnitScales scales = load_scales(weight, layout, block, u);
    widen_unit<Nibbles>(codes_of_unit(layout, block, u), unit, wide);
    for (int64_t r = 0; r < rows; r += step) {
      with_rows<kMostRows>(std::min(step, rows - r), [&](auto count) {
        add_unit<count()>(wide, unit, scales, x, row + r, u, sums + r * kBlock);
      });
    }
  }
}

// Multiplies sums of rows with a block's scales, where these are not the units'.
inline void scale_sums(const CodesLayout& layout, const char* block, int64_t rows, float* sums) {
  if (layout.front > 0) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kBlock; v += kLanes) {
      float* out = sums + r * kBlock + v;
      store(out, load(out) * load(reinterpret_cast<const float*>(block) + v));
    }
  }
}

// To their places, of block `b`: what it makes of rows `row` to row + rows - 1, and its factor if
// there is one.
inline void finish_codes(const Product& p, int64_t b, int64_t row, int64_t rows, float* values,
                         float* factors) {
  const int64_t first = b * kBlock;
  adapt(p, false, first, row, rows, values, kBlock);
  if (p.factor != nullptr) adapt(p, true, first, row, rows, factors, kBlock);
  for (int64_t r = 0; r < rows; ++r) {
    finish_row(p, values + r * kBlock, factors + r * kBlock, first, p.y + (row + r) * p.ldy + first);
  }
}

// The product of all rows with block `b`, and with its factor if there is one.
template <bool Nibbles>
inline void multiply_codes_block(const Product& p, const CodesLayout& layout, const RoundedRows& x,
                                 int64_t b) {
  prefetch_gains(p, b * kBlock);
  alignas(64) float values[kRowsOfCodes * kBlock], factors[kRowsOfCodes * kBlock];
  for (int64_t row = 0; row < p.rows; row += kRowsOfCodes) {
    const int64_t rows = std::min(kRowsOfCodes, p.rows - row);
    auto sum = [&](const Matrix& weight, float* sums) {
      const char* block = codes_block(weight, b);
      std::fill(sums, sums + rows * kBlock, 0.0f);
      sum_many<Nibbles>(weight, layout, x, row, rows, block, sums);
      scale_sums(layout, block, rows, sums);
    };
    sum(*p.weight, values);
    if (p.factor != nullptr) sum(*p.factor, factors);
    finish_codes(p, b, row, rows, values, factors);
  }
}

#if defined(QUIRE_TILES)
// The same of inputs as bytes, with some blocks from `b` on. Returns which block comes next.
template <bool Nibbles>
inline int64_t multiply_codes_tiles(const Product& p, const CodesLayout& layout,
                                    const RoundedRows& x, int64_t b, int64_t end) {
  const int step = p.factor != nullptr ? 2 : 1;
  CodeBlocks all;
  int64_t next = b;
  for (; next < end && all.count < kTileBlocks; ++next) {
    prefetch_gains(p, next * kBlock);
    all.add(*p.weight, next);
    if (p.factor != nullptr) all.add(*p.factor, next);
  }
  alignas(64) float sums[kTileBlocks][kRowsOfCodes * kBlock];
  for (int64_t row = 0; row < p.rows; row += kRowsOfCodes) {
    const int64_t rows = std::min(kRowsOfCodes, p.rows - row);
    for (int i = 0; i < all.count; ++i) std::fill(sums[i], sums[i] + rows * kBlock, 0.0f);
    if (p.weight->codes->rounds_to_int8) {
      sum_tiles<Nibbles, true>(all, layout, x, row, rows, sums);
    } else {
      sum_tiles<Nibbles, false>(all, layout, x, row, rows, sums);
    }
    for (int i = 0; i < all.count; ++i) scale_sums(layout, all.blocks[i], rows, sums[i]);
    for (int i = 0; i < all.count; i += step) {
      finish_codes(p, b + i / step, row, rows, sums[i], sums[i + step - 1]);
    }
  }
  return next;
}
#endif

// The product of a few rows with two blocks: `b` and its factor, or else the one after it.
template <bool Nibbles>
inline void multiply_codes_two(const Product& p, const CodesLayout& layout, const RoundedRows& x,
                               int64_t b) {
  const bool is_gated = p.factor != nullptr;
  const int64_t first = b * kBlock, second = is_gated ? first : first + kBlock;
  prefetch_gains(p, first);
  if (!is_gated) prefetch_gains(p, second);
  const char* const blocks[2] = {
      codes_block(*p.weight, b), is_gated ? codes_block(*p.factor, b) : codes_block(*p.weight, b + 1)};
  alignas(64) float sums[2 * kFewRows * kBlock];
  with_rows<kFewRows>(p.rows, [&](auto rows) {
    sum_few<Nibbles, rows()>(*p.weight, layout, x, blocks, sums);
  });
  float* others = sums + p.rows * kBlock;
  adapt(p, false, first, 0, p.rows, sums, kBlock);
  adapt(p, is_gated, second, 0, p.rows, others, kBlock);
  for (int64_t r = 0; r < p.rows; ++r) {
    float* y = p.y + r * p.ldy + first;
    finish_row(p, sums + r * kBlock, others + r * kBlock, first, y);
    if (!is_gated) finish_row(p, others + r * kBlock, nullptr, second, y + kBlock);
  }
}

// What a thread takes at a time, as long as there are so many items for all.
constexpr int64_t kBytesAtOnce = 1 << 16;
constexpr int64_t kLeastItems = 64;

// Blocks that a thread takes at a time. Codes are read in so little time that to take an item takes a
// part of it.
inline int64_t codes_at_once(const Matrix& weight, int64_t num_blocks) {
  const int64_t most = std::min(kBytesAtOnce / weight.codes->block_bytes, num_blocks / kLeastItems);
  return std::max(kBlocksAtOnce, most / 2 * 2);
}

template <bool Nibbles>
inline void multiply_codes(Thread& thread, const Product& p, const RoundedRows& x) {
  const Matrix& weight = *p.weight;
  const CodesLayout layout = layout_of(*weight.codes, weight.in, weight.dtype);
  const int64_t num_blocks = (weight.out + kBlock - 1) / kBlock;
  const int64_t at_once = codes_at_once(weight, num_blocks);
  const int64_t num_items = (num_blocks + at_once - 1) / at_once;
  const int64_t step = p.factor != nullptr ? 1 : 2;
  thread.share(num_items, [&](int64_t item) {
    const int64_t end = std::min(num_blocks, (item + 1) * at_once);
    for (int64_t b = item * at_once; b < end;) {
#if defined(QUIRE_TILES)
      if (x.as_bytes) {
        b = multiply_codes_tiles<Nibbles>(p, layout, x, b, end);
        continue;
      }
#endif
      if (p.rows <= kFewRows && b + step <= end) {
        multiply_codes_two<Nibbles>(p, layout, x, b);
        b += step;
      } else {
        multiply_codes_block<Nibbles>(p, layout, x, b++);
      }
    }
  });
}

// A product with a weight of integer codes. A factor is of the same kind, and its columns and their
// units are the weight's.
inline void multiply_codes(Thread& thread, const Product& p, uint16_t* halves) {
  if (p.rows == 0) return;
  const Matrix& weight = *p.weight;
  const RoundedRows x = place_rows(weight, p.rows, halves);
  thread.share(p.rows, [&](int64_t r) {
    const float* row = p.x + r * p.ldx;
    weight.codes->rounds_to_int8 ? round_row<true>(weight, x, row, r)
                                 : round_row<false>(weight, x, row, r);
  });
  if (weight.dtype == kInt4) {
    multiply_codes<true>(thread, p, x);
  } else {
    multiply_codes<false>(thread, p, x);
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
