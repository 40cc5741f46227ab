// Inputs of products with integer codes, rounded for them: to 16 bits, by a step for each unit of
// columns, or to 8 by one step for the row.
#pragma once
#include <algorithm>

#include "blocks.h"
#include "codes.h"
#include "tiles.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace quire {
namespace QUIRE_ISA {

// Columns of a unit. Of more, sums of products of 16 bits and 8 would not fit 32.
constexpr int64_t kMostUnit = 256;

// Rows that a block is gone over for at once.
constexpr int64_t kRowsOfCodes = 48;

// The rounded inputs of a product.
struct RoundedRows {
  char* codes;
  float* steps;     // [units][rows]
  int32_t* totals;  // [units][rows]: what the codes add up to
  int64_t stride;   // of a row's codes, in bytes
  int64_t rows;
  // As bytes, for tiles: 64 upper ones of columns and then their lower ones, or of 8 bits all there
  // is. Else pairs of 16 bits, of each four columns 0 and 2 and then 1 and 3.
  bool as_bytes;

  char* row(int64_t r) const { return codes + r * stride; }
};

// From so many rows on, tiles are worth it.
constexpr int64_t kTilesFrom = 4;

inline RoundedRows place_rows(const Matrix& weight, int64_t rows, void* memory) {
  const int64_t columns = padded(weight.in, weight.codes->unit);
  char* codes = static_cast<char*>(memory);
  float* steps = reinterpret_cast<float*>(codes + padded(rows, 16) * 2 * columns);
  int32_t* totals = reinterpret_cast<int32_t*>(steps + columns / weight.codes->unit * rows);
  const bool as_bytes = kTiles && weight.codes->unit % 64 == 0 && rows >= kTilesFrom;
  return {codes, steps, totals, 2 * columns, rows, as_bytes};
}

// The inputs of a unit's columns, times their factors; zeros where there are none.
inline void read_unit(const Matrix& weight, const float* x, int64_t first, float* out) {
  const Codes& codes = *weight.codes;
  const int64_t count = std::min(codes.unit, weight.in - first);
  if (codes.order != nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = x[codes.order[first + i]];
  } else {
    std::copy_n(x + first, count, out);
  }
  if (codes.factors != nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] *= codes.factors[first + i];
  }
  std::fill(out + count, out + padded(codes.unit, kLanes), 0.0f);
}

// The largest of all lanes, or what they add up to, of whole numbers.
inline int32_t largest_lane(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  int32_t most = lanes[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, lanes[i]);
  return most;
#endif
}

inline int32_t sum_of_lanes(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t lanes[kLanes], result = 0;
  std::memcpy(lanes, &v, sizeof v);
  for (int i = 0; i < kLanes; ++i) result += lanes[i];
  return result;
#endif
}

// The largest size of some numbers, no number if one of them is none or infinite. Bits of sizes are in
// the order of these, and of what is no number they are the largest.
inline float largest_of_unit(const float* x, int64_t count) {
  vi most = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const vi size = load_as<vi>(x + i) & 0x7fffffff;
    most = size > most ? size : most;
  }
  const int32_t bits = largest_lane(most);
  float result;
  std::memcpy(&result, &bits, sizeof bits);
  return result + 0.0f * result;
}

inline vf nearest_whole(vf x) {
  const vf magic = all(12582912.0f);  // 1.5 * 2^23
  return x + magic - magic;
}

// Steps below this stand for nothing: their inverse is no float.
constexpr float kLeastStep = 1e-36f;

// Brings a row's unit into codes, and returns their sum.
template <bool To8Bits>
inline int32_t round_unit(const float* x, int64_t unit, float step, int32_t* codes) {
  if (!(step >= kLeastStep)) {
    std::fill(codes, codes + unit, 0);
    return 0;
  }
  vi total = {};
  const float inverse = 1.0f / step;
  for (int64_t i = 0; i < unit; i += kLanes) {
    vf v = load(x + i);
    if constexpr (To8Bits) {
      v = min(max(nearest_whole(v / step), all(-128.0f)), all(127.0f));
    } else {
      v = nearest_whole(v * inverse);
    }
    const vi code = __builtin_convertvector(v, vi);
    total += code;
    std::memcpy(codes + i, &code, sizeof code);
  }
  return sum_of_lanes(total);
}

inline void store_pairs(const int32_t* codes, int64_t unit, char* out) {
  constexpr uint64_t low = 0x0000ffff0000ffff;
  for (int64_t i = 0; i < unit; i += 4) {
    uint64_t two[2];
    std::memcpy(two, codes + i, sizeof two);
    const uint64_t four = (two[0] & low) | (two[1] & low) << 16;
    std::memcpy(out + 2 * i, &four, sizeof four);
  }
}

typedef int8_t vbytes __attribute__((vector_size(kLanes)));

inline vbytes lowest_bytes(vi v) {
#if defined(__AVX512F__)
  return (vbytes)_mm512_cvtepi32_epi8((__m512i)v);
#else
  return __builtin_convertvector(v, vbytes);
#endif
}

template <bool To8Bits>
inline void store_bytes(const int32_t* codes, int64_t unit, char* out) {
  static_assert(64 % kLanes == 0);
  for (int64_t i = 0; i < unit; i += kLanes) {
    const vi some = load_as<vi>(codes + i);
    char* at = out + i / 64 * 128 + i % 64;
    const vbytes upper = lowest_bytes(To8Bits ? some : some >> 8);
    const vbytes lower = lowest_bytes(To8Bits ? vi{} : some);
    std::memcpy(at, &upper, sizeof upper);
    std::memcpy(at + 64, &lower, sizeof lower);
  }
}

template <bool To8Bits>
inline void round_row(const Matrix& weight, const RoundedRows& rows, const float* x, int64_t row) {
  const int64_t unit = weight.codes->unit, num_units = rows.stride / (2 * unit);
  float inputs[kMostUnit + kLanes];
  int32_t codes[kMostUnit + kLanes];
  float of_row = weight.codes->activation_scale;
  if (To8Bits && of_row == 0.0f) {
    for (int64_t u = 0; u < num_units && of_row == of_row; ++u) {
      read_unit(weight, x, u * unit, inputs);
      const float size = largest_of_unit(inputs, unit);
      of_row = of_row >= size ? of_row : size;
    }
    of_row /= 127.0f;
  }
  for (int64_t u = 0; u < num_units; ++u) {
    read_unit(weight, x, u * unit, inputs);
    const float size = largest_of_unit(inputs, unit);
    // If a number among them is none, so is the step.
    const float step = To8Bits ? of_row + 0.0f * size : size / 32767.0f;
    rows.steps[u * rows.rows + row] = step;
    rows.totals[u * rows.rows + row] = round_unit<To8Bits>(inputs, unit, step, codes);
    char* out = rows.row(row) + u * 2 * unit;
    if (rows.as_bytes) {
      store_bytes<To8Bits>(codes, unit, out);
    } else {
      store_pairs(codes, unit, out);
    }
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
