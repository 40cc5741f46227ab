// Comm: one rank's seat at memory that all ranks of a model on one machine have mapped. Those of a
// stage add up their parts of each layer by it, and a stage hands the next what it made.
//
// An exchange of a stage has a number. Each rank fills its slot among the buffers of numbers that are
// even or of those that are odd, says so by a counter, waits until all have, and reads all slots. So
// one wait is enough: who fills slots for exchange k + 2 has seen all arrive at k + 1, and by then
// they have read those of k.
//
// What fails fails for good: a rank that is gone, or does not come in time, is written down where
// all look while they wait. Nobody waits for ever, and what is computed after that is thrown away.
#pragma once
#include <cstdint>
#include <memory>

namespace quire {

// What the memory is divided into; the same for all ranks. Mirrored in quire/kernels/cpu/structs.py.
struct SharedSizes {
  int32_t tensor_size;    // ranks of a stage
  int32_t num_stages;
  int64_t capacity;       // floats of a slot
  int64_t link_capacity;  // bytes of a piece of what goes from stage to stage
  int32_t link_pieces;    // that may be on their way
};

// What exchanges took so far. Mirrored there, too.
struct CommCounters {
  int64_t operations;
  int64_t bytes;    // that this rank handed over
  int64_t waited;   // nanoseconds that it waited for others
  int64_t took;     // nanoseconds of it all
};

// What functions return besides 0.
enum CommStatus : int32_t {
  kRankLost = -3,      // or the model was given up
  kRankLate = -4,
  kWrongMessage = -5,  // of another size than the one that was waited for
};

struct SharedHeader;

class Comm {
 public:
  // `base` was initialized. By `fd`, the file that it is mapped from, ranks see which of them are
  // gone; -1: they do not.
  Comm(void* base, int32_t rank, int32_t fd, double patience);
  ~Comm();
  Comm(const Comm&) = delete;
  Comm& operator=(const Comm&) = delete;

  int32_t rank() const { return rank_in_group_; }  // in its stage
  int32_t size() const { return size_; }
  int64_t capacity() const { return capacity_; }
  int32_t status() const { return status_; }
  int32_t rank_in_model() const { return rank_; }
  SharedHeader& header() const { return header_; }
  CommCounters& counters() { return counters_; }

  // The number of the exchange that comes next.
  int64_t next() const { return next_; }
  // Where a rank's part of that exchange lies.
  float* slot(int64_t number, int32_t rank) const {
    return buffers_ + ((number & 1) * size_ + rank) * capacity_;
  }
  // The own slot, `bytes` of it, is filled: wait for the others' to be. Once this has failed it
  // fails at once.
  void meet(int64_t number, int64_t bytes);

  // Let no other rank wait for this one.
  void give_up(int32_t status);

  // On one thread.
  int32_t reduce(float* data, int64_t count);
  // `out` is [size][bytes] on the first rank of the stage.
  int32_t gather(const char* data, int64_t bytes, char* out);
  // To the stage after this one, from the one before; the last stage's next is the first.
  int32_t send(const char* data, int64_t bytes);
  int32_t receive(char* data, int64_t bytes);

 private:
  template <typename Ready, typename Missing>
  bool wait(Ready ready, Missing missing);
  bool is_gone(int32_t rank) const;
  void fail(int32_t status, int32_t rank, const char* why);

  SharedHeader& header_;
  const int32_t rank_, fd_;
  const int64_t patience_;  // nanoseconds
  int32_t rank_in_group_, size_;
  int64_t capacity_;
  float* buffers_;
  int64_t next_;
  int32_t status_ = 0;
  CommCounters counters_{};
};

}  // namespace quire
