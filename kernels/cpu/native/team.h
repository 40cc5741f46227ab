// Team: threads that run one program side by side, sharing out each of its loops.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace quire {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Wait until a condition holds: awake at first, since the parts of a step end within microseconds
// of each other; then lending the core to others, for then the machine is busy.
template <typename Condition>
inline void wait_until(Condition condition) {
  constexpr int kSpins = 1 << 11;
  for (int spin = 0; !condition(); ++spin) {
    if (spin < kSpins) {
      pause_briefly();
    } else {
      std::this_thread::yield();
    }
  }
}

// One loop of a program: how many of its items were taken, and how many are done.
struct alignas(128) Loop {
  std::atomic<int64_t> taken{0};
  alignas(64) std::atomic<int64_t> done{0};
};

// One thread's way through the program. All threads of a team come by the same loops.
class Thread {
 public:
  Thread(std::vector<Loop>& loops, float* scratch, bool is_first)
      : loops_(loops), scratch_(scratch), is_first_(is_first) {}

  // Memory of this thread's own, for the time of one item.
  float* scratch() const { return scratch_; }

  // Whether it is the one that called the team together.
  bool is_first() const { return is_first_; }

  // Do each item once, on whichever thread takes it first, and go on when all are done. What is
  // waited for is items, not threads: one that has lost its core holds up the others by the item
  // it is at, at most.
  template <typename Body>
  void share(int64_t count, Body body) {
    Loop& loop = loops_[next_++];
    for (int64_t item; (item = loop.taken.fetch_add(1, std::memory_order_relaxed)) < count;) {
      body(item);
      loop.done.fetch_add(1, std::memory_order_release);
    }
    wait_until([&] { return loop.done.load(std::memory_order_acquire) >= count; });
  }

 private:
  std::vector<Loop>& loops_;
  float* const scratch_;
  const bool is_first_;
  size_t next_ = 0;
};

// Run a program of at most `num_loops` loops on that many threads, the calling one among them.
// `scratch` is memory of `scratch_size` numbers for each. Calls from several threads follow one
// another. A forked process gets threads of its own. The program must not throw.
void run_team(int num_threads, size_t num_loops, float* scratch, int64_t scratch_size,
              const std::function<void(Thread&)>& program);

}  // namespace quire
