// Team: the threads that run one program side by side, with barriers between its parts.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

namespace quire {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  explicit Team(int size) : size_(size) {}
  int size() const { return size_; }

  // Wait until all have come. Items handed out by next() start over.
  void barrier();

  // The next item of a list that all threads take from, until it is exhausted.
  int64_t next() { return ticket_.fetch_add(1, std::memory_order_relaxed); }

 private:
  const int size_;
  alignas(64) std::atomic<int64_t> ticket_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// Run a program on a team of that many threads, the calling one among them. Calls from several
// threads follow one another. A forked process gets threads of its own.
void run_team(int num_threads, const std::function<void(Team&, int)>& program);

}  // namespace quire
