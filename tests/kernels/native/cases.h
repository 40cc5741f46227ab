// What is checked, of the instruction set in use.
#pragma once
#include <string>

#include "reference.h"

namespace check {

// What was found so far; failures are printed where they are found.
class Findings {
 public:
  explicit Findings(std::string isa) : isa_(std::move(isa)) {}

  void fail(const std::string& what);
  bool failed() const { return num_failures_ > 0; }

  int num_products = 0, num_models = 0, num_tokens = 0, num_activations = 0, num_same = 0,
      num_rows = 0;
  Worst products, models, activations;

 private:
  std::string isa_;
  int num_failures_ = 0;
};

// A context of the library, freed at its end.
class Context {
 public:
  Context();
  ~Context() { quire_context_free(context_); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  void* get() const { return context_; }

 private:
  void* const context_;
};

// End the program when the library could not do its work.
void must(int status);

bool same_bits(const float* a, const float* b, int64_t count);

void check_products(Random& random, int count, const Rounding& rounding, Findings& found);
void check_adapters(Random& random, int count, const Rounding& rounding, Findings& found);
void check_activations(Findings& found);
void check_sampling(Random& random, int count, Findings& found);
void check_ranks(int count, Findings& found);
void check_models(Random& random, int count, const Rounding& rounding, Findings& found);

}  // namespace check
