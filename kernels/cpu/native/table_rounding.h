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

// How rounded inputs lie. For tiles they are bytes: of up to 16 rows, for each 64 columns, the upper
// ones of all rows and then the lower ones. For dot products of bytes: of each unit all upper ones, and
// then all lower ones. Else they are pairs of 16 bits, of each four columns 0 and 2 and then 1 and 3:
// of each unit the whole numbers, and then their upper bytes.
struct RoundedTableRows : RoundedRows {
  bool for_tiles;
  int64_t unit;

  // What is of one of 16 rows and a unit.
  char* at(int64_t row, int64_t u) const {
    if (for_tiles) return codes + row / 16 * 16 * stride + row % 16 * 64 + u * 32 * unit;
    return this->row(row) + u * (as_bytes ? 2 : 4) * unit;
  }
};

// `totals` are what 128 times the whole numbers and the upper bytes add up to.
inline RoundedTableRows place_table_rows(const Matrix& weight, int64_t rows, void* memory) {
  const int64_t unit = weight.codes->unit, columns = padded(weight.in, unit);
  const bool for_tiles = goes_by_tiles(weight, rows), as_bytes = kByteDots || for_tiles;
  const int64_t stride = (as_bytes ? 2 : 4) * columns;
  char* codes = static_cast<char*>(memory);
  float* steps = reinterpret_cast<float*>(codes + padded(rows, 16) * stride);
  int32_t* totals = reinterpret_cast<int32_t*>(steps + columns / unit * rows);
  return {{codes, steps, totals, stride, rows, as_bytes}, for_tiles, unit};
}

// Units `begin` to end - 1 of a row.
inline void round_table_row(const Matrix& weight, const RoundedTableRows& rows, const float* x,
                            int64_t row, int64_t begin, int64_t end) {
  const Codes& about = *weight.codes;
  const int64_t unit = about.unit;
  const bool is_plain = about.order == nullptr && about.factors == nullptr;
  float memory[kMostUnit + kLanes];
  int32_t codes[kMostUnit + kLanes], uppers[kMostUnit + kLanes];
  for (int64_t u = begin; u < end; ++u) {
    const float* inputs = x + u * unit;
    if (!is_plain || (u + 1) * unit > weight.in || unit % kLanes != 0) {
      read_unit(weight, x, u * unit, memory);
      inputs = memory;
    }
    // If a number among them is none, so is the step.
    const float step = largest_of_unit(inputs, unit) / static_cast<float>(kMostWhole);
    const float inverse = step >= kLeastStep ? 1.0f / step : 0.0f;  // also where it is none
    char* out = rows.at(row, u);
    vi total = {};
    for (int64_t i = 0; i < unit; i += kLanes) {
      const vf whole = nearest_whole(inverse == 0.0f ? all(0.0f) : load(inputs + i) * inverse);
      const vi code = __builtin_convertvector(whole, vi), upper = (code + 128) >> 8;
      total += code + upper;
      if (!rows.as_bytes) {
        std::memcpy(codes + i, &code, sizeof code);
        std::memcpy(uppers + i, &upper, sizeof upper);
        continue;
      }
      const vbytes uppers = lowest_bytes(upper), lowers = lowest_bytes(code);
      if (rows.for_tiles) {
        char* to = out + i / 64 * 2048 + i % 64;
        std::memcpy(to, &uppers, sizeof uppers);
        std::memcpy(to + 1024, &lowers, sizeof lowers);
      } else {
        const int64_t count = std::min<int64_t>(kLanes, unit - i);
        std::memcpy(out + i, &uppers, count);
        std::memcpy(out + unit + i, &lowers, count);
      }
    }
    if (!rows.as_bytes) {
      store_pairs(codes, unit, out);
      store_pairs(uppers, unit, out + 2 * unit);
    }
    rows.steps[u * rows.rows + row] = step;
    rows.totals[u * rows.rows + row] = 128 * sum_of_lanes(total);
  }
}

// Columns that a thread takes at a time: so that threads share one row, too.
constexpr int64_t kColumnsToRound = 1024;

inline void round_table_rows(Thread& thread, const Matrix& weight, const RoundedTableRows& rows,
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
