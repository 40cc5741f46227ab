// Weights that are entries of a table of 16: one for all outputs, or one for each. How their codes
// lie is said in table_layout.h.
//
// A decoder takes `kStep` inputs at a time, in `kPhases`: `begin` looks some codes up, and `take`
// calls `use` with the number of each input of a part of these, in order, and what 16 outputs have
// for it, scales left out. So several blocks can be gone over part by part in turns: the sums of
// one would wait for each other. Scales are to be multiplied with `kScale` before.
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
  static constexpr int kPhases = 1, kParts = 1;
  using Found = const char*;
  const Codes& about;
  const float* tables;
  int64_t step;

  PlainTableCodes(const Codes& codes, int64_t block)
      : about(codes),
        tables(codes.has_tables ? codes.tables + block * kBlock * 16 : codes.tables),
        step(codes.has_tables ? 16 : 0) {}

  void begin(const char* codes, int, Found& found) const { found = codes; }

  template <typename Use>
  void take(Found codes, int, int, Use use) const {
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
  static constexpr int kPhases = 2, kParts = 1;
  using Found = Halves;
  __m256i planes[4];

  OneTableCodes(const Codes& codes, int64_t) { split_table(codes.tables, planes); }

  void begin(const char* codes, int phase, Found& found) const {
    found = look_up(planes, codes_of_phase(codes, phase));
  }

  template <typename Use>
  void take(const Found& found, int phase, int, Use use) const {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const vf values[2] = {(vf)_mm256_unpacklo_epi16(found.lower[i], found.upper[i]),
                            (vf)_mm256_unpackhi_epi16(found.lower[i], found.upper[i])};
      use(2 * phase + i, values);
    }
  }
};

struct ManyTablesCodes {
  static constexpr int kStep = 32;
  static constexpr int kBytes = 256;
  static constexpr float kScale = 1.0f;
  static constexpr int kPhases = 2, kParts = 4;
  struct Found {
    __m256i fours[4][8];  // four inputs' floats of two outputs
  };
  __m256i planes[8][4];  // of two outputs each, 4 apart

  ManyTablesCodes(const Codes& codes, int64_t block) {
    for (int pair = 0; pair < 8; ++pair) {
      const float* table = codes.tables + (block * kBlock + pair / 4 * 8 + pair % 4) * 16;
      __m256i other[4];
      split_table(table, planes[pair]);
      split_table(table + 4 * 16, other);
      for (int i = 0; i < 4; ++i) {
        planes[pair][i] = _mm256_blend_epi32(planes[pair][i], other[i], 0xf0);
      }
    }
  }

  void begin(const char* codes, int phase, Found& found) const {
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair) {
      const Halves halves = look_up(planes[pair], codes_of_phase(codes + 32 * pair, phase));
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        found.fours[2 * i][pair] = _mm256_unpacklo_epi16(halves.lower[i], halves.upper[i]);
        found.fours[2 * i + 1][pair] = _mm256_unpackhi_epi16(halves.lower[i], halves.upper[i]);
      }
    }
  }

  template <typename Use>
  void take(const Found& found, int phase, int part, Use use) const {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vf inputs[2][2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const __m256i* four = found.fours[part] + 4 * v;
        const __m256i a = half == 0 ? _mm256_unpacklo_epi32(four[0], four[1])
                                    : _mm256_unpackhi_epi32(four[0], four[1]);
        const __m256i b = half == 0 ? _mm256_unpacklo_epi32(four[2], four[3])
                                    : _mm256_unpackhi_epi32(four[2], four[3]);
        inputs[0][v] = (vf)_mm256_unpacklo_epi64(a, b);
        inputs[1][v] = (vf)_mm256_unpackhi_epi64(a, b);
      }
      use(16 * phase + 4 * part + 2 * half, inputs[0]);
      use(16 * phase + 4 * part + 2 * half + 1, inputs[1]);
    }
  }
};

#elif defined(__AVX512F__)

struct OneTableCodes {
  static constexpr int kStep = 4;
  static constexpr int kBytes = 32;
  static constexpr float kScale = 1.0f;
  static constexpr int kPhases = 1, kParts = 1;
  struct Found {
    __m512i bytes[2];
  };
  __m512 table;

  OneTableCodes(const Codes& codes, int64_t) : table(_mm512_loadu_ps(codes.tables)) {}

  // Each output's byte comes to the bottom of its lane; of an index, the lookup takes four bits.
  void begin(const char* codes, int, Found& found) const {
    const __m512i place = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 1, 1, 1, 1, 5, 5, 5, 5);
    const __m512i shift = _mm512_setr_epi32(0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24);
    const __m512i bytes = _mm512_castsi256_si512(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i from = _mm512_add_epi32(place, _mm512_set1_epi32(2 * i));
      found.bytes[i] = _mm512_srlv_epi32(_mm512_permutexvar_epi32(from, bytes), shift);
    }
  }

  template <typename Use>
  void take(const Found& found, int, int, Use use) const {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512i codes_of_k = k < 2 ? found.bytes[k] : _mm512_srli_epi32(found.bytes[k - 2], 4);
      const vf values[1] = {(vf)_mm512_permutexvar_ps(codes_of_k, table)};
      use(k, values);
    }
  }
};

struct ManyTablesCodes {
  static constexpr int kStep = 32;
  static constexpr int kBytes = 256;
  static constexpr float kScale = 1.0f;
  static constexpr int kPhases = 2, kParts = 1;
  struct Found {
    vf inputs[16];
  };
  const float* tables;

  ManyTablesCodes(const Codes& codes, int64_t block) : tables(codes.tables + block * kBlock * 16) {}

  void begin(const char* codes, int phase, Found& found) const {
#pragma GCC unroll 16
    for (int o = 0; o < 16; ++o) {
      const char* own = codes + place_among_outputs(o) * 16;
      const __m512i bytes =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(own)));
      found.inputs[o] = (vf)_mm512_permutexvar_ps(
          phase == 0 ? bytes : _mm512_srli_epi32(bytes, 4), _mm512_loadu_ps(tables + o * 16));
    }
    transpose(found.inputs);
  }

  template <typename Use>
  void take(const Found& found, int phase, int, Use use) const {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
      const vf values[1] = {found.inputs[k]};
      use(16 * phase + k, values);
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
  static constexpr int kPhases = 2, kParts = 1;
  struct Found {
    Fours even, odd;
  };
  uint8x16x4_t planes;

  OneTableCodes(const Codes& codes, int64_t) : planes(split_table(codes.tables)) {}

  void begin(const char* codes, int phase, Found& found) const {
    found = {look_up(planes, codes_of_phase(codes, phase)),
             look_up(planes, codes_of_phase(codes + 16, phase))};
  }

  template <typename Use>
  void take(const Found& found, int phase, int, Use use) const {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const vf values[4] = {found.even.four[2 * i], found.odd.four[2 * i],
                            found.even.four[2 * i + 1], found.odd.four[2 * i + 1]};
      use(2 * phase + i, values);
    }
  }
};

using ManyTablesCodes = PlainTableCodes<32>;

#else

using OneTableCodes = PlainTableCodes<4>;
using ManyTablesCodes = PlainTableCodes<32>;

#endif

}  // namespace QUIRE_ISA
}  // namespace quire
