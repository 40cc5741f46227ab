#include "team.h"

#include <unistd.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace quire {
namespace {

// Rounds of waiting before a thread gives its core to others. The parts of a step end within
// microseconds of each other, unless the machine is busy with something else; between two steps
// lies the engine's own work.
constexpr int kBarrierSpins = 1 << 12;
constexpr int kIdleSpins = 1 << 14;

struct Job {
  Team& team;
  const std::function<void(Team&, int)>& program;
};

// One thread and the place where its next job is put.
class Worker {
 public:
  explicit Worker(int index) : index_(index) {
    std::thread([this] { work(); }).detach();
  }

  void start(const Job* job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_.store(job, std::memory_order_release);
    }
    wakeup_.notify_one();
  }

  bool busy() const { return job_.load(std::memory_order_acquire) != nullptr; }

 private:
  void work() {
    for (;;) {
      for (int spin = 0; spin < kIdleSpins && !busy(); ++spin) pause_briefly();
      if (!busy()) {
        std::unique_lock<std::mutex> lock(mutex_);
        wakeup_.wait(lock, [this] { return busy(); });
      }
      const Job* job = job_.load(std::memory_order_acquire);
      job->program(job->team, index_);
      job_.store(nullptr, std::memory_order_release);
    }
  }

  const int index_;
  std::atomic<const Job*> job_{nullptr};
  std::mutex mutex_;
  std::condition_variable wakeup_;
};

struct Pool {
  const pid_t process = getpid();
  std::mutex running;
  std::vector<std::unique_ptr<Worker>> workers;
};

std::atomic<Pool*> the_pool{nullptr};

// Workers are never ended: at exit there is nobody left to wait for them. In a forked process
// those of the parent do not exist, and its pool, which may be locked, is left behind.
Pool& pool() {
  Pool* found = the_pool.load(std::memory_order_acquire);
  while (found == nullptr || found->process != getpid()) {
    Pool* made = new Pool;
    if (the_pool.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

}  // namespace

void Team::barrier() {
  if (size_ == 1) {
    ticket_.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    ticket_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; ++spin) {
    if (spin < kBarrierSpins) {
      pause_briefly();
    } else {
      std::this_thread::yield();
    }
  }
}

void run_team(int num_threads, const std::function<void(Team&, int)>& program) {
  Team team(num_threads);
  if (num_threads == 1) {
    program(team, 0);
    return;
  }
  Pool& all = pool();
  std::lock_guard<std::mutex> one_at_a_time(all.running);
  while (static_cast<int>(all.workers.size()) < num_threads - 1) {
    all.workers.push_back(std::make_unique<Worker>(static_cast<int>(all.workers.size()) + 1));
  }
  const Job job{team, program};
  for (int i = 0; i < num_threads - 1; ++i) all.workers[i]->start(&job);
  program(team, 0);
  for (int i = 0; i < num_threads - 1; ++i) {
    for (int spin = 0; all.workers[i]->busy(); ++spin) {
      if (spin < kBarrierSpins) {
        pause_briefly();
      } else {
        std::this_thread::yield();
      }
    }
  }
}

}  // namespace quire
