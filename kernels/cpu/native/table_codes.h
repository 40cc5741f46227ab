// Weights that are entries of a table of 16: one for all outputs, or one for each. How their codes
// lie is said in table_layout.h.
//
// A decoder takes `kStep` inputs at a time: `decode` calls `use` with the number of each, in order, and
// what 16 outputs have for it, scales left out. Scales are to be multiplied with `kScale` before.
#pragma once
#include "chunk.h"
#include "table_layout.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace quire {
namespace QUIRE_ISA {

// Code by code: for any layout, and any CPU.
template <int Step>
struct PlainTableCodes {
  static constexpr int kStep = Step;
  static constexpr int kBytes = 8 * Step;
  static constexpr float kScale = 1.0f;
  const Codes& about;
  const float* tables;
  int64_t step;

  PlainTableCodes(const Codes& codes, int64_t block)
      : about(codes),
        tables(codes.has_tables ? codes.tables + block * kBlock * 16 : codes.tables),
        step(codes.has_tables ? 16 : 0) {}

  template <typename Use>
  void decode(const char* codes, Use use) const {
    for (int k = 0; k < kStep; ++k) {
      const Nibble place = table_place(about, k);
      float numbers[kBlock];
      for (int o = 0; o < kBlock; ++o) {
        const int byte = static_cast<uint8_t>(codes[place.byte + place_of_output(about, o)]);
        numbers[o] = tables[o * step + (byte >> place.shift & 15)];
      }
      vf values[kVectors];
      for (int v = 0; v < kVectors; ++v) values[v] = load(numbers + v * kLanes);
      use(k, values);
    }
  }
};

#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(QUIRE_WIDE)

// The first bytes of a table's entries, their second bytes, and so on, twice.
inline void split_table(const float* table, __m256i (&planes)[4]) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m128i part[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 4 * i));
    part[i] = _mm_shuffle_epi8(four, order);
  }
  const __m128i a = _mm_unpacklo_epi32(part[0], part[1]), b = _mm_unpacklo_epi32(part[2], part[3]);
  const __m128i c = _mm_unpackhi_epi32(part[0], part[1]), d = _mm_unpackhi_epi32(part[2], part[3]);
  planes[0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(a, b));
  planes[1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(a, b));
  planes[2] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(c, d));
  planes[3] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(c, d));
}

// The bytes of 32 entries, as pairs that are the lower and the upper halves of floats: of the first
// 8 codes of each 16, and of the others.
struct Halves {
  __m256i lower[2], upper[2];
};

inline Halves look_up(const __m256i (&planes)[4], __m256i codes) {
  const __m256i a = _mm256_shuffle_epi8(planes[0], codes);
  const __m256i b = _mm256_shuffle_epi8(planes[1], codes);
  const __m256i c = _mm256_shuffle_epi8(planes[2], codes);
  const __m256i d = _mm256_shuffle_epi8(planes[3], codes);
  return {{_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)},
          {_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d)}};
}

// The lower halves of 32 bytes, or the upper ones.
inline __m256i codes_of_phase(const char* codes, int phase) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i moved = phase == 0 ? bytes : _mm256_srli_epi16(bytes, 4);
  return _mm256_and_si256(moved, _mm256_set1_epi8(15));
}

struct OneTableCodes {
  static constexpr int kStep = 4;
  static constexpr int kBytes = 32;
  static constexpr float kScale = 1.0f;
  __m256i planes[4];

  OneTableCodes(const Codes& codes, int64_t) { split_table(codes.tables, planes); }

  template <typename Use>
  void decode(const char* codes, Use use) const {
#pragma GCC unroll 2
    for (int phase = 0; phase < 2; ++phase) {
      const Halves found = look_up(planes, codes_of_phase(codes, phase));
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const vf values[2] = {(vf)_mm256_unpacklo_epi16(found.lower[i], found.upper[i]),
                              (vf)_mm256_unpackhi_epi16(found.lower[i], found.upper[i])};
        use(2 * phase + i, values);
      }
    }
  }
};

#elif defined(__AVX512F__)

struct OneTableCodes {
  static constexpr int kStep = 4;
  static constexpr int kBytes = 32;
  static constexpr float kScale = 1.0f;
  __m512 table;

  OneTableCodes(const Codes& codes, int64_t) : table(_mm512_loadu_ps(codes.tables)) {}

  // Each output's byte comes to the bottom of its lane; of an index, the lookup takes four bits.
  template <typename Use>
  void decode(const char* codes, Use use) const {
    const __m512i place = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 1, 1, 1, 1, 5, 5, 5, 5);
    const __m512i shift = _mm512_setr_epi32(0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24);
    const __m512i bytes = _mm512_castsi256_si512(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    __m512i found[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i from = _mm512_add_epi32(place, _mm512_set1_epi32(2 * i));
      found[i] = _mm512_srlv_epi32(_mm512_permutexvar_epi32(from, bytes), shift);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512i codes_of_k = k < 2 ? found[k] : _mm512_srli_epi32(found[k - 2], 4);
      const vf values[1] = {(vf)_mm512_permutexvar_ps(codes_of_k, table)};
      use(k, values);
    }
  }
};

#elif defined(__aarch64__) && !defined(QUIRE_WIDE)

// The first bytes of a table's entries, their second bytes, and so on.
inline uint8x16x4_t split_table(const float* table) {
  return vld4q_u8(reinterpret_cast<const uint8_t*>(table));
}

// The floats of 16 codes, four at a time.
struct Fours {
  vf four[4];
};

inline Fours look_up(const uint8x16x4_t& planes, uint8x16_t codes) {
  const uint8x16_t a = vqtbl1q_u8(planes.val[0], codes), b = vqtbl1q_u8(planes.val[1], codes);
  const uint8x16_t c = vqtbl1q_u8(planes.val[2], codes), d = vqtbl1q_u8(planes.val[3], codes);
  const uint16x8_t lower[2] = {(uint16x8_t)vzip1q_u8(a, b), (uint16x8_t)vzip2q_u8(a, b)};
  const uint16x8_t upper[2] = {(uint16x8_t)vzip1q_u8(c, d), (uint16x8_t)vzip2q_u8(c, d)};
  return {{(vf)vzip1q_u16(lower[0], upper[0]), (vf)vzip2q_u16(lower[0], upper[0]),
           (vf)vzip1q_u16(lower[1], upper[1]), (vf)vzip2q_u16(lower[1], upper[1])}};
}

inline uint8x16_t codes_of_phase(const char* codes, int phase) {
  const uint8x16_t bytes = vld1q_u8(reinterpret_cast<const uint8_t*>(codes));
  return phase == 0 ? vandq_u8(bytes, vdupq_n_u8(15)) : vshrq_n_u8(bytes, 4);
}

struct OneTableCodes {
  static constexpr int kStep = 4;
  static constexpr int kBytes = 32;
  static constexpr float kScale = 1.0f;
  uint8x16x4_t planes;

  OneTableCodes(const Codes& codes, int64_t) : planes(split_table(codes.tables)) {}

  template <typename Use>
  void decode(const char* codes, Use use) const {
#pragma GCC unroll 2
    for (int phase = 0; phase < 2; ++phase) {
      const Fours even = look_up(planes, codes_of_phase(codes, phase));
      const Fours odd = look_up(planes, codes_of_phase(codes + 16, phase));
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const vf values[4] = {even.four[2 * i], odd.four[2 * i], even.four[2 * i + 1],
                              odd.four[2 * i + 1]};
        use(2 * phase + i, values);
      }
    }
  }
};

#else

using OneTableCodes = PlainTableCodes<4>;
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
