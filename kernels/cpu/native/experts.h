// Which tokens are computed by which experts of a mixture, and memory for it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "abi.h"
#include "plan.h"

namespace quire {

// Of one layer at a time. A pair is a token and one of its experts; pairs lie expert by expert, those
// of one expert in the order of their tokens.
struct MixtureRows {
  float* scores;     // [num_tokens][rows of the router]
  float* weights;    // [num_tokens][per_token]: what each expert counts
  int32_t* chosen;   // [num_tokens][per_token]: experts, ascending
  int32_t* places;   // [num_tokens][per_token]: where the pair lies
  int32_t* tokens;   // [pairs]
  int32_t* first;    // [layers][most experts + 1]: the first pair of each
  float* pairs;      // [pairs][hidden_size]: inputs, then what experts make of them
  float* inner;      // [num_tokens][width]
  int64_t stride;    // of `first`

  // Threads find out by it which loops there are. One that has fallen behind still has to when the
  // others are layers ahead: so each layer has its own.
  int32_t* first_of(int64_t layer) const { return first + layer * stride; }
};

// Call `with` with every mixture of a model.
template <typename With>
void each_mixture(const Model& model, With with) {
  for (int32_t i = 0; i < model.num_layers; ++i) {
    if (model.layers[i].mixture != nullptr) with(*model.layers[i].mixture);
  }
}

// Whether an expert is on this rank.
inline bool is_held(const Mixture& m, int32_t number) {
  return number >= m.first_held && number < m.first_held + m.num_held;
}

// Fill in what steps want to know of all matrices of a mixture.
void measure(Mixture& mixture);

// Divide memory among what steps of so many tokens need, and reserve it; null where there is no
// mixture.
const MixtureRows* reserve_rows(const Model& model, int64_t num_tokens, Memory& memory,
                                MixtureRows& rows);

// Loops that the mixtures of a model take at most.
size_t mixture_loops(const Model& model, int64_t num_tokens);

// From a token's scores to its experts, ascending, and what each of them counts.
void choose_experts(const Mixture& mixture, const float* scores, float* weights, int32_t* chosen);

// Bring all pairs into order.
void order_pairs(const Mixture& mixture, int64_t layer, int64_t num_tokens, const MixtureRows& rows);

}  // namespace quire
