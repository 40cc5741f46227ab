// The functions of one instruction set, gathered.
#pragma once
#include "forward.h"
#include "isa.h"
#include "sampling.h"

namespace quire {
namespace QUIRE_ISA {

constexpr Functions kFunctions{forward, logits, likeliest, argmax, draw, top, log_probabilities};

}  // namespace QUIRE_ISA
}  // namespace quire
