#include "comm.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <new>
#include <thread>

#include "library.h"
#include "team.h"

namespace quire {

namespace {
constexpr uint64_t kMagic = 0x31305f6572697571;  // "quire_01"
constexpr int64_t kLine = 128;                   // bytes that two ranks' counters are apart
constexpr int64_t kReason = 256;
constexpr int kSpins = 1 << 11;
constexpr int64_t kMillisecond = 1000000;
// A wait is first for a rank that is about to come, and then for one that computes.
constexpr int64_t kYieldsFor = 2 * kMillisecond;
constexpr int64_t kShortestRest = kMillisecond / 20;
constexpr int64_t kPartOfWait = 64;
constexpr int64_t kLooksEvery = 20 * kMillisecond;

enum Presence : int32_t { kNotYet = 0, kHere = 1, kLeft = 2 };

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
}  // namespace

// What a rank says of itself.
struct alignas(kLine) RankLine {
  std::atomic<int64_t> arrived;  // exchanges whose slot it has filled
  std::atomic<int32_t> presence;
  std::atomic<int32_t> process;
};

// Pieces that went from a rank to the one of the next stage, and those that are read.
struct LinkLines {
  alignas(kLine) std::atomic<int64_t> sent;
  alignas(kLine) std::atomic<int64_t> taken;
};

// Behind it: a RankLine and LinkLines for each rank, two buffers for each stage, and each link's
// pieces, their sizes in front of them.
struct alignas(kLine) SharedHeader {
  uint64_t magic;
  SharedSizes sizes;
  alignas(kLine) std::atomic<int32_t> has_failed;  // 1: what follows is being written; 2: it is there
  int32_t culprit;
  int32_t status;
  char why[kReason];

  int32_t num_ranks() const { return sizes.tensor_size * sizes.num_stages; }
  char* at(int64_t offset) { return reinterpret_cast<char*>(this) + offset; }
  RankLine& rank(int32_t r) {
    return *reinterpret_cast<RankLine*>(at(after_header() + r * int64_t{sizeof(RankLine)}));
  }
  LinkLines& link(int32_t r) {
    return *reinterpret_cast<LinkLines*>(at(after_ranks() + r * int64_t{sizeof(LinkLines)}));
  }
  float* buffers(int32_t stage) {
    return reinterpret_cast<float*>(at(after_links() + stage * buffer_bytes()));
  }
  char* piece(int32_t r, int64_t number) {
    const int64_t index = r * int64_t{sizes.link_pieces} + number % sizes.link_pieces;
    return at(after_links() + sizes.num_stages * buffer_bytes() + index * piece_bytes());
  }
  int64_t total() const {
    return after_links() + sizes.num_stages * buffer_bytes() +
           int64_t{num_ranks()} * sizes.link_pieces * piece_bytes();
  }

 private:
  static int64_t after_header() { return sizeof(SharedHeader); }
  int64_t after_ranks() const { return after_header() + num_ranks() * int64_t{sizeof(RankLine)}; }
  int64_t after_links() const { return after_ranks() + num_ranks() * int64_t{sizeof(LinkLines)}; }
  int64_t buffer_bytes() const { return 2 * sizes.tensor_size * slot_bytes(); }
  int64_t slot_bytes() const { return lines(sizes.capacity * int64_t{sizeof(float)}); }
  int64_t piece_bytes() const { return kLine + lines(sizes.link_capacity); }
};

static_assert(std::atomic<int64_t>::is_always_lock_free);  // between processes, there are no locks

namespace {
// Write down what went wrong, unless something did before.
void write_failure(SharedHeader& header, int32_t status, int32_t rank, const char* why) {
  int32_t expected = 0;
  if (!header.has_failed.compare_exchange_strong(expected, 1)) return;
  header.status = status;
  header.culprit = rank;
  std::snprintf(header.why, kReason, "%s", why);
  header.has_failed.store(2, std::memory_order_release);
}

struct flock lock_of(int32_t rank, short type) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}
}  // namespace

Comm::Comm(void* base, int32_t rank, int32_t fd, double patience)
    : header_(*static_cast<SharedHeader*>(base)),
      rank_(rank),
      fd_(fd),
      patience_(static_cast<int64_t>(patience * 1e9)) {
  const SharedSizes& sizes = header_.sizes;
  rank_in_group_ = rank % sizes.tensor_size;
  size_ = sizes.tensor_size;
  // In floats, so that slots begin with a line of memory.
  capacity_ = lines(sizes.capacity * int64_t{sizeof(float)}) / int64_t{sizeof(float)};
  buffers_ = header_.buffers(rank / sizes.tensor_size);
  RankLine& own = header_.rank(rank);
  next_ = own.arrived.load(std::memory_order_relaxed);
  own.process.store(getpid(), std::memory_order_relaxed);
  if (fd_ >= 0) {
    // It ends with the process, however that ends.
    struct flock lock = lock_of(rank, F_WRLCK);
    fcntl(fd_, F_SETLK, &lock);
  }
  own.presence.store(kHere, std::memory_order_release);
}

Comm::~Comm() {
  header_.rank(rank_).presence.store(kLeft, std::memory_order_release);
  if (fd_ < 0) return;
  struct flock lock = lock_of(rank_, F_UNLCK);
  fcntl(fd_, F_SETLK, &lock);
}

bool Comm::is_gone(int32_t rank) const {
  RankLine& other = header_.rank(rank);
  const int32_t presence = other.presence.load(std::memory_order_acquire);
  if (presence != kHere) return presence == kLeft;
  if (fd_ < 0 || other.process.load(std::memory_order_relaxed) == getpid()) return false;
  struct flock lock = lock_of(rank, F_WRLCK);
  return fcntl(fd_, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

void Comm::fail(int32_t status, int32_t rank, const char* why) {
  status_ = status;
  write_failure(header_, status, rank, why);
}

// Until `ready` says so; `missing` returns a rank that is waited for, or -1. Returns whether the wait
// ended well.
template <typename Ready, typename Missing>
bool Comm::wait(Ready ready, Missing missing) {
  if (status_ != 0) return false;
  for (int spin = 0; spin < kSpins; ++spin) {
    if (ready()) return true;
    pause_briefly();
  }
  const int64_t begin = now();
  int64_t looked = begin;
  for (;;) {
    if (ready()) break;
    if (header_.has_failed.load(std::memory_order_acquire) != 0) {
      status_ = kRankLost;
      return false;
    }
    const int64_t time = now();
    if (time - looked >= kLooksEvery || time - begin >= patience_) {
      looked = time;
      const int32_t rank = missing();
      if (rank < 0) continue;
      if (is_gone(rank)) {
        if (ready()) break;  // it has said all before it left
        const bool left = header_.rank(rank).presence.load(std::memory_order_relaxed) == kLeft;
        fail(kRankLost, rank,
             left ? "left while others still computed" : "ended: its process is gone");
        return false;
      }
      if (time - begin >= patience_) {
        char why[kReason];
        std::snprintf(why, kReason, "did not answer rank %d within %.3g seconds", rank_,
                      static_cast<double>(patience_) * 1e-9);
        fail(kRankLate, rank, why);
        return false;
      }
    }
    if (time - begin < kYieldsFor) {
      std::this_thread::yield();
    } else {
      const int64_t rest = std::clamp((time - begin) / kPartOfWait, kShortestRest, kMillisecond);
      std::this_thread::sleep_for(std::chrono::nanoseconds(rest));
    }
  }
  return true;
}

void Comm::meet(int64_t number, int64_t bytes) {
  next_ = number + 1;
  ++counters_.operations;
  counters_.bytes += bytes;
  const int32_t first = rank_ - rank_in_group_;
  header_.rank(rank_).arrived.store(number + 1, std::memory_order_release);
  const int64_t begin = now();
  auto has_come = [&](int32_t r) {
    return header_.rank(first + r).arrived.load(std::memory_order_acquire) > number;
  };
  int32_t seen = 0;  // ranks that have come for sure
  wait(
      [&] {
        while (seen < size_ && has_come(seen)) ++seen;
        return seen == size_;
      },
      [&] {
        // Rather one that is gone than the first that has not come.
        int32_t late = -1;
        for (int32_t r = size_ - 1; r >= 0; --r) {
          if (!has_come(r) && (late < 0 || !is_gone(late))) late = first + r;
        }
        return late;
      });
  counters_.waited += now() - begin;
}

void Comm::give_up(int32_t status) {
  fail(kRankLost, rank_, status == -1 ? "has no memory for a step" : "cannot start a thread");
}

int32_t Comm::reduce(float* data, int64_t count) {
  const int64_t begin = now();
  for (int64_t first = 0; first < count && status_ == 0; first += capacity_) {
    const int64_t size = std::min(capacity_, count - first), number = next_;
    std::memcpy(slot(number, rank_in_group_), data + first, size * sizeof(float));
    meet(number, size * sizeof(float));
    std::memcpy(data + first, slot(number, 0), size * sizeof(float));
    for (int32_t r = 1; r < size_; ++r) {
      const float* part = slot(number, r);
      for (int64_t i = 0; i < size; ++i) data[first + i] += part[i];
    }
  }
  counters_.took += now() - begin;
  return status_;
}

int32_t Comm::gather(const char* data, int64_t bytes, char* out) {
  const int64_t begin = now(), most = capacity_ * static_cast<int64_t>(sizeof(float));
  for (int64_t first = 0; first < bytes && status_ == 0; first += most) {
    const int64_t size = std::min(most, bytes - first), number = next_;
    std::memcpy(slot(number, rank_in_group_), data + first, size);
    meet(number, size);
    if (rank_in_group_ != 0) continue;
    for (int32_t r = 0; r < size_; ++r) std::memcpy(out + r * bytes + first, slot(number, r), size);
  }
  counters_.took += now() - begin;
  return status_;
}

int32_t Comm::send(const char* data, int64_t bytes) {
  const SharedSizes& sizes = header_.sizes;
  const int64_t begin = now();
  const int32_t to = (rank_ + sizes.tensor_size) % header_.num_ranks();
  LinkLines& link = header_.link(rank_);
  int64_t number = link.sent.load(std::memory_order_relaxed);
  for (int64_t first = 0; first < bytes; first += sizes.link_capacity, ++number) {
    const int64_t waits_from = now();
    const bool is_free = wait(
        [&] { return link.taken.load(std::memory_order_acquire) > number - sizes.link_pieces; },
        [&] { return to; });
    counters_.waited += now() - waits_from;
    if (!is_free) break;
    const int64_t size = std::min(sizes.link_capacity, bytes - first);
    char* piece = header_.piece(rank_, number);
    std::memcpy(piece, &size, sizeof size);
    std::memcpy(piece + kLine, data + first, size);
    link.sent.store(number + 1, std::memory_order_release);
  }
  ++counters_.operations;
  counters_.bytes += bytes;
  counters_.took += now() - begin;
  return status_;
}

int32_t Comm::receive(char* data, int64_t bytes) {
  const SharedSizes& sizes = header_.sizes;
  const int64_t begin = now();
  const int32_t all = header_.num_ranks(), from = (rank_ - sizes.tensor_size + all) % all;
  LinkLines& link = header_.link(from);
  int64_t number = link.taken.load(std::memory_order_relaxed);
  for (int64_t first = 0; first < bytes; first += sizes.link_capacity, ++number) {
    const int64_t waits_from = now();
    const bool is_there = wait(
        [&] { return link.sent.load(std::memory_order_acquire) > number; },
        [&] { return from; });
    counters_.waited += now() - waits_from;
    if (!is_there) break;
    const char* piece = header_.piece(from, number);
    int64_t size;
    std::memcpy(&size, piece, sizeof size);
    if (size != std::min(sizes.link_capacity, bytes - first)) {
      fail(kWrongMessage, from, "sent something of another size than was waited for");
      break;
    }
    std::memcpy(data + first, piece + kLine, size);
    link.taken.store(number + 1, std::memory_order_release);
  }
  ++counters_.operations;
  counters_.took += now() - begin;
  return status_;
}

}  // namespace quire

using namespace quire;

QUIRE_API int64_t quire_shared_size(const SharedSizes* sizes) {
  SharedHeader header{};
  header.sizes = *sizes;
  return header.total();
}

QUIRE_API void quire_shared_init(void* base, const SharedSizes* sizes) {
  // What comes from the system is all zeros.
  SharedHeader* header = static_cast<SharedHeader*>(base);
  header->sizes = *sizes;
  header->magic = kMagic;
}

QUIRE_API int quire_shared_sizes(void* base, int64_t bytes, SharedSizes* sizes) {
  const SharedHeader* header = static_cast<const SharedHeader*>(base);
  if (bytes < static_cast<int64_t>(sizeof(SharedHeader)) || header->magic != kMagic) return -1;
  *sizes = header->sizes;
  return bytes < header->total() ? -1 : 0;
}

QUIRE_API void quire_shared_fail(void* base, int32_t rank, const char* why) {
  write_failure(*static_cast<SharedHeader*>(base), kRankLost, rank, why);
}

QUIRE_API int quire_shared_failure(void* base, int32_t* rank, char* why, int64_t size) {
  SharedHeader& header = *static_cast<SharedHeader*>(base);
  const int32_t state = header.has_failed.load(std::memory_order_acquire);
  if (state == 0) return 0;
  *rank = state == 2 ? header.culprit : -1;  // who was writing it down may be gone
  std::snprintf(why, size, "%s", state == 2 ? header.why : "");
  return state == 2 ? header.status : kRankLost;
}

QUIRE_API void* quire_comm_new(void* base, int32_t rank, int32_t fd, double patience) {
  return new (std::nothrow) Comm(base, rank, fd, patience);
}

QUIRE_API void quire_comm_free(void* comm) { delete static_cast<Comm*>(comm); }

QUIRE_API void* quire_comm_base(void* comm) { return &static_cast<Comm*>(comm)->header(); }

QUIRE_API void quire_comm_counters(void* comm, CommCounters* counters) {
  *counters = static_cast<Comm*>(comm)->counters();
}

QUIRE_API int quire_comm_reduce(void* comm, float* data, int64_t count) {
  return static_cast<Comm*>(comm)->reduce(data, count);
}

QUIRE_API int quire_comm_gather(void* comm, const void* data, int64_t bytes, void* out) {
  return static_cast<Comm*>(comm)->gather(static_cast<const char*>(data), bytes,
                                          static_cast<char*>(out));
}

QUIRE_API int quire_comm_send(void* comm, const void* data, int64_t bytes) {
  return static_cast<Comm*>(comm)->send(static_cast<const char*>(data), bytes);
}

QUIRE_API int quire_comm_receive(void* comm, void* data, int64_t bytes) {
  return static_cast<Comm*>(comm)->receive(static_cast<char*>(data), bytes);
}
