// How weights that are entries of tables lie: their codes in a unit, and the tables as whole numbers.
// See Codes in abi.h.
#pragma once
#include <algorithm>
#include <cmath>

#include "abi.h"

namespace quire {

// With one table, codes lie as those of 4 bits do. With a table for each output, 32 inputs lie
// together, so that 16 bytes, which one lookup goes over, are of one output: output 4 * i + j has
// part `i` of vector `j` of four vectors of 64 bytes, whose lower halves are the first 16 inputs.
// Units that are no multiple of 32 lie as with one table.
constexpr int64_t kTablesTogether = 32;

inline bool lies_by_output(const Codes& codes) {
  return codes.has_tables && codes.unit % kTablesTogether == 0;
}

// Where a code lies in its unit: the byte, and which half of it.
struct Nibble {
  int64_t byte;
  int shift;
};

// Of input `k` of a unit.
inline Nibble table_place(const Codes& codes, int64_t k, int64_t output) {
  if (!lies_by_output(codes)) {
    return {k / 8 * 64 + output * 4 + k % 4, static_cast<int>(k / 4 % 2 * 4)};
  }
  return {k / 32 * 256 + output % 4 * 64 + output / 4 * 16 + k % 16,
          static_cast<int>(k / 16 % 2 * 4)};
}

// A table as whole numbers of two bytes with signs, 256 * upper + lower, by a step of its own: an
// entry is that times scale / 256. The largest is such that its upper byte is 127.
struct WholeTable {
  int8_t upper[16], lower[16];
  float scale;
};

constexpr int kMostWhole = 127 * 256 + 127;

// Static: compiled for one instruction set, it must not be what another one calls.

static inline WholeTable whole_table(const float* table) {
  double most = 0.0;
  for (int i = 0; i < 16; ++i) most = std::max(most, std::fabs(static_cast<double>(table[i])));
  WholeTable result{};
  if (!(most > 0.0)) return result;
  result.scale = static_cast<float>(256.0 * most / kMostWhole);
  for (int i = 0; i < 16; ++i) {
    const int whole = static_cast<int>(std::nearbyint(table[i] / most * kMostWhole));
    const int upper = (whole + 128) >> 8;
    result.upper[i] = static_cast<int8_t>(upper);
    result.lower[i] = static_cast<int8_t>(whole - upper * 256);
  }
  return result;
}

// Tables of a block's outputs, as they lie in it: their scales, and then the bytes in the order of
// codes, 64 upper ones and the 64 lower ones that belong to them.
constexpr int64_t kTableScales = 16 * sizeof(float);
constexpr int64_t kTableBytes = 16 * 2 * 16;

// Where those of an output begin; its lower bytes are 64 further on.
inline int64_t table_of_output(int64_t output) { return output % 4 * 128 + output / 4 * 16; }

}  // namespace quire
