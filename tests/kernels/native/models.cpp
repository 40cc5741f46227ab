// Whole steps: what a sequence becomes alone, and that company changes nothing.
#include <numeric>

#include "cases.h"
#include "ranks.h"

namespace check {
namespace {

// How many standard deviations an error may have: some roundings have a common cause.
constexpr double kDeviations = 8;

// Sequences on their way through a model, with a paged cache whose blocks lie anywhere.
class Runner {
 public:
  Runner(TinyModel& model, const std::vector<std::vector<int64_t>>& prompts, Random& random,
         int block_size, int num_threads)
      : model_(model), prompts_(prompts), block_size_(block_size), num_threads_(num_threads) {
    int64_t longest = 0;
    for (const auto& prompt : prompts) longest = std::max<int64_t>(longest, prompt.size());
    stride_ = (longest + block_size - 1) / block_size;
    std::vector<int32_t> blocks(prompts.size() * stride_);
    std::iota(blocks.begin(), blocks.end(), 1);  // block 0 stays zero
    random.shuffle(blocks);
    tables_ = blocks;
    const Shape& s = model.shape;
    const size_t size = (blocks.size() + 1) * block_size * s.num_kv_heads * s.head_dim;
    for (Layer& layer : model.table) {
      for (void** cache : {&layer.key_cache, &layer.value_cache}) {
        *cache = caches_.emplace_back(size, 0.0f).data();
      }
    }
    computed_.resize(prompts.size());
    for (const auto& prompt : prompts) {
      hidden_.emplace_back(prompt.size() * s.hidden, NAN);
    }
  }

  int64_t left(size_t sequence) const { return prompts_[sequence].size() - computed_[sequence]; }

  // Compute so many more tokens of each sequence; of those of which it is none, nothing.
  void step(const std::vector<int64_t>& counts) {
    const int64_t size = model_.shape.hidden;
    std::vector<int64_t> ids, positions, slots;
    std::vector<int32_t> starts{0}, lengths, tables;
    for (size_t i = 0; i < counts.size(); ++i) {
      if (counts[i] == 0) continue;
      const int32_t* table = &tables_[i * stride_];
      for (int64_t p = computed_[i]; p < computed_[i] + counts[i]; ++p) {
        ids.push_back(prompts_[i][p]);
        positions.push_back(p);
        slots.push_back(int64_t{table[p / block_size_]} * block_size_ + p % block_size_);
      }
      starts.push_back(static_cast<int32_t>(ids.size()));
      lengths.push_back(static_cast<int32_t>(computed_[i] + counts[i]));
      tables.insert(tables.end(), table, table + stride_);
    }
    std::vector<float> hidden(ids.size() * size, NAN);
    const Batch batch{ids.data(),     positions.data(), slots.data(),
                      starts.data(),  lengths.data(),   tables.data(),
                      stride_,        block_size_,      static_cast<int32_t>(lengths.size()),
                      static_cast<int64_t>(ids.size()), hidden.data(),  nullptr,
                      nullptr};
    must(quire_forward(context_.get(), &model_.model, &batch, num_threads_));
    const float* next = hidden.data();
    for (size_t i = 0; i < counts.size(); ++i) {
      std::copy_n(next, counts[i] * size, &hidden_[i][computed_[i] * size]);
      next += counts[i] * size;
      computed_[i] += counts[i];
    }
  }

  // All in steps of random sizes: some sequences begin while others are decoded.
  const std::vector<std::vector<float>>& run(Random& random, int64_t most) {
    for (;;) {
      std::vector<int64_t> counts;
      int64_t all_left = 0;
      for (size_t i = 0; i < prompts_.size(); ++i) {
        const int64_t wanted = random.one_in(3)   ? 0
                               : random.one_in(2) ? 1
                                                  : random.between(1, most);
        counts.push_back(std::min(wanted, left(i)));
        all_left += left(i);
      }
      if (all_left == 0) return hidden_;
      if (std::accumulate(counts.begin(), counts.end(), int64_t{0}) > 0) step(counts);
    }
  }

  const std::vector<std::vector<float>>& hidden() const { return hidden_; }

 private:
  TinyModel& model_;
  const std::vector<std::vector<int64_t>>& prompts_;
  const int block_size_, num_threads_;
  Context context_;
  int64_t stride_;
  std::vector<int32_t> tables_;
  std::deque<std::vector<float>> caches_;
  std::vector<int64_t> computed_;
  std::vector<std::vector<float>> hidden_;
};

std::vector<std::vector<int64_t>> draw_prompts(Random& random, const std::vector<int64_t>& lengths,
                                               int64_t vocab) {
  std::vector<std::vector<int64_t>> prompts;
  for (int64_t length : lengths) {
    prompts.emplace_back();
    for (int64_t i = 0; i < length; ++i) prompts.back().push_back(random.between(0, vocab - 1));
  }
  return prompts;
}

void compare(const TinyModel& model, const std::vector<int64_t>& prompt,
             const std::vector<float>& hidden, const Rounding& rounding, const std::string& name,
             Findings& found) {
  const int64_t size = model.shape.hidden;
  const std::vector<Row> expected = forward(model, prompt, rounding);
  for (size_t t = 0; t < prompt.size(); ++t) {
    bool is_right = true;
    for (int64_t i = 0; i < size; ++i) {
      is_right &= found.models.take(hidden[t * size + i], expected[t][i], kDeviations);
    }
    if (!is_right) {
      found.fail(name + ": token " + std::to_string(t) + " is off");
      return;
    }
  }
}

void compare_logits(TinyModel& model, const std::vector<float>& hidden, const Rounding& rounding,
                    const std::string& name, Findings& found) {
  const int64_t rows = std::min<int64_t>(hidden.size() / model.shape.hidden, 7);
  const int64_t vocab = model.shape.vocab;
  Context context;
  std::vector<float> one(rows * vocab, NAN), two(rows * vocab, NAN);
  must(quire_logits(context.get(), &model.model, hidden.data(), rows, nullptr, one.data(), 1));
  must(quire_logits(context.get(), &model.model, hidden.data(), rows, nullptr, two.data(), 2));
  if (!same_bits(one.data(), two.data(), rows * vocab)) {
    found.fail(name + ": logits differ with two threads");
  }
  bool is_right = true;
  for (int64_t r = 0; r < rows; ++r) {
    const Row expected = logits(model, &hidden[r * model.shape.hidden], rounding);
    for (int64_t o = 0; o < vocab; ++o) {
      is_right &= found.models.take(one[r * vocab + o], expected[o], kDeviations);
    }
  }
  if (!is_right) found.fail(name + ": logits are off");
}

// By way of sums over the ranks, of which there is one, all in one piece or in several.
void compare_summed(TinyModel& model, const std::vector<std::vector<int64_t>>& prompts,
                    const std::vector<std::vector<float>>& alone, const std::string& name,
                    Findings& found) {
  Random random(prompts[0].size());
  const SharedRanks ranks({1, 1, random.one_of<int64_t>({50, 1 << 16}), 64, 1});
  const Seat seat(ranks, 0);
  model.model.comm = seat.get();
  Runner runner(model, prompts, random, 16, 2);
  const auto& together = runner.run(random, 50);
  model.model.comm = nullptr;
  for (size_t i = 0; i < prompts.size(); ++i) {
    if (!same_bits(together[i].data(), alone[i].data(), alone[i].size())) {
      found.fail(name + ": differs where parts are added up");
    }
  }
}

// Each sequence alone, in one step, by one thread, is right; and has the same bits otherwise.
void check_model(Random& random, const Shape& shape, const std::vector<int64_t>& lengths,
                 const std::string& name, const Rounding& rounding, Findings& found) {
  TinyModel model(random, shape);
  const auto prompts = draw_prompts(random, lengths, shape.vocab);
  std::vector<std::vector<float>> alone;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const std::vector<std::vector<int64_t>> one{prompts[i]};
    Runner runner(model, one, random, 16, 1);
    runner.step({lengths[i]});
    alone.push_back(runner.hidden()[0]);
    compare(model, prompts[i], alone[i], rounding, name + " (" + std::to_string(i) + ")", found);
    Runner chunked(model, one, random, 7, 2);
    if (!same_bits(chunked.run(random, 40)[0].data(), alone[i].data(), alone[i].size())) {
      found.fail(name + ": differs in chunks");
    }
    ++found.num_same;
    found.num_tokens += static_cast<int>(lengths[i]);
  }
  compare_logits(model, alone[0], rounding, name, found);
  for (int num_threads : {1, 2}) {
    Runner runner(model, prompts, random, random.one_of({1, 4, 5, 8, 16}), num_threads);
    const auto& together = runner.run(random, 50);
    for (size_t i = 0; i < prompts.size(); ++i) {
      if (!same_bits(together[i].data(), alone[i].data(), alone[i].size())) {
        found.fail(name + ": sequence " + std::to_string(i) + " differs beside others, on " +
                   std::to_string(num_threads) + " threads");
      }
      ++found.num_same;
    }
  }
  compare_summed(model, prompts, alone, name, found);
  ++found.num_models;
}

}  // namespace

void check_models(Random& random, int count, const Rounding& rounding, Findings& found) {
  for (int i = 0; i < count; ++i) {
    std::vector<int64_t> lengths{random.between(1, 20), random.between(20, 100)};
    if (random.one_in(2)) lengths.push_back(random.between(1, 75));
    check_model(random, draw_shape(random), lengths, "model " + std::to_string(i), rounding,
                found);
  }
  // Keys of more than one part, which idle threads share.
  Shape wide;
  wide.hidden = wide.embedding = 16;
  wide.num_heads = 1;
  wide.inner = 10;
  wide.rotary_dim = 16;
  wide.most_positions = 560;
  check_model(random, wide, {548}, "a long sequence", rounding, found);
}

// x + activation(x), by a layer of which nothing else is left.
void check_activations(Findings& found) {
  Random random(7);
  std::vector<float> inputs{0.0f, -0.0f, 1e-30f, -1e-30f, 1e15f, -1e15f, 88.0f, -88.0f, -104.0f};
  while (inputs.size() < 1600) {
    inputs.push_back(random.normal() * std::exp2(static_cast<float>(random.between(-12, 6))));
  }
  for (int32_t kind = kSilu; kind <= kTanh; ++kind) {
    Shape shape;
    shape.hidden = shape.embedding = shape.inner = 16;
    shape.vocab = static_cast<int64_t>(inputs.size()) / 16;
    shape.gated = false;
    shape.norm_kind = kNoNorm;
    shape.activation = kind;
    TinyModel model(random, shape);
    LayerWeights& layer = model.layers[0];
    for (float& each : layer.out.values) each = 0;
    for (Weight* each : {&layer.up, &layer.down}) {
      for (int i = 0; i < 256; ++i) each->values[i] = i % 17 == 0;
      each->set(16, 16, kFloat32);
    }
    layer.out.set(16, layer.out.matrix.in, kFloat32);
    model.embed.values = inputs;
    model.embed.set(shape.vocab, 16, kFloat32, false);
    model.connect();
    std::vector<std::vector<int64_t>> prompts(1);
    for (int64_t i = 0; i < shape.vocab; ++i) prompts[0].push_back(i);
    Runner runner(model, prompts, random, 16, 1);
    runner.step({shape.vocab});
    bool is_right = true;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Estimate x(inputs[i]);
      const Estimate expected = x + activate(x, kind);
      is_right &= found.activations.take(runner.hidden()[0][i], expected, 2);
    }
    if (!is_right) found.fail("activation " + std::to_string(kind) + " is off");
    ++found.num_activations;
  }
}

}  // namespace check
