// A unit of a block of integer codes: its codes made wide, and what belongs to them.
#pragma once
#include "blocks.h"
#include "codes.h"
#include "int_dots.h"

namespace quire {
namespace QUIRE_ISA {

// 64 bytes of a block hold `kPairs<Nibbles>` pairs of each of 16 outputs, in the order of the inputs.
template <bool Nibbles>
constexpr int kPairs = Nibbles ? 4 : 2;

template <bool Nibbles>
inline void widen_codes(vu codes, vu (&pairs)[kPairs<Nibbles>]) {
  if constexpr (Nibbles) {
    pairs[0] = codes & 0x000f000fu;
    pairs[1] = codes >> 8 & 0x000f000fu;
    pairs[2] = codes >> 4 & 0x000f000fu;
    pairs[3] = (vu)((vpairs)codes >> 12);
  } else {
    pairs[0] = (vu)((vsigned)((vpairs)codes << 8) >> 8);
    pairs[1] = (vu)((vsigned)codes >> 8);
  }
}

// What 16 outputs of a unit have besides their codes: what a code is zero at, and the scales, or ones
// where these are the whole block's.
struct UnitScales {
  vf scales[kVectors];
  vi zeros[kVectors];
  bool has_zeros;
};

inline UnitScales load_scales(const Matrix& weight, const CodesLayout& layout, const char* block,
                              int64_t u) {
  const char* from = layout.front > 0 ? block + u * layout.unit_bytes : block;
  UnitScales result;
  result.has_zeros = weight.codes->has_zeros || weight.dtype == kInt4;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = v * kLanes;
    result.scales[v] =
        layout.front > 0 ? load_as<vf>(from + first * sizeof(float)) : all(1.0f);
    if (weight.codes->has_zeros) {
      const char* zeros = from + kBlock * sizeof(float);
      result.zeros[v] = __builtin_convertvector(load_as<vshort>(zeros + first * 2), vi);
    } else {
      result.zeros[v] = (weight.dtype == kInt4 ? 8 : 0) + vi{};
    }
  }
  return result;
}

inline const char* codes_of_unit(const CodesLayout& layout, const char* block, int64_t u) {
  return block + layout.head + u * layout.unit_bytes + layout.front;
}

constexpr int64_t kCodesAhead = 2048;  // bytes

// A unit's codes as pairs of 16 bits, [pairs][16 outputs].
template <bool Nibbles>
inline void widen_unit(const char* codes, int64_t unit, uint32_t* wide) {
  for (int64_t i = 0; i < unit / (2 * kPairs<Nibbles>); ++i, codes += 64) {
    __builtin_prefetch(codes + kCodesAhead);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      vu pairs[kPairs<Nibbles>];
      widen_codes<Nibbles>(load_as<vu>(codes + 4 * v * kLanes), pairs);
#pragma GCC unroll 4
      for (int j = 0; j < kPairs<Nibbles>; ++j) {
        std::memcpy(wide + (i * kPairs<Nibbles> + j) * kBlock + v * kLanes, &pairs[j], sizeof(vu));
      }
    }
  }
}

// What a unit's integers stand for, added to a row's sums of 16 outputs, of which vector `v`.
inline void add_scaled(vi unit, const UnitScales& scales, int v, float step, float* sums) {
  float* out = sums + v * kLanes;
  store(out, __builtin_convertvector(unit, vf) * (scales.scales[v] * step) + load(out));
}

inline const char* codes_block(const Matrix& weight, int64_t b) {
  return static_cast<const char*>(weight.blocks) + b * weight.codes->block_bytes;
}

// One output's weights, by input.
inline void read_codes(const Matrix& weight, int64_t output, float* out) {
  const Codes& codes = *weight.codes;
  const CodesLayout layout = layout_of(codes, weight.in, weight.dtype);
  const int64_t row = output % kBlock;
  for (int64_t u = 0; u < layout.num_units; ++u) {
    const char* block = codes_block(weight, output / kBlock);
    const char* bytes = codes_of_unit(layout, block, u);
    const UnitScales s = load_scales(weight, layout, block, u);
    const int32_t zero = s.zeros[row / kLanes][row % kLanes];
    const float scale = layout.front > 0 ? s.scales[row / kLanes][row % kLanes]
                                         : reinterpret_cast<const float*>(block)[row];
    const int64_t first = u * codes.unit, end = std::min(weight.in, first + codes.unit);
    for (int64_t k = first; k < end; ++k) {
      const int64_t i = k - first;
      int32_t code;
      if (weight.dtype == kInt4) {
        const char* byte = bytes + i / 8 * 64 + row * 4 + i % 4;
        code = static_cast<uint8_t>(*byte) >> (i / 4 % 2 * 4) & 15;
      } else {
        code = static_cast<int8_t>(bytes[i / 4 * 64 + row * 4 + i % 4]);
      }
      float value = static_cast<float>(code - zero) * scale;
      if (codes.factors != nullptr) value *= codes.factors[k];
      out[codes.order != nullptr ? codes.order[k] : k] = value;
    }
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
