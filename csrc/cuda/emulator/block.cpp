#include "cuda/emulator/block.h"

#include <sys/mman.h>

#include <cstring>
#include <random>

namespace fastops::emulator {
namespace {

thread_local Block* t_block = nullptr;
constexpr size_t kPage = 4096;

std::string at(const Place& p) {
  const char* name = std::strrchr(p.file, '/');
  return std::string(p.what) +
         (p.line ? std::string(" (") + (name ? name + 1 : p.file) + ":" + std::to_string(p.line) + ")" : "");
}

}  // namespace

Block& Block::current() { return *t_block; }

Block::~Block() {
  for (Thread* t : pool_) delete t;
  if (map_ != nullptr) munmap(map_, mapped_);
}

// Shared memory ends at an unreadable page (and begins behind one), so that a plain access outside it stops the
// process.
void Block::reserve_shared(size_t bytes) {
  const size_t need = (bytes + kPage - 1) / kPage * kPage;
  if (mapped_ < need + 2 * kPage) {
    if (map_ != nullptr) munmap(map_, mapped_);
    mapped_ = need + 2 * kPage;
    map_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(map_, kPage, PROT_NONE);
    mprotect(map_ + mapped_ - kPage, kPage, PROT_NONE);
  }
  shared_ = map_ + mapped_ - kPage - (bytes + 127) / 128 * 128;
  shared_bytes_ = bytes;
  std::memset(shared_, 0xff, bytes);
}

std::string Block::places() const {
  std::string s;
  for (int w = 0; w * kWarp < threads_; ++w) {
    s += "\n  warp " + std::to_string(w) + ": ";
    int first = w * kWarp;
    const int end = first + kWarp < threads_ ? first + kWarp : threads_;
    for (int i = first; i < end;) {  // runs of lanes that stand at one place
      int j = i + 1;
      const auto where = [&](int t) {
        return pool_[static_cast<size_t>(t)]->fiber.done() ? std::string("ended")
                                                           : at(pool_[static_cast<size_t>(t)]->place);
      };
      const std::string here = where(i);
      while (j < end && where(j) == here) ++j;
      s += "lanes " + std::to_string(i - first) + " to " + std::to_string(j - 1 - first) + " " + here + "; ";
      i = j;
    }
  }
  return s;
}

void Block::fail(const std::string& why) {
  give_up(why);
  for (;;) Fiber::suspend();  // the block is given up; nobody resumes this thread
}

void Block::give_up(const std::string& why) {
  if (!failed_) {
    failed_ = true;
    message_ = why + ", in block (" + std::to_string(index_.x) + ", " + std::to_string(index_.y) + ", " +
               std::to_string(index_.z) + ") of (" + std::to_string(grid_.x) + ", " + std::to_string(grid_.y) + ", " +
               std::to_string(grid_.z) + ")" + places();
  }
}

void Block::begin(Cluster* cluster, int rank, int threads, size_t shared_bytes, Dim3 index, Dim3 grid,
                  void (*body)(void*), void* arg) {
  cluster_ = cluster;
  rank_ = rank;
  threads_ = threads;
  index_ = index;
  grid_ = grid;
  failed_ = ended_ = false;
  body_ = body;
  arg_ = arg;
  reserve_shared(shared_bytes);
  const int warps = (threads + kWarp - 1) / kWarp;
  state_.assign(static_cast<size_t>(warps), kReady);
  async_.reset(shared_, shared_bytes, warps);
  while (pool_.size() < static_cast<size_t>(threads)) pool_.push_back(new Thread);
  for (int i = 0; i < threads; ++i) {
    Thread& t = *pool_[static_cast<size_t>(i)];
    t.index = i;
    t.place = Place{};
    t.perform = nullptr;
    t.ready = nullptr;
    t.args = nullptr;
    t.in_cluster = false;
    t.open.clear();
    t.groups.clear();
    t.fiber.start(
        [](void* block) {
          auto* b = static_cast<Block*>(block);
          b->body_(b->arg_);
          Thread& me = b->me();
          size_t left = me.open.size();
          for (const auto& g : me.groups) left += g.size();
          if (left > 0)
            b->fail("thread " + std::to_string(me.index) + " ended with " + std::to_string(left) +
                    " cp.async copies that nobody waited for");
        },
        this);
  }
}

bool Block::move(uint64_t random) {
  ready_.clear();
  bool any = false, blocked = false;
  for (size_t w = 0; w < state_.size(); ++w) {
    any = any || state_[w] == kBarrier;
    blocked = blocked || state_[w] == kBlocked;
    if (state_[w] == kReady || (state_[w] == kBlocked && can_go_on(static_cast<int>(w))))
      ready_.push_back(static_cast<int>(w));
  }
  if (ready_.empty() && (blocked || !any)) return false;
  Block* before = t_block;
  t_block = this;
  if (ready_.empty()) {  // every thread that has not ended stands at the barrier
    for (State& s : state_)
      if (s == kBarrier) s = kReady;
  } else {
    const int w = ready_[random % ready_.size()];
    if (run_warp(w)) met(w);
  }
  ended_ = true;
  for (State s : state_) ended_ = ended_ && s == kEnded;
  if (ended_ && !failed_) {
    const std::string left = async_.leftover();
    if (!left.empty()) give_up(left);
  }
  t_block = before;
  return true;
}

// What the lanes of a warp that ran have come to.
void Block::met(int warp) {
  State& state = state_[static_cast<size_t>(warp)];
  const int first = warp * kWarp, end = first + kWarp < threads_ ? first + kWarp : threads_;
  int ended = 0;
  bool together = true;
  Thread* lead = nullptr;
  for (int i = first; i < end; ++i) {
    Thread& t = *pool_[static_cast<size_t>(i)];
    if (t.fiber.done()) {
      ++ended;
      continue;
    }
    if (lead == nullptr) lead = &t;
    together = together && t.place.same(lead->place) && t.perform == lead->perform && t.ready == lead->ready &&
               t.on == lead->on && t.value == lead->value;
  }
  if (ended == end - first) {
    state = kEnded;
  } else if (!together || (lead->perform != nullptr && ended > 0)) {
    failed_ = true;
    message_ = "lanes of warp " + std::to_string(warp) + " do not meet" + places();
  } else if (lead->ready != nullptr) {
    state = kBlocked;
  } else if (lead->perform == nullptr) {
    state = kBarrier;
  } else {
    state = kReady;
    warp_ = warp;
    void* args[kWarp] = {};
    for (int i = first; i < end; ++i) args[i - first] = pool_[static_cast<size_t>(i)]->args;
    lead->perform(args);
  }
}

Cluster& Cluster::mine() {
  static thread_local Cluster cluster;
  return cluster;
}

Cluster::~Cluster() {
  for (Block* b : pool_) delete b;
}

bool Cluster::run(int blocks, int threads, size_t shared_bytes, Dim3 first, Dim3 grid, uint64_t seed,
                  void (*body)(void*), void* arg) {
  while (pool_.size() < static_cast<size_t>(blocks)) pool_.push_back(new Block);
  blocks_ = blocks;
  arrived_ = 0;
  all_ = blocks * threads;
  round_ = 0;
  std::vector<Block*> going(pool_.begin(), pool_.begin() + blocks), asked;
  for (int i = 0; i < blocks; ++i)
    pool_[static_cast<size_t>(i)]->begin(this, i, threads, shared_bytes, {first.x + i, first.y, first.z}, grid, body,
                                         arg);
  std::mt19937_64 random(seed * 0x9e3779b97f4a7c15ull +
                         static_cast<uint64_t>(first.x + 7919 * first.y + 104729 * first.z));
  // A block drawn by the seed moves; where none can, a copy lands; where there is none, it is over.
  const auto step = [&]() -> Block* {
    for (asked = going; !asked.empty();) {
      const size_t i = blocks > 1 ? random() % asked.size() : 0;
      if (asked[i]->move(random())) return asked[i];
      asked.erase(asked.begin() + static_cast<std::ptrdiff_t>(i));
    }
    for (asked = going; !asked.empty();) {
      const size_t i = blocks > 1 ? random() % asked.size() : 0;
      std::string wrong;
      if (asked[i]->async_.deliver(random(), &wrong)) {
        if (!wrong.empty()) asked[i]->give_up(wrong);
        return asked[i];
      }
      asked.erase(asked.begin() + static_cast<std::ptrdiff_t>(i));
    }
    std::string others;
    for (size_t i = 1; i < going.size(); ++i)
      others += "\n block " + std::to_string(going[i]->index_.x) + ":" + going[i]->places();
    going[0]->give_up("deadlock: every warp waits");
    going[0]->message_ += others;
    return going[0];
  };
  while (!going.empty()) {
    Block* moved = step();
    if (moved->failed()) {
      message_ = moved->message();
      return false;
    }
    for (size_t i = 0; i < going.size(); ++i)
      if (going[i]->ended()) going.erase(going.begin() + static_cast<std::ptrdiff_t>(i--));
  }
  return true;
}

void Cluster::arrive() {
  if (++arrived_ < all_) return;
  arrived_ = 0;
  ++round_;
}

// Each lane up to where it has to meet others, or its end.
bool Block::run_warp(int warp) {
  const int first = warp * kWarp, end = first + kWarp < threads_ ? first + kWarp : threads_;
  for (int i = first; i < end; ++i) {
    Thread& t = *pool_[static_cast<size_t>(i)];
    if (t.fiber.done()) continue;
    running_ = &t;
    t.fiber.resume();
    if (failed_) return false;
  }
  return true;
}

// Every lane of a blocked warp may.
bool Block::can_go_on(int warp) {
  const int first = warp * kWarp, end = first + kWarp < threads_ ? first + kWarp : threads_;
  for (int i = first; i < end; ++i) {
    const Thread& t = *pool_[static_cast<size_t>(i)];
    if (!t.fiber.done() && !t.ready(*this, t.on, t.value)) return false;
  }
  return true;
}

void Block::wait_until(Place place, const void* on, uint32_t value, Ready ready) {
  Thread& t = me();
  t.place = place;
  t.perform = nullptr;
  t.ready = ready;
  t.on = on;
  t.value = value;
  Fiber::suspend();
  running_ = &t;
}

void Block::meet_warp(Place place, void* args, void (*perform)(void** args)) {
  Thread& t = me();
  t.place = place;
  t.ready = nullptr;
  t.on = nullptr;
  t.value = 0;
  t.args = args;
  t.perform = perform;
  Fiber::suspend();
  running_ = &t;
}

void Block::meet_block(Place place) { meet_warp(place, nullptr, nullptr); }

void Block::check_shared(const void* at, size_t bytes, size_t align, Place place) {
  const char* p = static_cast<const char*>(at);
  me().place = place;
  if (p < shared_ || p + bytes > shared_ + shared_bytes_)
    fail(std::string(place.what) + ": shared address " + std::to_string(p - shared_) + " outside the " +
         std::to_string(shared_bytes_) + " bytes of the block");
  if (static_cast<size_t>(p - shared_) % align != 0)
    fail(std::string(place.what) + ": shared address " + std::to_string(p - shared_) + " is not a multiple of " +
         std::to_string(align));
}

void Block::copy(char* to, const char* from, Place place) {
  check_shared(to, 16, 16, place);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail(std::string(place.what) + ": the global address is not a multiple of 16");
  std::memset(to, 0xff, 16);  // until it lands
  me().open.push_back({to, from});
}

void Block::commit() {
  Thread& t = me();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void Block::wait(size_t newest) {
  auto& groups = me().groups;
  while (groups.size() > newest) {
    for (const Copy& c : groups.front()) {
      if (c.from != nullptr) {
        std::memcpy(c.to, c.from, 16);
      } else {
        std::memset(c.to, 0, 16);
      }
      async_.written(c.to, me().index);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace fastops::emulator
