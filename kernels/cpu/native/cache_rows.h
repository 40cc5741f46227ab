// How a key or a value of one head lies in the KV cache: as numbers, or as codes of one byte, each
// row with a float scale of its own behind it. A code stands for code * scale.
//
// Codes are those of quire/kernels/reference/cache.py, bit by bit: the scale is the largest size in
// a row over the largest code, and a code is what is nearest to x / scale, of two the even one.
#pragma once
#include <type_traits>

#include "abi.h"
#include "simd.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace quire {
namespace QUIRE_ISA {

// e4m3: a sign, four bits of an exponent, three of a fraction.
struct Float8 {
  uint8_t bits;
};

template <typename T>
constexpr bool kIsCode = sizeof(T) == 1;

// Elements that a row takes.
template <typename T>
inline int64_t row_size(int64_t dim) {
  return kIsCode<T> ? dim + static_cast<int64_t>(sizeof(float)) : dim;
}

template <typename T>
inline float row_scale(const T* row, int64_t dim) {
  float scale = 1.0f;
  if constexpr (kIsCode<T>) std::memcpy(&scale, row + dim, sizeof scale);
  return scale;
}

typedef int8_t vb __attribute__((vector_size(kLanes)));

// Bytes as signed integers. Where a vector of them is no register's, compilers would take them one
// by one.
inline vi widen_bytes(const void* bytes) {
#if defined(QUIRE_WIDE)
  return __builtin_convertvector(load_as<vb>(static_cast<const int8_t*>(bytes)), vi);
#elif defined(__AVX512F__)
  // By a mask of all lanes: GCC 12 warns of what its header leaves undefined for want of one.
  return (vi)_mm512_maskz_cvtepi8_epi32(0xffff,
                                        _mm_loadu_si128(static_cast<const __m128i*>(bytes)));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(bytes)));
#else
  int32_t four;
  std::memcpy(&four, bytes, sizeof four);
#if defined(__SSE2__)
  const __m128i v = _mm_cvtsi32_si128(four);
  const __m128i pairs = _mm_unpacklo_epi8(v, v);
  return (vi)_mm_srai_epi32(_mm_unpacklo_epi16(pairs, pairs), 24);
#elif defined(__aarch64__)
  return (vi)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
#else
  return __builtin_convertvector(load_as<vb>(static_cast<const int8_t*>(bytes)), vi);
#endif
#endif
}

constexpr float kLeastNormal8 = 0x1p-6f;  // of e4m3
constexpr int32_t kMoreExponent8 = 120 << 23;  // the exponent of a float exceeds that of e4m3 by it

inline vf widen_codes(const int8_t* codes) {
  return __builtin_convertvector(widen_bytes(codes), vf);
}

inline vf widen_codes(const Float8* codes) {
  const vi bits = widen_bytes(codes);
  const vi sized = (bits & 0x7f) << 20;
  // Below the normal numbers the fraction has no leading one: it is made with one, which is taken
  // off again. A float that small would be computed with at a crawl.
  const vi is_small = sized < (1 << 23);
  const vf size = (vf)(sized + kMoreExponent8 + (is_small & (1 << 23)));
  const vf value = size - (vf)(is_small & (vi)all(kLeastNormal8));
  return (vf)((vi)value | (bits & 0x80) << 24);
}

// A row's numbers from `d` on.
template <typename T>
inline vf load_part(const T* row, int64_t d, float scale) {
  if constexpr (kIsCode<T>) {
    return widen_codes(row + d) * scale;
  } else {
    return load_row(row + d);
  }
}

template <typename T>
inline float load_element(const T* row, int64_t d, float scale) {
  if constexpr (kIsCode<T>) {
    T codes[kLanes] = {row[d]};
    return widen_codes(codes)[0] * scale;
  } else {
    return load_one(row + d);
  }
}

// Adding it to a number below 2^22 in size rounds that to an integer.
constexpr float kRoundsToInteger = 12582912.0f;  // 1.5 * 2^23

inline void store_codes(int8_t* out, vf steps) {
  const vi whole = (vi)(steps + kRoundsToInteger);  // which ends in the integer's own bits
  const vb codes = __builtin_convertvector(whole, vb);
  std::memcpy(out, &codes, sizeof codes);
}

inline void store_codes(Float8* out, vf steps) {
  const vi bits = (vi)steps;
  const vi size = bits & 0x7fffffff;
  const vi rounded = size + 0x7ffff + ((size >> 20) & 1);
  const vi normal = (rounded - kMoreExponent8) >> 20;
  // 2^14 has steps of 2^-9, as the smallest numbers of e4m3 have.
  const vi small = (vi)((vf)size + 0x1p14f) & 15;
  const vi is_small = size < (vi)all(kLeastNormal8);
  const vi code = (is_small & small) | (~is_small & normal) | ((bits >> 24) & 0x80);
  const vb codes = __builtin_convertvector(code, vb);
  std::memcpy(out, &codes, sizeof codes);
}

constexpr float largest_code(const int8_t*) { return 127.0f; }
constexpr float largest_code(const Float8*) { return 448.0f; }

// The largest size among `size` numbers, which is no number if one of them is none: as integers,
// sizes are ordered as they are as floats, and beyond infinity comes what is no number.
inline float largest_size(const float* x, int64_t size) {
  vi most = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const vi bits = load_as<vi>(x + i) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t largest = 0;
  for (int l = 0; l < kLanes; ++l) largest = most[l] > largest ? most[l] : largest;
  for (; i < size; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float result;
  std::memcpy(&result, &largest, sizeof result);
  return result;
}

// Write one head's key or value. Without a scale that is a positive number all codes are zero.
template <typename T>
inline void write_head(const float* x, int64_t dim, T* out) {
  if constexpr (!kIsCode<T>) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store_row(out + d, load(x + d));
    for (; d < dim; ++d) store_one(out + d, x[d]);
  } else {
    const float largest = largest_code(static_cast<const T*>(nullptr));
    const float scale = largest_size(x, dim) / largest;
    std::memcpy(out + dim, &scale, sizeof scale);
    if (!(scale > 0.0f && scale <= std::numeric_limits<float>::max())) {
      std::memset(out, 0, dim);
      return;
    }
    const vf high = all(largest), low = all(-largest);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      store_codes(out + d, min(max(load(x + d) / scale, low), high));
    }
    if (d == dim) return;
    float rest[kLanes] = {};
    std::memcpy(rest, x + d, (dim - d) * sizeof(float));
    T codes[kLanes];
    store_codes(codes, min(max(load(rest) / scale, low), high));
    std::memcpy(out + d, codes, dim - d);
  }
}

// Call `with` with null of the type that a cache's elements have.
template <typename With>
inline void with_cache_type(int32_t dtype, With with) {
  switch (dtype) {
    case kBFloat16: return with(static_cast<uint16_t*>(nullptr));
    case kInt8: return with(static_cast<int8_t*>(nullptr));
    case kFloat8: return with(static_cast<Float8*>(nullptr));
    default: return with(static_cast<float*>(nullptr));
  }
}

}  // namespace QUIRE_ISA
}  // namespace quire
