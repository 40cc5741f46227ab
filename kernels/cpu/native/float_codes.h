// Products with weights in codes that stand for floats: e4m3.
//
// A weight is its code's value times its scale, rounded to float32; products with these, and the
// order in which they are added up, are those of float32 weights in gemm.h. So a row has the same
// bits as with the dequantized weight in float32, alone and in company. CPUs with tiles have an order
// of their own: see float8_tiles.h.
#pragma once
#include <type_traits>

#include "codes.h"
#include "float_values.h"
#include "gemm.h"
#include "int_codes.h"

namespace quire {
namespace QUIRE_ISA {

// Four inputs of 16 outputs, a byte each. e4m3 is float32 with fewer digits, but for the bias of its
// exponent: moved to their places, its bits make a number 2^-120 as large, of subnormal codes a
// subnormal one. CPUs are slow with these: a weight with `Subnormals` in numbers has its codes made
// numbers in a way that takes twice as long, but the same time whatever they are.
//
// A decoder takes `kStep` inputs at a time: `decode` calls `use` with the number of each, in order, and
// what 16 outputs have for it, scales left out. Scales are to be multiplied with `kScale` before.
template <bool Subnormals>
struct Float8Codes {
  static constexpr int kStep = 4;  // inputs that are decoded together
  static constexpr int kBytes = 64;
  static constexpr float kScale = Subnormals ? 1.0f : kFloat8Bias;

  Float8Codes(const Codes&, int64_t) {}

  static vf value(vu moved) {
    if constexpr (!Subnormals) return (vf)(moved & 0x87f00000u);
    // With the exponent's bias put right, one of 0 would have a leading digit, as others do: 2^-7,
    // where it should have none, and twice the other digits.
    const vu size = moved & 0x07f00000u;
    const vf number = (vf)(size + (120u << 23));
    const vf small = number + number - 0x1p-6f;
    const vu bits = (vu)(size < (1u << 23) ? small : number);
    return (vf)(bits | (moved & 0x80000000u));
  }

  template <typename Use>
  void decode(const char* codes, Use use) const {
    vu quads[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) quads[v] = load_as<vu>(codes + v * kLanes * 4);
#pragma GCC unroll 4
    for (int k = 0; k < kStep; ++k) {
      vf values[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        values[v] = value((vu)((vi)(quads[v] << (24 - 8 * k)) >> 4));
      }
      use(k, values);
    }
  }
};

// Where the codes of some columns lie that have their scales in common.
struct Stretch {
  const char* codes;
  const float* scales;
};

// How a weight's blocks are gone over.
struct Stretches {
  CodesLayout layout;
  int64_t depth;
  int64_t length;  // of a stretch, in columns

  explicit Stretches(const Matrix& weight)
      : layout(layout_of(*weight.codes, weight.in, weight.dtype)),
        depth(weight.in),
        length(weight.codes->scales_units ? weight.codes->unit : weight.in) {}

  int64_t count() const { return (depth + length - 1) / length; }
  int64_t columns(int64_t s) const { return std::min(length, depth - s * length); }
  Stretch at(const char* block, int64_t s) const {
    const char* first = block + s * layout.unit_bytes;
    return {first + layout.head + layout.front, reinterpret_cast<const float*>(first)};
  }
};

// out[b][r][0:16] = sum over k of x[r][k] * block[b][k][0:16].
template <typename Decoder, int Rows, int Blocks>
inline void sum_codes(const Stretches& all_of, const Decoder* const (&decoders)[Blocks],
                      const char* const (&blocks)[Blocks], const float* x, int64_t ldx,
                      float* const (&out)[Blocks]) {
  vf acc[Blocks][Rows][kVectors];
#pragma GCC unroll 2
  for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[b][r][v] = all(0.0f);
    }
  }
  const int64_t count = all_of.count();
  for (int64_t s = 0; s < count; ++s) {
    const char* codes[Blocks];
    float scales[Blocks][kBlock];
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
      const Stretch stretch = all_of.at(blocks[b], s);
      codes[b] = stretch.codes;
#pragma GCC unroll 4
      for (int v = 0; v < kBlock; v += kLanes) {
        store(scales[b] + v, load(stretch.scales + v) * Decoder::kScale);
      }
    }
    auto add = [&](int b, const float* inputs, const vf(&values)[kVectors]) {
      vf weights[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weights[v] = values[v] * load(scales[b] + v * kLanes);
      add_products<Rows>(inputs, ldx, weights, acc[b]);
    };
    const int64_t columns = all_of.columns(s);
    const float* inputs = x + s * all_of.length;
    int64_t k = 0;
    for (; k + Decoder::kStep <= columns; k += Decoder::kStep) {
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) {
        decoders[b]->decode(codes[b], [&](int i, const vf(&values)[kVectors]) {
          add(b, inputs + k + i, values);
        });
        // Scales are loaded again: to keep them would take registers that sums are in.
        asm volatile("" ::: "memory");
      }
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 8
        for (int line = 0; line < Decoder::kBytes; line += 64) {
          __builtin_prefetch(codes[b] + kCodesAhead + line);
        }
        codes[b] += Decoder::kBytes;
      }
    }
    if (k == columns) continue;
    for (int b = 0; b < Blocks; ++b) {
      decoders[b]->decode(codes[b], [&](int i, const vf(&values)[kVectors]) {
        if (k + i < columns) add(b, inputs + k + i, values);
      });
    }
  }
#pragma GCC unroll 2
  for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(out[b] + r * kBlock + v * kLanes, acc[b][r][v]);
    }
  }
}

// A block's weights, [in][16].
template <typename Decoder>
inline const float* dequantize_block(const Stretches& all_of, const Decoder& decoder,
                                     const char* block, float* out) {
  const int64_t count = all_of.count();
  for (int64_t s = 0; s < count; ++s) {
    const Stretch stretch = all_of.at(block, s);
    const int64_t columns = all_of.columns(s);
    vf scales[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      scales[v] = load(stretch.scales + v * kLanes) * Decoder::kScale;
    }
    const char* codes = stretch.codes;
    float* to = out + s * all_of.length * kBlock;
    auto put = [&](int64_t k, const vf(&values)[kVectors]) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        store(to + k * kBlock + v * kLanes, values[v] * scales[v]);
      }
    };
    int64_t k = 0;
    for (; k + Decoder::kStep <= columns; k += Decoder::kStep, codes += Decoder::kBytes) {
      decoder.decode(codes, [&](int i, const vf(&values)[kVectors]) { put(k + i, values); });
    }
    if (k == columns) continue;
    decoder.decode(codes, [&](int i, const vf(&values)[kVectors]) {
      if (k + i < columns) put(k + i, values);
    });
  }
  return out;
}

template <typename Decoder, int Rows = kFewRows>
inline void sum_few(int64_t rows, const Stretches& all_of, const Decoder* const (&decoders)[2],
                    const char* const (&blocks)[2], const float* x, int64_t ldx,
                    float* const (&out)[2]) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      sum_few<Decoder, Rows - 1>(rows, all_of, decoders, blocks, x, ldx, out);
      return;
    }
  }
  if (blocks[1] != nullptr) {
    sum_codes<Decoder, Rows, 2>(all_of, decoders, blocks, x, ldx, out);
  } else {
    sum_codes<Decoder, Rows, 1>(all_of, {decoders[0]}, {blocks[0]}, x, ldx, {out[0]});
  }
}

// Call `with` with a null pointer to the type that decodes a weight.
template <typename With>
inline void with_decoder(const Matrix& weight, With with) {
  if (weight.codes->has_subnormals) {
    with(static_cast<const Float8Codes<true>*>(nullptr));
  } else {
    with(static_cast<const Float8Codes<false>*>(nullptr));
  }
}

inline const float* dequantize_block(const Matrix& weight, int64_t b, float* out) {
  with_decoder(weight, [&](auto* kind) {
    using Decoder = std::remove_cvref_t<decltype(*kind)>;
    dequantize_block(Stretches(weight), Decoder(*weight.codes, b), codes_block(weight, b), out);
  });
  return out;
}

// Whether blocks of both are decoded and gone over alike.
inline bool are_alike(const Matrix& a, const Matrix& b) {
  return a.dtype == b.dtype && a.codes->unit == b.codes->unit &&
         a.codes->scales_units == b.codes->scales_units &&
         a.codes->has_subnormals == b.codes->has_subnormals;
}

// The product of a few rows with block `b`, and with its factor or else with the block after it, if
// that is before `end`. Returns which block comes next.
template <typename Decoder>
inline int64_t multiply_few(const Product& p, int64_t b, int64_t end) {
  const bool is_gated = p.factor != nullptr, are_two = is_gated || b + 1 < end;
  const Matrix& other = is_gated ? *p.factor : *p.weight;
  const int64_t b_other = is_gated || !are_two ? b : b + 1;
  const int64_t first = b * kBlock, second = b_other * kBlock;
  float values[kFewRows * kBlock], others[kFewRows * kBlock];
  prefetch_gains(p, first);
  if (!is_gated && are_two) prefetch_gains(p, second);
  const Decoder decoder(*p.weight->codes, b), other_decoder(*other.codes, b_other);
  const char* const blocks[2] = {codes_block(*p.weight, b),
                                 are_two ? codes_block(other, b_other) : nullptr};
  sum_few<Decoder>(p.rows, Stretches(*p.weight), {&decoder, &other_decoder}, blocks, p.x, p.ldx,
                   {values, others});
  add_outliers(*p.weight, first, p.x, p.ldx, p.rows, values);
  adapt(p, false, first, 0, p.rows, values, kBlock);
  if (are_two) {
    add_outliers(other, second, p.x, p.ldx, p.rows, others);
    adapt(p, is_gated, second, 0, p.rows, others, kBlock);
  }
  for (int64_t r = 0; r < p.rows; ++r) {
    float* y = p.y + r * p.ldy + first;
    finish_row(p, values + r * kBlock, others + r * kBlock, first, y);
    if (!is_gated && are_two) finish_row(p, others + r * kBlock, nullptr, second, y + kBlock);
  }
  return is_gated || !are_two ? b + 1 : b + 2;
}

// Inputs of a row as some columns of a weight want them.
inline void arrange_columns(const Codes& codes, const float* x, int64_t begin, int64_t end,
                            float* out) {
  for (int64_t k = begin; k < end; ++k) {
    const float input = codes.order == nullptr ? x[k] : x[codes.order[k]];
    out[k] = codes.factors == nullptr ? input : input * codes.factors[k];
  }
}

// Inputs as the columns of a weight want them: `p.x`, or where they are copied to in `rows`.
inline const float* arrange_inputs(Thread& thread, const Product& p, float* rows) {
  const Codes& codes = *p.weight->codes;
  if (codes.order == nullptr && codes.factors == nullptr) return p.x;
  const int64_t depth = p.weight->in;
  thread.share(p.rows, [&](int64_t r) {
    arrange_columns(codes, p.x + r * p.ldx, 0, depth, rows + r * depth);
  });
  return rows;
}

// With so many blocks, a thread takes twice as many at a time: codes are short to read.
constexpr int64_t kManyBlocks = 256;

// A product with a weight whose codes stand for floats. Of a gated one, the factor has such codes,
// too, and takes its inputs in the weight's order, times the same factors.
inline void multiply_float_codes(Thread& thread, const Product& product, uint16_t* halves) {
  if (product.rows == 0) return;
  Product p = product;
  p.x = arrange_inputs(thread, product, reinterpret_cast<float*>(halves));
  if (p.x != product.x) p.ldx = p.weight->in;
  const bool is_alike = p.factor == nullptr || are_alike(*p.weight, *p.factor);
  const bool is_few = p.rows <= kFewRows && is_alike;
  const int64_t num_blocks = (p.weight->out + kBlock - 1) / kBlock;
  const int64_t at_once = kBlocksAtOnce * (is_few && num_blocks >= kManyBlocks ? 2 : 1);
  const int64_t num_items = (num_blocks + at_once - 1) / at_once;
  thread.share(num_items, [&](int64_t item) {
    const int64_t end = std::min(num_blocks, (item + 1) * at_once);
    int64_t b = item * at_once;
    while (b < end) {
      if (is_few) {
        with_decoder(*p.weight, [&](auto* kind) {
          b = multiply_few<std::remove_cvref_t<decltype(*kind)>>(p, b, end);
        });
        continue;
      }
      float* wide = thread.scratch();
      float* wide_other = wide + p.weight->in * kBlock;
      multiply_block(p, dequantize_block(*p.weight, b, wide),
                     p.factor == nullptr ? nullptr : dequantize_block(*p.factor, b, wide_other),
                     b * kBlock);
      ++b;
    }
  });
}

}  // namespace QUIRE_ISA
}  // namespace quire
