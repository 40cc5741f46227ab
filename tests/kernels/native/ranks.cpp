// Exchanges between ranks, which are threads here.
#include "ranks.h"

#include <atomic>
#include <thread>

#include "cases.h"

namespace check {
namespace {

// What a rank offers in one round: everybody knows everybody's.
std::vector<float> numbers_of(int rank, int64_t round, int64_t count) {
  Random random(static_cast<uint64_t>(rank + 1000 * round));
  std::vector<float> numbers;
  for (int64_t i = 0; i < count; ++i) numbers.push_back(random.normal());
  return numbers;
}

// Sums in the order of the ranks, all parts on the first, and a message around the stages.
bool run_rank(const SharedRanks& ranks, const quire::SharedSizes& sizes, int rank, int64_t rounds) {
  const Seat seat(ranks, rank);
  const int size = sizes.tensor_size, first = rank / size * size, all = ranks.num_ranks();
  bool is_right = true;
  for (int64_t round = 0; round < rounds; ++round) {
    Random random(static_cast<uint64_t>(round));
    const int64_t count = random.between(0, 60);
    std::vector<std::vector<float>> parts;
    for (int r = 0; r < size; ++r) parts.push_back(numbers_of(first + r, round, count));
    std::vector<float> sum = parts[rank - first], expected = parts[0], together(size * count);
    for (int r = 1; r < size; ++r) {
      for (int64_t i = 0; i < count; ++i) expected[i] += parts[r][i];
    }
    is_right &= quire_comm_reduce(seat.get(), sum.data(), count) == 0;
    is_right &= same_bits(sum.data(), expected.data(), count);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
    is_right &=
        quire_comm_gather(seat.get(), parts[rank - first].data(), bytes, together.data()) == 0;
    for (int r = 0; rank == first && r < size; ++r) {
      is_right &= same_bits(&together[r * count], parts[r].data(), count);
    }
    const std::vector<float> own = numbers_of(rank, round, count);
    const std::vector<float> before = numbers_of((rank - size + all) % all, round, count);
    std::vector<float> received(count);
    is_right &= quire_comm_send(seat.get(), own.data(), bytes) == 0;
    is_right &= quire_comm_receive(seat.get(), received.data(), bytes) == 0;
    is_right &= same_bits(received.data(), before.data(), count);
  }
  return is_right;
}

// Of ranks of which one does not come, the others end; and so does who comes after.
void check_loss(Findings& found) {
  const SharedRanks ranks({3, 1, 16, 64, 4});
  const Seat first(ranks, 0, 0.05), second(ranks, 1, 60);
  std::vector<float> one(4, 1.0f), two(4, 1.0f);
  int status = 0;
  std::thread other([&] { status = quire_comm_reduce(second.get(), two.data(), 4); });
  const int late = quire_comm_reduce(first.get(), one.data(), 4);
  other.join();
  int32_t rank = -1;
  char why[256] = "";
  const int failure = quire_shared_failure(ranks.base(), &rank, why, sizeof why);
  if (late != quire::kRankLate || status != quire::kRankLost || failure != late || rank != 2) {
    found.fail("a rank that does not come is not missed");
  }
}

}  // namespace

void check_ranks(int count, Findings& found) {
  Random random(11);
  for (int i = 0; i < count; ++i) {
    const quire::SharedSizes sizes{
        static_cast<int32_t>(random.between(1, 4)), static_cast<int32_t>(random.between(1, 3)),
        random.one_of<int64_t>({1, 7, 40, 1000}), random.one_of<int64_t>({16, 100, 1000}),
        static_cast<int32_t>(random.between(15, 20))};
    const SharedRanks ranks(sizes);
    std::atomic<bool> is_right{true};
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks.num_ranks(); ++rank) {
      threads.emplace_back([&, rank] {
        if (!run_rank(ranks, sizes, rank, 20)) is_right = false;
      });
    }
    for (std::thread& each : threads) each.join();
    if (!is_right) found.fail("ranks " + std::to_string(i) + ": what they exchange is off");
  }
  check_loss(found);
}

}  // namespace check
