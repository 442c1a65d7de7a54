#include "cuda/emulator/async.h"

#include <cstring>

#include "cuda/tensor_map.h"

namespace fastops::emulator {
namespace {

// Rows of 128 bytes, 16-byte chunks exchanged by the number of the row: bits 4 to 6 of an address with bits 7 to 9.
int64_t swizzle(int64_t at) { return at ^ ((at >> 7 & 7) << 4); }

void phase_over(Mbarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.count;
  ++b.phase;
}

}  // namespace

void Async::reset(char* shared, size_t bytes, int warps) {
  shared_ = shared;
  bytes_ = bytes;
  barriers_.clear();
  boxes_.clear();
  for (NamedBarrier& n : named_) n = NamedBarrier{};
  hidden_.assign(bytes / 16 + 1, 0);
  products_.assign(static_cast<size_t>(warps), WarpProducts{});
}

std::string Async::leftover() const {
  if (!boxes_.empty()) return "it ended with a copy of the copy engine in flight";
  for (int i = 0; i < 16; ++i)
    if (named_[i].arrived != 0) return "it ended with named barrier " + std::to_string(i) + " half full";
  for (size_t w = 0; w < products_.size(); ++w) {
    if (!products_[w].open.empty() || !products_[w].groups.empty())
      return "warp " + std::to_string(w) + " ended with products that nobody waited for";
    if (products_[w].issued != products_[w / 4 * 4].issued)
      return "warps of group " + std::to_string(w / 4) + " issued different numbers of products";
  }
  return "";
}

std::string Async::init(char* bar, int count) {
  if (count < 1) return "mbarrier_init: " + std::to_string(count) + " arrivals";
  barriers_[bar] = Mbarrier{count, count, 0, 0};
  return "";
}

std::string Async::check(const char* bar) const {
  return barriers_.count(bar) ? "" : "there is no mbarrier at shared address " + std::to_string(bar - shared_);
}

std::string Async::arrive(char* bar, int64_t bytes) {
  const std::string wrong = check(bar);
  if (!wrong.empty()) return wrong;
  Mbarrier& b = barriers_[bar];
  if (b.pending == 0) return "more arrivals than the mbarrier's phase takes";
  b.bytes += bytes;
  --b.pending;
  phase_over(b);
  return "";
}

std::string Async::complete(char* bar, int64_t bytes) {
  const std::string wrong = check(bar);
  if (!wrong.empty()) return wrong;
  Mbarrier& b = barriers_[bar];
  b.bytes -= bytes;
  phase_over(b);
  return "";
}

bool Async::over(const char* bar, uint32_t parity) const {
  const auto found = barriers_.find(bar);
  return found != barriers_.end() && (found->second.phase & 1) != parity;
}

std::string Async::arrive_named(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32 != 0) return "a named barrier is 1 to 15, of whole warps";
  NamedBarrier& n = named_[id];
  if (n.arrived > 0 && n.threads != threads)
    return "named barrier " + std::to_string(id) + " of " + std::to_string(threads) + " and of " +
           std::to_string(n.threads) + " threads";
  n.threads = threads;
  if (++n.arrived == threads) {
    n.arrived = 0;
    ++n.round;
  }
  return "";
}

std::string Async::load(const Box& box) {
  cuda::TensorShape shape;
  std::memcpy(&shape, box.map, sizeof shape);
  const int64_t bytes = int64_t{128} * shape.rows;
  const int64_t at = box.to - shared_;
  if (at < 0 || at + bytes > static_cast<int64_t>(bytes_) || at % 1024 != 0)
    return "tma_load: shared address " + std::to_string(at) + " is outside the block's, or no multiple of 1024";
  const std::string wrong = check(box.bar);
  if (!wrong.empty()) return wrong;
  std::memset(box.to, 0xff, static_cast<size_t>(bytes));
  boxes_.push_back(box);
  return "";
}

bool Async::deliver(uint64_t random, std::string* error) {
  if (boxes_.empty()) return false;
  const size_t which = random % boxes_.size();
  const Box box = boxes_[which];
  boxes_.erase(boxes_.begin() + static_cast<std::ptrdiff_t>(which));
  cuda::TensorShape shape;
  std::memcpy(&shape, box.map, sizeof shape);
  for (int row = 0; row < shape.rows; ++row) {
    const int64_t place[4] = {box.at[0], box.at[1] + row, box.at[2], box.at[3]};
    bool inside = true;
    int64_t from = 0;
    for (int i = 1; i < 4; ++i) {
      inside = inside && place[i] >= 0 && place[i] < shape.size[i];
      from += place[i] * shape.step[i - 1];
    }
    for (int column = 0; column < 64; ++column) {
      const int64_t c = place[0] + column;
      uint16_t bits = 0;
      if (inside && c >= 0 && c < shape.size[0]) bits = static_cast<const uint16_t*>(shape.base)[from + c];
      std::memcpy(shared_ + swizzle(box.to - shared_ + row * 128 + column * 2), &bits, 2);
    }
  }
  for (int64_t i = 0; i < 8 * shape.rows; ++i) hidden_[static_cast<size_t>((box.to - shared_) / 16 + i)] = 0;
  *error = complete(box.bar, int64_t{128} * shape.rows);
  return true;
}

void Async::show(int thread) {
  for (int& h : hidden_)
    if (h == thread + 1) h = 0;
}

void Async::issue(int warp, const Product& p) {
  WarpProducts& w = products(warp);
  const auto count = static_cast<size_t>(p.columns / 2);
  Results& r = w.results[p.d[0]];
  if (r.uses++ == 0) {
    r.number.resize(32 * count);
    for (size_t lane = 0; lane < 32; ++lane) {
      std::memcpy(&r.number[lane * count], p.d[lane], count * sizeof(float));
      std::memset(p.d[lane], 0xff, count * sizeof(float));
    }
  }
  w.open.push_back(p);
  ++w.issued;
}

std::string Async::wait(int warp, size_t newest) {
  WarpProducts& w = products(warp);
  while (w.groups.size() > newest) {
    for (const Product& p : w.groups.front()) {
      std::string wrong = run(w, p);
      if (!wrong.empty()) return wrong;
    }
    w.groups.erase(w.groups.begin());
  }
  return "";
}

// An element of an operand in shared memory; row: of a, or the column of b.
std::string Async::read(uint64_t tile, bool rows_along_k, int row, int k, uint16_t* bits) const {
  const auto field = [&](int shift) { return static_cast<int64_t>(tile >> shift & 0x3fff) << 4; };
  if (tile >> 62 != 1) return "a tile that is not swizzled by 128 bytes";
  const int64_t leading = field(16), stride = field(32);
  int64_t at = field(0);
  if (rows_along_k)
    at += row / 8 * stride + row % 8 * 128 + k * 2;
  else
    at += row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2;
  at = swizzle(at);
  if (at < 0 || at + 2 > static_cast<int64_t>(bytes_))
    return "a product reads shared address " + std::to_string(at) + " outside the block's";
  if (const int by = hidden_[static_cast<size_t>(at / 16)])
    return "a product reads what cp.async of thread " + std::to_string(by - 1) + " wrote, without fence_proxy_async";
  std::memcpy(bits, shared_ + at, 2);
  return "";
}

std::string Async::run(WarpProducts& w, const Product& p) {
  std::vector<float> A(16 * 16), B(static_cast<size_t>(p.columns) * 16);
  std::string wrong;
  uint16_t bits = 0;
  for (int row = 0; row < 16 && wrong.empty(); ++row)
    for (int k = 0; k < 16 && wrong.empty(); ++k) {
      if (p.a[0] != nullptr) {  // as mma_m16n8k16's a
        const int i = row / 8 + k / 8 * 2, lane = row % 8 * 4 + k % 8 / 2;
        bits = static_cast<uint16_t>(p.a[lane][i] >> (k % 2 * 16));
      } else {
        wrong = read(p.tile_a, true, p.row0 + row, k, &bits);
      }
      A[static_cast<size_t>(row * 16 + k)] = p.number(bits);
    }
  for (int n = 0; n < p.columns && wrong.empty(); ++n)
    for (int k = 0; k < 16 && wrong.empty(); ++k) {
      wrong = read(p.tile_b, p.along_k, n, k, &bits);
      B[static_cast<size_t>(n * 16 + k)] = p.number(bits);
    }
  if (!wrong.empty()) return wrong;
  const auto count = static_cast<size_t>(p.columns / 2);
  Results& r = w.results[p.d[0]];
  for (size_t lane = 0; lane < 32; ++lane)
    for (size_t i = 0; i < count; ++i) {
      const size_t row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = 0.0f;
      for (size_t k = 0; k < 16; ++k) sum += A[row * 16 + k] * B[column * 16 + k];
      float& d = r.number[lane * count + i];
      d = p.add ? d + sum : sum;
    }
  if (--r.uses == 0) {
    for (size_t lane = 0; lane < 32; ++lane) std::memcpy(p.d[lane], &r.number[lane * count], count * sizeof(float));
    w.results.erase(p.d[0]);
  }
  return "";
}

}  // namespace fastops::emulator
