// The same computations in double precision, written as they are defined, with estimates of how far
// off float32 is.
#pragma once
#include "model.h"

namespace check {

using Row = std::vector<Estimate>;

// Where an instruction set rounds to bfloat16: how far off that makes a term, relatively, at most.
struct Rounding {
  double products = 0;   // activations, where the weight is bfloat16
  double attention = 0;  // queries and attention weights, where the cache is not float32

  double of_product(int32_t dtype) const { return dtype == kBFloat16 ? products : 0.0; }
  double of_attention(int32_t dtype) const { return dtype == kFloat32 ? 0.0 : attention; }
};

Estimate activate(Estimate x, int32_t kind);

// What the product of a row with a weight is, and the bias.
Row multiply(const Row& x, const Weight& weight, const Rounding& rounding);

// Hidden states of one whole sequence.
std::vector<Row> forward(const TinyModel& model, const std::vector<int64_t>& ids,
                         const Rounding& rounding);

// Logits of a hidden state.
Row logits(const TinyModel& model, const float* hidden, const Rounding& rounding);

}  // namespace check
