// Products with weights that are entries of tables of 16, with inputs that are rounded for it.
//
// Both an entry and an input go in two bytes with signs, 256 * upper + lower, by a step of the table
// and one of the unit of columns. Of the four products of bytes, that of the lower ones is left out:
// it is at most 2^-16 of what the largest numbers make. What is left, divided by 256, is
//
//   256 * upper * upper + upper * lower + lower * upper
//
// and adds up to less than 2^31 over a unit: so sums are exact, in whatever order, by whatever
// instruction. What the units make is summed in float32, in ascending order, whatever the number of
// rows. A step that is no number makes every sum none that its row has a part in.
#pragma once
#include "float_codes.h"
#include "int_codes.h"
#include "outliers.h"
#include "table_rounding.h"
#include "table_tiles.h"
#include "table_units.h"

namespace quire {
namespace QUIRE_ISA {

#if defined(QUIRE_BYTE_DOTS)
static_assert(kVectors == 1);

// Tables whose bytes have 128 added, for which sums are made up with `totals`.
template <TableKind Kind>
struct OffsetTables {
  alignas(64) char bytes[kTableMemory<Kind>];

  explicit OffsetTables(const char* tables) {
    for (int64_t i = 0; i < kTableMemory<Kind>; i += 64) {
      const vu signs = load_as<vu>(tables + i) ^ 0x80808080u;
      std::memcpy(bytes + i, &signs, sizeof signs);
    }
  }
};

// Adds what a unit of offset bytes makes of some rows, the first of which is `row`, to sums.
template <int Rows>
inline void add_unit_bytes(const char* bytes, int64_t unit, const UnitScales& scales,
                           const RoundedTableRows& x, int64_t row, int64_t u, float* sums) {
  vu uppers[Rows], rest[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) uppers[r] = rest[r] = vu{};
  const uint32_t* inputs = reinterpret_cast<const uint32_t*>(x.at(row, u));
  const int64_t stride = x.stride / 4, fours = unit / 4;
  for (int64_t i = 0; i < fours; ++i) {
    const vu upper = load_as<vu>(bytes + i * 64), lower = load_as<vu>(bytes + unit * 16 + i * 64);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const vu input = inputs[r * stride + i] + vu{};
      uppers[r] = add_byte_fours(uppers[r], upper, input);
      rest[r] = add_byte_fours(rest[r], lower, input);
      rest[r] = add_byte_fours(rest[r], upper, inputs[r * stride + fours + i] + vu{});
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    const int64_t at = u * x.rows + row + r;
    const vu sum = (uppers[r] << 8) + rest[r] - static_cast<uint32_t>(x.totals[at]);
    add_scaled((vi)sum, scales, 0, x.steps[at], sums + r * kBlock);
  }
}

// Numbers of four vectors that are each to be added up by fours: number 4 * i + j of the result is
// that of fours `i` of vector `j`.
inline vu add_up_fours(vu (&v)[4]) {
  transpose_fours(v);
  return (v[0] + v[1]) + (v[2] + v[3]);
}

// What a unit with codes by output adds to sums[Rows] of 16 outputs: lanes are inputs, so that what
// comes out of a table needs not be turned around.
template <int Rows>
inline void add_unit_by_output(const char* tables, const char* codes, int64_t unit,
                               const UnitScales& scales, const RoundedTableRows& x, int64_t u,
                               vf (&sums)[Rows]) {
  vu uppers[Rows][4], rest[Rows][4];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) uppers[r][j] = rest[r][j] = vu{};
  }
  for (int64_t k = 0; k < unit; k += kTablesTogether, codes += 256) {
#pragma GCC unroll 4
    for (int line = 0; line < 256; line += 64) __builtin_prefetch(codes + kCodesAhead + line);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vu input_uppers[Rows], input_lowers[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const char* input = x.at(r, u) + k + 16 * half;
        input_uppers[r] = (vu)_mm512_broadcast_i32x4(load_as<__m128i>(input));
        input_lowers[r] = (vu)_mm512_broadcast_i32x4(load_as<__m128i>(input + unit));
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vu both = load_as<vu>(codes + j * 64);
        const vu own = (half == 0 ? both : both >> 4) & 0x0f0f0f0fu;
        const vu upper = look_up(load_as<vu>(tables + j * 128), own);
        const vu lower = look_up(load_as<vu>(tables + j * 128 + 64), own);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          uppers[r][j] = add_byte_fours(uppers[r][j], upper, input_uppers[r]);
          rest[r][j] = add_byte_fours(rest[r][j], lower, input_uppers[r]);
          rest[r][j] = add_byte_fours(rest[r][j], upper, input_lowers[r]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) rest[r][j] += uppers[r][j] << 8;
    const int64_t at = u * x.rows + r;
    const vi sum = (vi)(add_up_fours(rest[r]) - static_cast<uint32_t>(x.totals[at]));
    sums[r] = __builtin_convertvector(sum, vf) * (scales.scales[0] * x.steps[at]) + sums[r];
  }
}
#endif

// sums[b][r][0:16]: what `Blocks` blocks, alike, make of all `Rows` rows, straight from their codes.
template <TableKind Kind, int Rows, int Blocks>
inline void sum_few_tables(const TableBlock* const (&blocks)[Blocks], const RoundedTableRows& x,
                           float* sums) {
  vf result[Blocks][Rows][kVectors];
#pragma GCC unroll 2
  for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) result[b][r][v] = all(0.0f);
    }
  }
  const CodesLayout layout = blocks[0]->layout;
  const int64_t unit = blocks[0]->weight->codes->unit;
#if defined(QUIRE_BYTE_DOTS)
  const OffsetTables<Kind> first_tables(blocks[0]->tables), last_tables(blocks[Blocks - 1]->tables);
#endif
  for (int64_t u = 0; u < layout.num_units; ++u) {
    const char* codes[Blocks];
    const char* tables[Blocks];
    UnitScales scales[Blocks];
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
      codes[b] = codes_of_unit(layout, blocks[b]->block, u);
      scales[b] = blocks[b]->of_unit(u);
#if defined(QUIRE_BYTE_DOTS)
      tables[b] = b == 0 ? first_tables.bytes : last_tables.bytes;
#else
      tables[b] = blocks[b]->tables;
#endif
    }
#if defined(QUIRE_BYTE_DOTS)
    if constexpr (Kind == TableKind::kByOutput) {
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) {
        vf found[Rows];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) found[r] = result[b][r][0];
        add_unit_by_output<Rows>(tables[b], codes[b], unit, scales[b], x, u, found);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) result[b][r][0] = found[r];
      }
      continue;
    }
    vu uppers[Blocks][Rows], rest[Blocks][Rows];
    const uint32_t* inputs[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      inputs[r] = reinterpret_cast<const uint32_t*>(x.at(r, u));
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) uppers[b][r] = rest[b][r] = vu{};
    }
    for (int64_t k = 0; k < unit; k += kInputsOfStep<Kind>) {
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) {
        __builtin_prefetch(codes[b] + kCodesAhead);
        look_up_step<Kind>(tables[b], codes[b], 0, [&](int four, vu upper, vu lower) {
#pragma GCC unroll 4
          for (int r = 0; r < Rows; ++r) {
            const vu input = inputs[r][k / 4 + four] + vu{};
            uppers[b][r] = add_byte_fours(uppers[b][r], upper, input);
            rest[b][r] = add_byte_fours(rest[b][r], lower, input);
            const vu low_input = inputs[r][unit / 4 + k / 4 + four] + vu{};
            rest[b][r] = add_byte_fours(rest[b][r], upper, low_input);
          }
        });
        codes[b] += kBytesOfStep<Kind>;
      }
    }
#else
    vi acc[Blocks][Rows][kVectors];
    const uint32_t* inputs[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      inputs[r] = reinterpret_cast<const uint32_t*>(x.at(r, u));
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[b][r][v] = vi{};
      }
    }
    for (int64_t k = 0; k < unit; k += kInputsOfStep<Kind>) {
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 4
        for (int64_t line = 0; line < kBytesOfStep<Kind>; line += 64) {
          __builtin_prefetch(codes[b] + kCodesAhead + line);
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          look_up_step<Kind>(tables[b], codes[b], v, [&](int four, vu upper, vu lower) {
            vu wide[2], narrow[2];
            widen_fours(upper, wide);
            widen_fours(lower, narrow);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) {
              const uint32_t* input = inputs[r] + k / 2 + 2 * four;
#pragma GCC unroll 2
              for (int i = 0; i < 2; ++i) {
                vi& sum = acc[b][r][v];
                sum = add_int_pairs(sum, wide[i], input[i] + vu{});
                sum = add_int_pairs(sum, narrow[i], input[unit / 2 + i] + vu{});
              }
            }
          });
        }
        codes[b] += kBytesOfStep<Kind>;
      }
    }
#endif
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const int64_t at = u * x.rows + r;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
#if defined(QUIRE_BYTE_DOTS)
          const uint32_t total = static_cast<uint32_t>(x.totals[at]);
          const vi sum = (vi)((uppers[b][r] << 8) + rest[b][r] - total);
#else
          const vi sum = acc[b][r][v];
#endif
          result[b][r][v] = __builtin_convertvector(sum, vf) * (scales[b].scales[v] * x.steps[at]) +
                            result[b][r][v];
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        store(sums + (b * Rows + r) * kBlock + v * kLanes, result[b][r][v]);
      }
    }
  }
}

// sums[r][0:16]: what a block makes of rows `row` to row + rows - 1, but for the block's scales.
inline void sum_many_tables(const TableBlock& block, const RoundedTableRows& x, int64_t row,
                            int64_t rows, float* sums) {
  const int64_t unit = block.weight->codes->unit;
  constexpr int kMost = kByteDots ? kMostRows - 2 : kMostRows;  // registers
  const int64_t passes = (rows + kMost - 1) / kMost;
  const int64_t step = (rows + passes - 1) / passes;
  std::fill(sums, sums + rows * kBlock, 0.0f);
  with_table_kind(*block.weight->codes, [&](auto kind) {
    auto add = [&](const UnitScales& scales, int64_t u, auto with_rows_of) {
      for (int64_t r = 0; r < rows; r += step) {
        with_rows<kMost>(std::min(step, rows - r), [&](auto count) {
          with_rows_of(count, scales, row + r, u, sums + r * kBlock);
        });
      }
    };
#if defined(QUIRE_BYTE_DOTS)
    const OffsetTables<kind()> tables(block.tables);
    alignas(64) char bytes[2 * kMostUnit * kBlock];
    for (int64_t u = 0; u < block.layout.num_units; ++u) {
      spread_tables<kind()>(tables.bytes, codes_of_unit(block.layout, block.block, u), unit, bytes);
      add(block.of_unit(u), u, [&](auto count, const UnitScales& scales, int64_t first, int64_t u,
                                   float* out) {
        add_unit_bytes<count()>(bytes, unit, scales, x, first, u, out);
      });
    }
#else
    alignas(64) uint32_t wide[kMostUnit * kBlock];
    for (int64_t u = 0; u < block.layout.num_units; ++u) {
      widen_tables<kind()>(block.tables, codes_of_unit(block.layout, block.block, u), unit, wide);
      add(block.of_unit(u), u, [&](auto count, const UnitScales& scales, int64_t first, int64_t u,
                                   float* out) {
        // Whole numbers of inputs go with upper bytes, and their upper bytes with lower ones.
        add_unit<count()>(wide, 2 * unit, scales, x, first, u, out);
      });
    }
#endif
  });
}

// A product, its inputs rounded, and, for outliers, in the weight's order: as rows, `p.x`, or, where
// there are more than a few, as columns of rows.
struct TableProduct {
  const Product& p;
  const RoundedTableRows& x;
  const float* columns;
  OneTable one, one_of_factor;

  TableBlock block(int64_t b) const {
    prefetch_outliers(*p.weight, b * kBlock);
    return TableBlock(*p.weight, one, b);
  }
  TableBlock factor(int64_t b) const {
    prefetch_outliers(*p.factor, b * kBlock);
    return TableBlock(*p.factor, one_of_factor, b);
  }
};

// What comes after the units: scales that are the block's, and outliers.
inline void finish_sums(const TableProduct& t, const TableBlock& block, int64_t row, int64_t rows,
                        float* sums) {
  const Product& p = t.p;
  if (block.layout.front == 0) {
    const float* scales = reinterpret_cast<const float*>(block.block);
    for (int v = 0; v < kVectors; ++v) {
      const vf scale = load(scales + v * kLanes) * block.scales[v];
      for (int64_t r = 0; r < rows; ++r) {
        float* out = sums + r * kBlock + v * kLanes;
        store(out, load(out) * scale);
      }
    }
  }
  if (block.weight->codes->outlier_first == nullptr) return;
  if (t.columns != nullptr) {
    add_outliers_by_rows(*block.weight, block.number * kBlock, t.columns + row,
                         padded(p.rows, kRowsTogether), rows, sums);
  } else {
    add_outliers(*block.weight, block.number * kBlock, p.x + row * p.ldx, p.ldx, rows, sums);
  }
}
// All rows with block `b`, and with its factor if there is one.
inline void multiply_table_block(const TableProduct& t, int64_t b) {
  const Product& p = t.p;
  prefetch_gains(p, b * kBlock);
  alignas(64) float values[kRowsOfCodes * kBlock], factors[kRowsOfCodes * kBlock];
  for (int64_t row = 0; row < p.rows; row += kRowsOfCodes) {
    const int64_t rows = std::min(kRowsOfCodes, p.rows - row);
    auto sum = [&](const TableBlock& block, float* sums) {
      sum_many_tables(block, t.x, row, rows, sums);
      finish_sums(t, block, row, rows, sums);
    };
    sum(t.block(b), values);
    if (p.factor != nullptr) sum(t.factor(b), factors);
    finish_codes(p, b, row, rows, values, factors);
  }
}

// A few rows with two blocks: `b` and its factor, or else the one after it.
inline void multiply_two_tables(const TableProduct& t, int64_t b) {
  const Product& p = t.p;
  const bool is_gated = p.factor != nullptr;
  const int64_t first = b * kBlock, second = is_gated ? first : first + kBlock;
  prefetch_gains(p, first);
  if (!is_gated) prefetch_gains(p, second);
  const TableBlock block = t.block(b), other = is_gated ? t.factor(b) : t.block(b + 1);
  alignas(64) float sums[2 * kFewRows * kBlock];
  float* others = sums + p.rows * kBlock;
  with_rows<kFewRows>(p.rows, [&](auto rows) {
    with_table_kind(*p.weight->codes, [&](auto kind) {
      if (table_kind(*other.weight->codes) == kind()) {
        sum_few_tables<kind(), rows(), 2>({&block, &other}, t.x, sums);
      } else {
        sum_few_tables<kind(), rows(), 1>({&block}, t.x, sums);
        with_table_kind(*other.weight->codes, [&](auto other_kind) {
          sum_few_tables<other_kind(), rows(), 1>({&other}, t.x, others);
        });
      }
    });
  });
  finish_sums(t, block, 0, p.rows, sums);
  finish_sums(t, other, 0, p.rows, others);
  adapt(p, false, first, 0, p.rows, sums, kBlock);
  adapt(p, is_gated, second, 0, p.rows, others, kBlock);
  for (int64_t r = 0; r < p.rows; ++r) {
    float* y = p.y + r * p.ldy + first;
    finish_row(p, sums + r * kBlock, others + r * kBlock, first, y);
    if (!is_gated) finish_row(p, others + r * kBlock, nullptr, second, y + kBlock);
  }
}

#if defined(QUIRE_TILES)
// All rows with some blocks from `b` on. Returns which block comes next.
inline int64_t multiply_table_tiles(const TableProduct& t, int64_t b, int64_t end) {
  const Product& p = t.p;
  const int step = p.factor != nullptr ? 2 : 1;
  TableBlock blocks[kTileBlocks];
  int count = 0;
  int64_t next = b;
  for (; next < end && count < kTileBlocks; ++next) {
    prefetch_gains(p, next * kBlock);
    blocks[count++] = t.block(next);
    if (p.factor != nullptr) blocks[count++] = t.factor(next);
  }
  alignas(64) float sums[kTileBlocks][kRowsOfCodes * kBlock];
  for (int64_t row = 0; row < p.rows; row += kRowsOfCodes) {
    const int64_t rows = std::min(kRowsOfCodes, p.rows - row);
    sum_table_tiles(blocks, count, t.x, row, rows, sums);
    for (int i = 0; i < count; ++i) finish_sums(t, blocks[i], row, rows, sums[i]);
    for (int i = 0; i < count; i += step) {
      finish_codes(p, b + i / step, row, rows, sums[i], sums[i + step - 1]);
    }
  }
  return next;
}
#endif

// A product with such a weight. A factor has such codes, too, and takes its inputs in the weight's
// order, times the same factors.
inline void multiply_tables(Thread& thread, const Product& product, uint16_t* halves) {
  if (product.rows == 0) return;
  const Matrix& weight = *product.weight;
  const RoundedTableRows x = place_table_rows(weight, product.rows, halves);
  Product p = product;
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
  round_table_rows(thread, weight, x, product.x, product.ldx);
  const TableProduct t{p, x, columns, OneTable(*weight.codes),
                       OneTable(p.factor != nullptr ? *p.factor->codes : *weight.codes)};
  const int64_t num_blocks = (weight.out + kBlock - 1) / kBlock;
  const int64_t step = p.factor != nullptr ? 1 : 2;
  const int64_t at_once = codes_at_once(weight, num_blocks);
  thread.share((num_blocks + at_once - 1) / at_once, [&](int64_t item) {
    const int64_t end = std::min(num_blocks, (item + 1) * at_once);
    for (int64_t b = item * at_once; b < end;) {
#if defined(QUIRE_TILES)
      if (goes_by_tiles(weight, p.rows)) {
        b = multiply_table_tiles(t, b, end);
        continue;
      }
#endif
      if (p.rows <= kFewRows && b + step <= end) {
        multiply_two_tables(t, b);
        b += step;
      } else {
        multiply_table_block(t, b++);
      }
    }
  });
}

}  // namespace QUIRE_ISA
}  // namespace quire
