// A cluster of blocks of CUDA threads on the host (most clusters are one block): fibers, warps that meet at
// collectives, shared memory, copies in flight.
//
// What makes wrong programs fail here, as they may on a GPU:
//   - warps take turns in an order drawn from a seed, and each runs until it has to meet others;
//   - shared memory begins as NaN patterns, and a cp.async makes its destination one until the wait that covers it;
//   - copies land only at that wait, in the thread that waits: others need a barrier to see them;
//   - lanes of a warp that meet at different places, a warp that ends while others wait for it, copies nobody waited
//     for, addresses outside shared memory and deadlocks are errors, and each names where every warp stands.
// What sm_90 adds (async.h) keeps the same promises.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/emulator/async.h"
#include "cuda/emulator/fiber.h"

namespace fastops::emulator {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

struct Dim3 {
  int64_t x = 1, y = 1, z = 1;
};

// Where a thread stands: the name of what it waits for and the line of the kernel that says so.
struct Place {
  const char* what = "start";
  const char* file = "";
  int line = 0;
  bool same(const Place& o) const { return what == o.what && file == o.file && line == o.line; }
};

struct Copy {
  char* to;
  const char* from;  // nullptr: zeros
};

class Block;
class Cluster;
using Ready = bool (*)(Block& block, const void* on, uint32_t value);

struct Thread {
  Fiber fiber;
  int index = 0;
  Place place;
  void* args = nullptr;                    // of the collective it waits at
  void (*perform)(void** args) = nullptr;  // what the whole warp then does; nullptr: a barrier of the block
  Ready ready = nullptr;                   // when it may go on, where it waits for neither
  const void* on = nullptr;
  uint32_t value = 0;
  bool in_cluster = false;  // it has arrived at the cluster's barrier and not waited there
  uint32_t cluster_round = 0;
  std::vector<Copy> open;                 // copies of the group being gathered
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

class Block {
 public:
  static Block& current();  // of the running fiber

  // Threads that will run body(arg).
  void begin(Cluster* cluster, int rank, int threads, size_t shared_bytes, Dim3 index, Dim3 grid, void (*body)(void*),
             void* arg);
  // Lets one warp, drawn by `random`, go as far as it can. False: none could, and ended() or waits for others.
  bool move(uint64_t random);
  bool ended() const { return ended_; }
  bool failed() const { return failed_; }
  const std::string& message() const { return message_; }

  // For the vocabulary, from within a thread.
  Thread& me() { return *running_; }
  int threads() const { return threads_; }
  const Dim3& index() const { return index_; }
  char* shared() { return shared_; }
  Cluster& cluster() { return *cluster_; }
  int rank() const { return rank_; }  // in the cluster
  void meet_warp(Place place, void* args, void (*perform)(void** args));
  void meet_block(Place place);
  void wait_until(Place place, const void* on, uint32_t value, Ready ready);
  Async& async() { return async_; }
  int warp() const { return warp_; }  // the one that performs a collective
  void check_shared(const void* at, size_t bytes, size_t align, Place place);
  void copy(char* to, const char* from, Place place);
  void commit();
  void wait(size_t newest);
  [[noreturn]] void fail(const std::string& why);
  void give_up(const std::string& why);  // from within a collective

  ~Block();

 private:
  void reserve_shared(size_t bytes);
  bool run_warp(int warp);
  bool can_go_on(int warp);
  void met(int warp);
  friend class Cluster;
  std::string places() const;

  enum State { kReady, kBarrier, kBlocked, kEnded };
  std::vector<Thread*> pool_;
  std::vector<State> state_;  // of each warp
  std::vector<int> ready_;    // warps that can go on
  Cluster* cluster_ = nullptr;
  int rank_ = 0;
  int threads_ = 0;
  Dim3 index_, grid_;
  char* shared_ = nullptr;
  size_t shared_bytes_ = 0, mapped_ = 0;
  char* map_ = nullptr;
  Thread* running_ = nullptr;
  Async async_;
  int warp_ = 0;
  void (*body_)(void*) = nullptr;
  void* arg_ = nullptr;
  bool failed_ = false, ended_ = false;
  std::string message_;
};

// Blocks that run at the same time.
class Cluster {
 public:
  // This host thread's, for all kernels: the stacks of fibers are many mappings, of which a process may have some
  // 65000.
  static Cluster& mine();
  ~Cluster();

  // Runs body(arg) on `blocks` blocks, `first` and its neighbours along x. False: message() says what went wrong.
  bool run(int blocks, int threads, size_t shared_bytes, Dim3 first, Dim3 grid, uint64_t seed, void (*body)(void*),
           void* arg);
  const std::string& message() const { return message_; }

  // For the vocabulary.
  Block* block(int rank) { return rank >= 0 && rank < blocks_ ? pool_[static_cast<size_t>(rank)] : nullptr; }
  void arrive();
  uint32_t round() const { return round_; }

 private:
  std::vector<Block*> pool_;
  int blocks_ = 0, arrived_ = 0, all_ = 0;
  uint32_t round_ = 0;
  std::string message_;
};

}  // namespace fastops::emulator
