// Sums over the ranks of a stage, within a step: each has a part of what a layer makes of each token.
//
// All ranks add the parts up themselves, in the order of the ranks: all get the same bits.
#pragma once
#include <algorithm>
#include <chrono>

#include "comm.h"
#include "plan.h"
#include "rows.h"
#include "team.h"

namespace quire {
namespace QUIRE_ISA {

// One thread's way through the exchanges of a step, all of which all threads of all ranks come by.
// A sum is made in two moves: parts are written to where `parts` says, and then added up.
class Exchange {
 public:
  explicit Exchange(const Buffers& rows)
      : comm_(rows.comm), local_(rows.summed), next_(rows.exchange) {}

  bool is_on() const { return comm_ != nullptr; }

  // Where the parts of so many sums are to be written: into this rank's slot, if there is room.
  float* parts(int64_t count) const {
    return count <= comm_->capacity() ? comm_->slot(next_, comm_->rank()) : local_;
  }

  // Call `with` with each run of `piece` sums: where it begins, how long it is, and the sums, which
  // it may change.
  template <typename With>
  void add(Thread& thread, int64_t count, int64_t piece, With with) {
    const auto begin = thread.is_first() ? Clock::now() : Clock::time_point{};
    const int64_t capacity = comm_->capacity(), pieces = (count + piece - 1) / piece;
    if (count <= capacity) {
      const int64_t number = meet(thread, count);
      thread.share(pieces, [&](int64_t item) {
        const int64_t first = item * piece, size = std::min(piece, count - first);
        sum_slots(number, first, size, local_ + first);
        with(first, size, local_ + first);
      });
    } else {
      for (int64_t first = 0; first < count; first += capacity) {
        add_in_place(thread, local_ + first, std::min(capacity, count - first));
      }
      thread.share(pieces, [&](int64_t item) {
        const int64_t first = item * piece;
        with(first, std::min(piece, count - first), local_ + first);
      });
    }
    if (thread.is_first()) {
      const auto took = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin);
      comm_->counters().took += took.count();
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int64_t kRun = 4096;

  // Wait, on one thread, for what others have in their slots, and return the exchange's number.
  int64_t meet(Thread& thread, int64_t count) {
    const int64_t number = next_++;
    thread.share(1, [&](int64_t) { comm_->meet(number, count * int64_t{sizeof(float)}); });
    return number;
  }

  void add_in_place(Thread& thread, float* data, int64_t count) {
    float* own = comm_->slot(next_, comm_->rank());
    const int64_t runs = (count + kRun - 1) / kRun;
    auto size_of = [&](int64_t item) { return std::min(kRun, count - item * kRun); };
    thread.share(runs, [&](int64_t item) {
      std::memcpy(own + item * kRun, data + item * kRun, size_of(item) * sizeof(float));
    });
    const int64_t number = meet(thread, count);
    thread.share(runs, [&](int64_t item) {
      sum_slots(number, item * kRun, size_of(item), data + item * kRun);
    });
  }

  void sum_slots(int64_t number, int64_t first, int64_t count, float* out) const {
    const float* a = comm_->slot(number, 0) + first;
    for (int32_t r = 1; r < comm_->size(); ++r) {
      const float* b = comm_->slot(number, r) + first;
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store(out + i, load(a + i) + load(b + i));
      for (; i < count; ++i) out[i] = a[i] + b[i];
      a = out;
    }
    if (a != out) std::memcpy(out, a, count * sizeof(float));
  }

  Comm* const comm_;
  float* const local_;
  int64_t next_;
};

// What a norm, if there is one, makes of sums for `count` rows, added to `x`.
inline void add_sums(Thread& thread, Exchange& exchange, int64_t count, int64_t size,
                     const Norm& norm, float* x) {
  constexpr int64_t kPiece = 1024;
  const bool has_norm = norm.kind != kNoNorm;
  exchange.add(thread, count * size, has_norm ? size : kPiece,
               [&](int64_t first, int64_t number, float* sums) {
                 if (has_norm) normalize(norm, sums, number, sums);
                 float* out = x + first;
                 int64_t i = 0;
                 for (; i + kLanes <= number; i += kLanes) {
                   store(out + i, load(out + i) + load(sums + i));
                 }
                 for (; i < number; ++i) out[i] += sums[i];
               });
}

}  // namespace QUIRE_ISA
}  // namespace quire
