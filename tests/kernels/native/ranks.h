// Memory that ranks share which are threads of this process.
#pragma once
#include <cstdlib>
#include <cstring>

#include "library.h"

namespace check {

class SharedRanks {
 public:
  explicit SharedRanks(const quire::SharedSizes& sizes) : sizes_(sizes) {
    const size_t size = (quire_shared_size(&sizes) + 4095) / 4096 * 4096;
    base_ = std::aligned_alloc(4096, size);
    std::memset(base_, 0, size);
    quire_shared_init(base_, &sizes);
  }
  ~SharedRanks() { std::free(base_); }
  SharedRanks(const SharedRanks&) = delete;
  SharedRanks& operator=(const SharedRanks&) = delete;

  void* base() const { return base_; }
  int num_ranks() const { return sizes_.tensor_size * sizes_.num_stages; }

 private:
  const quire::SharedSizes sizes_;
  void* base_;
};

// A rank's seat there.
class Seat {
 public:
  Seat(const SharedRanks& ranks, int rank, double patience = 60)
      : comm_(quire_comm_new(ranks.base(), rank, -1, patience)) {}
  ~Seat() { quire_comm_free(comm_); }
  Seat(const Seat&) = delete;
  Seat& operator=(const Seat&) = delete;
  quire::Comm* get() const { return static_cast<quire::Comm*>(comm_); }

 private:
  void* const comm_;
};

}  // namespace check
