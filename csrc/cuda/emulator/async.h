// What goes on by itself in a block of sm_90: barriers that count bytes, copies of the copy engine, products of warp
// groups, and who may see what was written.
//
//   - A box of the copy engine lands only when no warp can go on without it, pending boxes in an order drawn from the
//     seed; until then its destination holds NaN patterns.
//   - A product reads its operands, registers and shared memory alike, and writes its results at the wait that covers
//     it; until then the results hold NaN patterns.
//   - What cp.async wrote is hidden from products until its thread has executed fence_proxy_async: reading it is an
//     error. (Plain stores are not followed.)
//   - At the end nothing may be in flight, no named barrier half full, and the warps of a group must have issued the
//     same number of products.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace fastops::emulator {

struct Mbarrier {
  int count = 0, pending = 0;  // arrivals a phase takes, and those it still waits for
  int64_t bytes = 0;           // expected and not there yet
  uint32_t phase = 0;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  uint32_t round = 0;
};

struct Box {
  alignas(64) unsigned char map[128];  // a copy: its thread may end first
  int at[4];
  char* to;
  char* bar;
};

// A product of one warp: its 16 rows of the 64.
struct Product {
  float* d[32];             // of each lane
  const uint32_t* a[32];    // registers, or none
  uint64_t tile_a, tile_b;  // in shared memory
  int columns, row0;
  bool add, along_k;  // along_k: b's rows run along k
  float (*number)(uint16_t bits);
};

// Accumulators that products in flight own.
struct Results {
  std::vector<float> number;  // [lane][count]
  int uses = 0;               // products that still have to run
};

struct WarpProducts {
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  std::map<float*, Results> results;  // by the first lane's array
  int64_t issued = 0;
};

// Why reading or the end of a block is wrong; empty: it is not.
class Async {
 public:
  void reset(char* shared, size_t bytes, int warps);
  std::string leftover() const;  // what is still in flight at the end

  std::string init(char* bar, int count);
  std::string arrive(char* bar, int64_t bytes);
  std::string check(const char* bar) const;  // whether there is a barrier
  bool over(const char* bar, uint32_t parity) const;

  NamedBarrier& named(int id) { return named_[id]; }
  std::string arrive_named(int id, int threads);

  std::string load(const Box& box);
  bool deliver(uint64_t random, std::string* error);  // one box; false: there is none

  void written(char* to, int thread) { hidden_[static_cast<size_t>(to - shared_) / 16] = thread + 1; }
  void show(int thread);

  WarpProducts& products(int warp) { return products_[static_cast<size_t>(warp)]; }
  void issue(int warp, const Product& p);
  std::string wait(int warp, size_t newest);

 private:
  std::string run(WarpProducts& w, const Product& p);
  std::string read(uint64_t tile, bool rows_along_k, int row, int k, uint16_t* bits) const;
  std::string complete(char* bar, int64_t bytes);

  char* shared_ = nullptr;
  size_t bytes_ = 0;
  std::map<const char*, Mbarrier> barriers_;
  NamedBarrier named_[16];
  std::vector<Box> boxes_;
  std::vector<int> hidden_;  // of 16 bytes: the thread, plus one, whose copy products must not see yet
  std::vector<WarpProducts> products_;
};

}  // namespace fastops::emulator
