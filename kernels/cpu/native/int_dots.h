// Products of 16-bit integers, which compilers' vectors have no operator for: two in each lane, by
// the instruction of the CPU or by what it computes; and of bytes, where there is an instruction.
// They are exact, and so the same everywhere.
#pragma once
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quire {
namespace QUIRE_ISA {

typedef uint16_t vpairs __attribute__((vector_size(kLanes * 4)));
typedef int16_t vsigned __attribute__((vector_size(kLanes * 4)));
typedef int16_t vshort __attribute__((vector_size(kLanes * 2)));

// acc + what each pair of `a` makes of the pair of `b` beside it.
inline vi add_int_pairs(vi acc, vu a, vu b) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(QUIRE_WIDE)
  return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(QUIRE_WIDE)
  return acc + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__) && !defined(QUIRE_WIDE)
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return acc + (vi)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
  const vi low = ((vi)a << 16 >> 16) * ((vi)b << 16 >> 16);
  return acc + low + ((vi)a >> 16) * ((vi)b >> 16);
#endif
}

#if defined(__AVX512VNNI__)
#define QUIRE_BYTE_DOTS
// acc + what each four bytes without a sign of `a` make of the four with one of `b` beside them.
inline vu add_byte_fours(vu acc, vu a, vu b) {
  return (vu)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
