#include "team.h"

#include <unistd.h>

#include <condition_variable>
#include <memory>
#include <mutex>

namespace quire {
namespace {

// Rounds that an idle worker stays awake for: between two steps lies the engine's own work.
constexpr int kIdleSpins = 1 << 14;

struct Job {
  std::vector<Loop> loops;
  float* scratch;
  int64_t scratch_size;
  const std::function<void(Thread&)>& program;

  void run(int index) {
    Thread thread(loops, scratch + index * scratch_size, index == 0);
    program(thread);
  }
};

// One thread, and the place where its next job is put.
class Worker {
 public:
  explicit Worker(int index) : index_(index) {
    std::thread([this] { work(); }).detach();
  }

  void offer(Job* job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      offered_.store(job, std::memory_order_release);
    }
    wakeup_.notify_one();
  }

  // Take the job back if it was not begun, else wait for its end.
  void finish(Job* job) {
    if (offered_.compare_exchange_strong(job, nullptr)) return;
    wait_until([this] { return !busy_.load(std::memory_order_acquire); });
  }

 private:
  void work() {
    for (;;) {
      for (int spin = 0; spin < kIdleSpins && !has_offer(); ++spin) pause_briefly();
      if (!has_offer()) {
        std::unique_lock<std::mutex> lock(mutex_);
        wakeup_.wait(lock, [this] { return has_offer(); });
      }
      // First busy, then the job: whoever finds the offer gone finds the worker busy.
      busy_.store(true, std::memory_order_seq_cst);
      if (Job* job = offered_.exchange(nullptr)) job->run(index_);
      busy_.store(false, std::memory_order_release);
    }
  }

  bool has_offer() const { return offered_.load(std::memory_order_acquire) != nullptr; }

  const int index_;
  std::atomic<Job*> offered_{nullptr};
  std::atomic<bool> busy_{false};
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

void run_team(int num_threads, size_t num_loops, float* scratch, int64_t scratch_size,
              const std::function<void(Thread&)>& program) {
  Job job{std::vector<Loop>(num_loops), scratch, scratch_size, program};
  if (num_threads <= 1) {
    job.run(0);
    return;
  }
  Pool& all = pool();
  std::lock_guard<std::mutex> one_at_a_time(all.running);
  const size_t num_workers = static_cast<size_t>(num_threads - 1);
  all.workers.reserve(num_workers);  // a worker that has started must stay
  while (all.workers.size() < num_workers) {
    all.workers.push_back(std::make_unique<Worker>(static_cast<int>(all.workers.size()) + 1));
  }
  for (size_t i = 0; i < num_workers; ++i) all.workers[i]->offer(&job);
  job.run(0);
  for (size_t i = 0; i < num_workers; ++i) all.workers[i]->finish(&job);
}

}  // namespace quire
