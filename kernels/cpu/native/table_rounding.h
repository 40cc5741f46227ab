// Inputs of products with entries of tables, rounded for them: to whole numbers of two bytes with
// signs, 256 * upper + lower, by a step for each unit of columns.
#pragma once
#include "rounding.h"

namespace quire {
namespace QUIRE_ISA {

// Whether products of bytes are all that is needed: where there is an instruction for them.
#if defined(QUIRE_BYTE_DOTS)
constexpr bool kByteDots = true;
#else
constexpr bool kByteDots = false;
#endif

inline bool goes_by_tiles(const Matrix& weight, int64_t rows) {
  return kTiles && weight.codes->unit % 64 == 0 && rows >= kTilesFrom;
}

// Where they go. As bytes: of each unit all upper ones, and then all lower ones. Else pairs of 16
// bits, of each four columns 0 and 2 and then 1 and 3: of each unit the whole numbers, and then their
// upper bytes. `totals` are what 128 times the whole numbers and the upper bytes add up to.
inline RoundedRows place_table_rows(const Matrix& weight, int64_t rows, void* memory) {
  const int64_t unit = weight.codes->unit, columns = padded(weight.in, unit);
  const bool as_bytes = kByteDots || goes_by_tiles(weight, rows);
  const int64_t stride = (as_bytes ? 2 : 4) * columns;
  char* codes = static_cast<char*>(memory);
  float* steps = reinterpret_cast<float*>(codes + padded(rows, 16) * stride);
  int32_t* totals = reinterpret_cast<int32_t*>(steps + columns / unit * rows);
  return {codes, steps, totals, stride, rows, as_bytes};
}

// Units `begin` to end - 1 of a row.
inline void round_table_row(const Matrix& weight, const RoundedRows& rows, const float* x,
                            int64_t row, int64_t begin, int64_t end) {
  const int64_t unit = weight.codes->unit;
  float inputs[kMostUnit + kLanes];
  int32_t codes[kMostUnit + kLanes], uppers[kMostUnit + kLanes];
  for (int64_t u = begin; u < end; ++u) {
    read_unit(weight, x, u * unit, inputs);
    // If a number among them is none, so is the step.
    const float step = largest_of_unit(inputs, unit) / static_cast<float>(kMostWhole);
    int32_t total = round_unit<false>(inputs, unit, step, codes);
    vi upper_total = {};
    for (int64_t i = 0; i < unit; i += kLanes) {
      const vi upper = (load_as<vi>(codes + i) + 128) >> 8;
      std::memcpy(uppers + i, &upper, sizeof upper);
      upper_total += upper;
    }
    int32_t lanes[kLanes];
    std::memcpy(lanes, &upper_total, sizeof upper_total);
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
    rows.steps[u * rows.rows + row] = step;
    rows.totals[u * rows.rows + row] = 128 * total;
    char* out = rows.row(row) + u * (rows.as_bytes ? 2 : 4) * unit;
    if (rows.as_bytes) {
      for (int64_t i = 0; i < unit; i += kLanes) {
        const vbytes upper = lowest_bytes(load_as<vi>(uppers + i));
        const vbytes lower = lowest_bytes(load_as<vi>(codes + i));
        const int64_t count = std::min<int64_t>(kLanes, unit - i);
        std::memcpy(out + i, &upper, count);
        std::memcpy(out + unit + i, &lower, count);
      }
    } else {
      store_pairs(codes, unit, out);
      store_pairs(uppers, unit, out + 2 * unit);
    }
  }
}

// Columns that a thread takes at a time: so that threads share one row, too.
constexpr int64_t kColumnsToRound = 1024;

inline void round_table_rows(Thread& thread, const Matrix& weight, const RoundedRows& rows,
                             const float* x, int64_t ldx) {
  const int64_t unit = weight.codes->unit, num_units = padded(weight.in, unit) / unit;
  const int64_t at_once = std::max<int64_t>(1, kColumnsToRound / unit);
  const int64_t pieces = (num_units + at_once - 1) / at_once;
  thread.share(rows.rows * pieces, [&](int64_t item) {
    const int64_t row = item / pieces, begin = item % pieces * at_once;
    round_table_row(weight, rows, x + row * ldx, row, begin, std::min(begin + at_once, num_units));
  });
}

}  // namespace QUIRE_ISA
}  // namespace quire
