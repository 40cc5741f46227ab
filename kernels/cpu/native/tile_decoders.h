// Codes that stand for floats, e4m3, as tiles of bfloat16; what numbers are
// split in for these.
#pragma once
#include "block_pairs.h"
#include "float_values.h"
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

// It brings the codes of 32 columns of a block, `kBytes` of them, to a tile of
// [16 pairs of columns][16 outputs][2]. Scales are to be multiplied with `kScale` before.
//
// e4m3 is bfloat16 with fewer digits, but for the bias of its exponent: with 112 set before its four
// bits, it is 2^-8 as large. Tiles take subnormal numbers for zero, so what a subnormal code stands
// for is looked up; in a weight that has few of them, only where there is one.
template <bool Subnormals>
struct Float8Tiles {
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
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
