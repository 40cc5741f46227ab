// Checks the CPU kernels of every instruction set that this CPU has against double precision.
//
//   check [--quick] [name of an instruction set]...
//
// It needs nothing but a C++ library, so it runs on emulated CPUs, too. The same numbers are drawn
// on each run. It prints a line per instruction set, and exits with 1 if anything is wrong.
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "cases.h"

namespace check {

void Findings::fail(const std::string& what) {
  constexpr int kMostPrinted = 10;
  if (++num_failures_ <= kMostPrinted) std::printf("%s: %s\n", isa_.c_str(), what.c_str());
}

Context::Context() : context_(quire_context_new()) {
  if (context_ == nullptr) must(-1);
}

void must(int status) {
  if (status == 0) return;
  std::fprintf(stderr, "the library returned %d\n", status);
  std::exit(2);
}

bool same_bits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, count * sizeof(float)) == 0;
}

// Instructions that multiply bfloat16 round what the weights and the cache meet.
static Rounding rounding_of(const std::string& isa) {
  if (isa.starts_with("amx")) return {kBfloat16Unit, kBfloat16Unit};
  if (isa.starts_with("avx512bf16")) return {kBfloat16Unit, 0};
  return {};
}

static bool check_isa(const std::string& isa, bool is_quick) {
  if (quire_choose_isa(isa.c_str()) != 0) {
    std::printf("%s: unknown, or not there on this CPU\n", isa.c_str());
    return false;
  }
  const Rounding rounding = rounding_of(isa);
  Findings found(isa);
  Random random(20240229);
  check_products(random, is_quick ? 60 : 300, rounding, found);
  check_adapters(random, is_quick ? 60 : 300, rounding, found);
  check_activations(found);
  check_sampling(random, is_quick ? 30 : 200, found);
  check_ranks(is_quick ? 5 : 20, found);
  check_models(random, is_quick ? 12 : 40, rounding, found);
  std::printf(
      "%s: %d products, worst error %.3f of the bound; %d activations, %.3f; %d models of %d tokens, "
      "%.4f; %d rows of logits; %d times the same bits alone and in company: %s\n",
      isa.c_str(), found.num_products, found.products.part(), found.num_activations,
      found.activations.part(), found.num_models, found.num_tokens, found.models.part(),
      found.num_rows, found.num_same, found.failed() ? "FAILED" : "ok");
  std::fflush(stdout);
  return !found.failed();
}

}  // namespace check

int main(int argc, char** argv) {
  bool is_quick = false;
  std::vector<std::string> isas;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      is_quick = true;
    } else if (argument.starts_with("-")) {
      std::fprintf(stderr, "usage: %s [--quick] [%s]...\n", argv[0], quire_isas());
      return 2;
    } else {
      isas.push_back(argument);
    }
  }
  if (isas.empty()) {
    std::istringstream all(quire_isas());
    for (std::string isa; all >> isa;) isas.push_back(isa);
  }
  bool is_right = true;
  for (const std::string& isa : isas) is_right &= check::check_isa(isa, is_quick);
  return is_right ? 0 : 1;
}
