// How weights that are entries of tables lie: their codes in a unit, and the tables as whole numbers.
// See Codes in abi.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

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

// With bfloat16 tables, 128 inputs of an output lie together, in 32 words of 16 bits: word `i` has
// inputs i, 32 + i, 64 + i and 96 + i from its lowest bits on.
constexpr int64_t kColumnsOfStep = 128;
constexpr int64_t kBytesOfStep = kColumnsOfStep / 2 * 16;

// Where a code lies in its unit: the byte, and which half of it.
struct Nibble {
  int64_t byte;
  int shift;
};

// Of input `k` of 128, with bfloat16 tables.
inline Nibble place_in_step(int64_t k, int64_t output) {
  return {output * 64 + k % 32 * 2 + k / 64, static_cast<int>(k / 32 % 2 * 4)};
}

// Of input `k` of a unit.
inline Nibble table_place(const Codes& codes, int64_t k, int64_t output) {
  if (codes.has_bfloat16_tables) {
    Nibble place = place_in_step(k % kColumnsOfStep, output);
    place.byte += k / kColumnsOfStep * kBytesOfStep;
    return place;
  }
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

// A table as 16 numbers of bfloat16, its output's scale in them: each is a weight, rounded once.
// Infinite ones are not among them, for what fills up columns is an entry, too, times zero.
struct BFloat16Table {
  uint16_t entries[16];
};

static inline BFloat16Table bfloat16_table(const float* table, float scale) {
  BFloat16Table result;
  for (int i = 0; i < 16; ++i) {
    const float value = table[i] * scale;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t size = bits & 0x7fffffffu;
    const uint32_t rounded = (size + 0x7fffu + (size >> 16 & 1u)) >> 16;
    const uint32_t sign = bits >> 16 & 0x8000u;
    result.entries[i] = static_cast<uint16_t>(sign | std::min<uint32_t>(rounded, 0x7f7fu));
  }
  return result;
}

// Tables of a block's outputs, as they lie in it: their scales, and then the bytes in the order of
// codes, 64 upper ones and the 64 lower ones that belong to them. bfloat16 ones are in the place of
// these bytes, one output's after the other's, and have no scales.
constexpr int64_t kTableScales = 16 * sizeof(float);
constexpr int64_t kTableBytes = 16 * 2 * 16;

// Where those of an output begin; its lower bytes are 64 further on.
inline int64_t table_of_output(int64_t output) { return output % 4 * 128 + output / 4 * 16; }

}  // namespace quire
