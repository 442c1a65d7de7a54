// The host twins of csrc/cuda/arch/mbarrier.cuh, tma.cuh and wgmma.cuh. Links to the PTX ISA stand in those files.
#pragma once
#include "cuda/emulator/vocabulary.h"

namespace fastops::cuda {

using emulator::Thread;

// ---- mbarrier, named barriers, fences
struct alignas(8) Mbarrier {
  uint64_t word;
};
inline void require(const std::string& wrong, Place place) {
  if (wrong.empty()) return;
  Block::current().me().place = place;
  Block::current().fail(wrong);
}
inline char* bytes_of(Mbarrier* bar) { return reinterpret_cast<char*>(bar); }
inline void mbarrier_init(Mbarrier* bar, int arrivals, FASTOPS_PLACE) {
  const Place place{"mbarrier_init", file, line};
  Block::current().check_shared(bar, 8, 8, place);
  require(Block::current().async().init(bytes_of(bar), arrivals), place);
}
inline void mbarrier_ready() {}
inline void mbarrier_arrive(Mbarrier* bar, FASTOPS_PLACE) {
  require(Block::current().async().arrive(bytes_of(bar), 0), {"mbarrier_arrive", file, line});
}
inline void mbarrier_arrive_expect(Mbarrier* bar, uint32_t bytes, FASTOPS_PLACE) {
  require(Block::current().async().arrive(bytes_of(bar), bytes), {"mbarrier_arrive_expect", file, line});
}
inline void mbarrier_wait(Mbarrier* bar, uint32_t parity, FASTOPS_PLACE) {
  const Place place{"mbarrier_wait", file, line};
  require(Block::current().async().check(bytes_of(bar)), place);
  Block::current().wait_until(place, bar, parity, [](Block& block, const void* on, uint32_t value) {
    return block.async().over(static_cast<const char*>(on), value);
  });
}
// ---- clusters
inline int cluster_rank() { return Block::current().rank(); }
inline void cluster_arrive(FASTOPS_PLACE) {
  Block& block = Block::current();
  Thread& me = block.me();
  me.place = {"cluster_arrive", file, line};
  if (me.in_cluster) block.fail("it arrived twice at the cluster's barrier");
  me.in_cluster = true;
  me.cluster_round = block.cluster().round();
  block.cluster().arrive();
}
inline void cluster_wait(FASTOPS_PLACE) {
  Block& block = Block::current();
  const Place place{"cluster_wait", file, line};
  block.me().place = place;
  if (!block.me().in_cluster) block.fail("it waits at the cluster's barrier without having arrived");
  block.me().in_cluster = false;
  block.wait_until(place, &block.cluster(), block.me().cluster_round, [](Block&, const void* on, uint32_t value) {
    return static_cast<const emulator::Cluster*>(on)->round() != value;
  });
}
inline void cluster_sync(FASTOPS_PLACE) {
  cluster_arrive(file, line);
  cluster_wait(file, line);
}
// The same place in the shared memory of another block of the cluster.
inline char* place_in(int rank, void* mine, Block** there, Place place) {
  Block& block = Block::current();
  *there = block.cluster().block(rank);
  block.me().place = place;
  if (*there == nullptr) block.fail("the cluster has no block " + std::to_string(rank));
  if ((*there)->ended()) block.fail("block " + std::to_string(rank) + " of the cluster has ended");
  return (*there)->shared() + (static_cast<char*>(mine) - block.shared());
}
inline void mbarrier_arrive_at(Mbarrier* bar, int rank, FASTOPS_PLACE) {
  const Place place{"mbarrier_arrive_at", file, line};
  Block* there = nullptr;
  char* at = place_in(rank, bar, &there, place);
  require(there->async().arrive(at, 0), place);
}

inline void fence_proxy_async() { Block::current().async().show(thread_index()); }
inline void named_sync(int id, int threads, FASTOPS_PLACE) {
  Block& block = Block::current();
  const Place place{"named_sync", file, line};
  const uint32_t round = id > 0 && id < 16 ? block.async().named(id).round : 0;
  require(block.async().arrive_named(id, threads), place);
  block.wait_until(place, &block.async().named(id), round, [](Block&, const void* on, uint32_t value) {
    return static_cast<const emulator::NamedBarrier*>(on)->round != value;
  });
}
inline void named_arrive(int id, int threads, FASTOPS_PLACE) {
  require(Block::current().async().arrive_named(id, threads), {"named_arrive", file, line});
}

// ---- the copy engine
inline void load_box(Block& to, const TensorMap* map, emulator::Box box, Place place) {
  std::memcpy(box.map, map, sizeof box.map);
  require(to.async().load(box), place);
}
inline void tma_load(void* shared, const TensorMap* map, Mbarrier* bar, int c0, int c1, int c2, int c3, FASTOPS_PLACE) {
  load_box(Block::current(), map, {{}, {c0, c1, c2, c3}, static_cast<char*>(shared), bytes_of(bar)},
           {"tma_load", file, line});
}

// Each block's copy lands at a time of its own.
inline void tma_load_all(void* shared, const TensorMap* map, Mbarrier* bar, uint32_t blocks, int c0, int c1, int c2,
                         int c3, FASTOPS_PLACE) {
  const Place place{"tma_load_all", file, line};
  require(blocks > 0 ? "" : "a copy into no block", place);
  for (int rank = 0; blocks >> rank; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    Block* there = nullptr;
    char* to = place_in(rank, shared, &there, place);
    char* at = place_in(rank, bar, &there, place);
    load_box(*there, map, {{}, {c0, c1, c2, c3}, to, at}, place);
  }
}

// ---- products of warp groups
inline void wgmma_fence() {}
template <int kTiles>
inline void wgmma_hold(float (&)[kTiles][4]) {}
template <int kRegisters>
inline void registers_grow() {}
template <int kRegisters>
inline void registers_shrink() {}
inline uint64_t wgmma_tile(const void* shared, int leading, int stride) {
  const auto at = static_cast<uint64_t>(static_cast<const char*>(shared) - dynamic_shared());
  return at >> 4 | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 | 1ull << 62;
}

struct WgmmaArgs {
  float* d;
  const uint32_t* a;
  uint64_t tile_a, tile_b;
  int columns;
  bool add, along_k;
  float (*number)(uint16_t);
};
template <class T>
inline float number_of(uint16_t bits) {
  T x;
  x.bits = bits;
  return to_f32(x);
}
inline void wgmma(WgmmaArgs args, Place place) {
  Block::current().meet_warp(place, &args, [](void** all) {
    Block& block = Block::current();
    const auto& first = *static_cast<const WgmmaArgs*>(all[0]);
    emulator::Product p{};
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
      const auto& each = *static_cast<const WgmmaArgs*>(all[lane]);
      if (each.tile_a != first.tile_a || each.tile_b != first.tile_b || each.add != first.add)
        return block.give_up("the lanes of a warp give different tiles to a product");
      p.d[lane] = each.d;
      p.a[lane] = each.a;
    }
    const int warp = block.warp();
    p.tile_a = first.tile_a;
    p.tile_b = first.tile_b;
    p.columns = first.columns;
    p.row0 = warp % 4 * 16;
    p.add = first.add;
    p.along_k = first.along_k;
    p.number = first.number;
    block.async().issue(warp, p);
  });
}
template <class T, int kTiles>
inline void wgmma_ss(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool add, FASTOPS_PLACE) {
  wgmma({&d[0][0], nullptr, a, b, kTiles * 8, add, true, &number_of<T>}, {"wgmma_ss", file, line});
}
template <class T, int kTiles>
inline void wgmma_rs(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add, FASTOPS_PLACE) {
  wgmma({&d[0][0], a, 0, b, kTiles * 8, add, false, &number_of<T>}, {"wgmma_rs", file, line});
}
template <class T, int kTiles>
inline void wgmma_rs_along_k(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add, FASTOPS_PLACE) {
  wgmma({&d[0][0], a, 0, b, kTiles * 8, add, true, &number_of<T>}, {"wgmma_rs_along_k", file, line});
}
inline void wgmma_commit(FASTOPS_PLACE) {
  Block::current().meet_warp({"wgmma_commit", file, line}, nullptr, [](void**) {
    auto& w = Block::current().async().products(Block::current().warp());
    w.groups.push_back(std::move(w.open));
    w.open.clear();
  });
}
template <int N>
inline void wgmma_wait(FASTOPS_PLACE) {
  Block::current().meet_warp({"wgmma_wait", file, line}, nullptr, [](void**) {
    const std::string wrong = Block::current().async().wait(Block::current().warp(), N);
    if (!wrong.empty()) Block::current().give_up(wrong);
  });
}

}  // namespace fastops::cuda
