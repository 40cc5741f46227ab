// Vectors of the widest kind that this translation unit is compiled for.
// All of it lies in a namespace of the instruction set: it is compiled once for each.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace quire {
namespace QUIRE_ISA {

// QUIRE_WIDE tries the code of 16 lanes on a CPU that has fewer.
#if defined(__AVX512F__) || defined(QUIRE_WIDE)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

template <typename V, typename T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline vf load(const float* p) { return load_as<vf>(p); }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

inline vf all(float x) {
  vf v;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) v[i] = x;
  return v;
}

// Of two of which one is no number, the second.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(QUIRE_WIDE)
inline vf max(vf a, vf b) { return __builtin_ia32_maxps256(a, b); }
inline vf min(vf a, vf b) { return __builtin_ia32_minps256(a, b); }
#else
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }
#endif

// Sums and maxima over lanes are made in a fixed order: pairs that lie half a vector apart.
inline float sum(vf v) {
  float t[kLanes];
  store(t, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) t[i] += t[i + half];
  }
  return t[0];
}

inline float largest(vf v) {
  float t[kLanes];
  store(t, v);
  float most = t[0];
  for (int i = 1; i < kLanes; ++i) most = t[i] > most ? t[i] : most;
  return most;
}

// bfloat16 is the upper half of a float32.
inline float widen(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
#if defined(__aarch64__) && !defined(QUIRE_WIDE)
// One instruction each; the compiler would go over the numbers one by one.
inline vf widen(vh h) { return (vf)vshll_n_u16((uint16x4_t)h, 16); }
inline vh upper_halves(vu u) { return (vh)vshrn_n_u32((uint32x4_t)u, 16); }
#else
inline vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
inline vh upper_halves(vu u) { return __builtin_convertvector(u >> 16, vh); }
#endif
inline vf widen_low(vu pairs) { return (vf)(pairs << 16); }
inline vf widen_high(vu pairs) { return (vf)(pairs & 0xffff0000u); }

inline vu rounded_bits(vf x) {
  const vu u = (vu)x;
  const vu rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const vu quiet = u | 0x400000u;
  const vu is_number = (vu)(x == x);
  return (is_number & rounded) | (~is_number & quiet);
}
inline vh narrow(vf x) { return upper_halves(rounded_bits(x)); }
inline uint16_t narrow(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return static_cast<uint16_t>((u | 0x400000u) >> 16);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline vf load_row(const float* p) { return load(p); }
inline vf load_row(const uint16_t* p) { return widen(load_as<vh>(p)); }
inline float load_one(const float* p) { return *p; }
inline float load_one(const uint16_t* p) { return widen(*p); }
inline void store_row(float* p, vf v) { store(p, v); }
inline void store_row(uint16_t* p, vf v) {
  const vh h = narrow(v);
  std::memcpy(p, &h, sizeof h);
}
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(uint16_t* p, float x) { *p = narrow(x); }

// e^x to about one unit in the last place; 0 below the smallest normal number, so for -inf.
inline vf exp(vf x) {
  const vf least = all(-87.33654f), most = all(88.72283f);
  const vf y = min(max(x, least), most);
  const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = y * 1.44269504f + magic - magic;
  vf r = y - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Two factors: 2^128 itself is no float.
  const vi whole = __builtin_convertvector(n, vi);
  const vi half = whole >> 1;
  p = p * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);
  const vf inf = all(std::numeric_limits<float>::infinity());
  p = x < least ? all(0.0f) : p;
  p = x > most ? inf : p;
  return x == x ? p : x;
}

// tanh from e^-2|x|, and by its series where that would cancel.
inline vf tanh(vf x) {
  const vf size = x < 0.0f ? -x : x;
  const vf e = exp(size * -2.0f);
  const vf far = (1.0f - e) / (1.0f + e);
  const vf s = x * x;
  vf p = all(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s + -5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s + -3.33332819422e-1f;
  const vf near = x + x * s * p;
  const vf signed_far = x < 0.0f ? -far : far;
  return size < 0.625f ? near : signed_far;
}

}  // namespace QUIRE_ISA
}  // namespace quire
