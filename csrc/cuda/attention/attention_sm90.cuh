// Attention for sm_90a: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) on wgmma, with a copy engine.
//
// A block holds 128 rows (query, head of the group) and walks over tiles of 128 keys. One warp group fetches keys and
// values into two stages each; two others own 64 rows each (section 3.1) and multiply.
//
//   shared memory   q [128][dim]   k [2][128][dim]   v [2][128][dim]     in columns of 64 elements, swizzled
//   (layout/tile.h) per tile        s_i = q k_i^T and o += p_i-1 v_i-1 asked for together | s_i there: softmax while
//   the values are still
//                   being multiplied (section 3.2, algorithm 2) | o brought to the new maximum
//
// The two warp groups take turns in asking, so that one computes exponentials while the other's products run (section
// 3.1, ping-pong). Keys come through the copy engine where whole tiles lie in one tensor (dense, ragged), and through
// cp.async where they do not (pages, the end of a ragged sequence): rows that belong to another sequence are never
// read.
#pragma once
#include "cuda/attention/attention_rows.cuh"

namespace fastops::cuda {

struct HopperArgs {
  AttentionArgs a;
  TensorMap k, v;
  bool tma;
};

// Barriers behind the tiles.
struct HopperBarriers {
  Mbarrier full_k[kHopperStages], full_v[kHopperStages], empty_k[kHopperStages], empty_v[kHopperStages];
  int broken;
};

constexpr int kQueryBarrier = 1, kTurnBarrier = 3;  // named; one for each of the two multiplying groups

// The group that fetches: 128 threads.
template <class T, int kDim, class Keys>
struct HopperLoader {
  using Layout = Columns64<kHopperKeys>;
  const HopperArgs& args;
  const BlockRows& block;
  const Keys& keys;
  HopperBarriers& barriers;
  int64_t key_end;
  Mbarrier* landing = nullptr;  // of the tile that cp.async is filling
  bool bad = false;

  FASTOPS_DEVICE void land() {
    if (landing == nullptr) return;
    fence_proxy_async();
    if (bad) barriers.broken = 1;
    mbarrier_arrive(landing);
    landing = nullptr;
  }
  template <bool kValues>
  FASTOPS_DEVICE void tile(T* to, int64_t key0, Mbarrier* full) {
    const AttentionParams& p = args.a.p;
    const Sequence& s = block.found.s;
    if (args.tma && (!p.ragged || key0 + kHopperKeys <= s.Sk)) {
      if (landing != nullptr) {
        cp_async_wait<0>();
        land();
      }
      if (thread_index() == 0) {
        mbarrier_arrive_expect(full, kHopperKeys * kDim * 2);
        FASTOPS_UNROLL
        for (int d = 0; d < kDim; d += 64)
          tma_load(to + d * kHopperKeys, kValues ? &args.v : &args.k, full, d, static_cast<int>(s.k0 + key0),
                   static_cast<int>(block.hkv), p.ragged ? 0 : static_cast<int>(block.b));
      } else {
        mbarrier_arrive(full);
      }
      return;
    }
    const int dim = kValues ? p.Dv : p.D;
    constexpr int kPerRow = kDim / kChunk;
    FASTOPS_UNROLL_BY(2)
    for (int i = thread_index(); i < kHopperKeys * kPerRow; i += 128) {
      const int r = i / kPerRow, c = i % kPerRow;
      bool there = key0 + r < key_end && c * kChunk < dim;
      const T* from = reinterpret_cast<const T*>(p.k);
      if (there) {
        int64_t page = 0;
        there = keys.find(key0 + r, &page);
        if (there)
          from = (kValues ? keys.value(key0 + r, page) : keys.key(key0 + r, page)) + c * kChunk;
        else
          bad = true;
      }
      cp_async16(to + Layout::at(r, c), from, there);
    }
    cp_async_commit();
    if (landing != nullptr) {
      cp_async_wait<1>();
      land();
    }
    landing = full;
  }
};

template <class T, int kDim, class Keys>
FASTOPS_KERNEL(kHopperThreads, 1)
attention_sm90(FASTOPS_ARGUMENT HopperArgs args) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kScores = kHopperKeys / 8, kOut = kDim / 8, kTileSize = kHopperKeys * kDim;
  const AttentionArgs& a = args.a;
  const AttentionParams& p = a.p;
  // The last rows of a causal sequence see the most keys: they come first.
  const BlockRows block(a, a.blocks - 1 - block_x(), kHopperRows);
  if (block.empty()) return;
  T* q = reinterpret_cast<T*>(dynamic_shared());
  T* k = q + kHopperRows * kDim;
  T* v = k + kHopperStages * kTileSize;
  HopperBarriers& barriers = *reinterpret_cast<HopperBarriers*>(v + kHopperStages * kTileSize);
  const int64_t key_begin = block.first.lo, key_end = block.last.hi;
  const int tiles = static_cast<int>(key_end > key_begin ? (key_end - key_begin + kHopperKeys - 1) / kHopperKeys : 0);
  const Keys keys(p, block.found.s, block.b, block.hkv);
  if (thread_index() == 0) {
    for (int i = 0; i < kHopperStages; ++i) {
      mbarrier_init(&barriers.full_k[i], 128);  // threads that fetch
      mbarrier_init(&barriers.full_v[i], 128);
      mbarrier_init(&barriers.empty_k[i], 8);  // warps that multiply
      mbarrier_init(&barriers.empty_v[i], 8);
    }
    barriers.broken = block.found.good ? 0 : 1;
    mbarrier_ready();
  }
  block_sync();

  const int warp_group = uniform(warp_index() / 4);
  if (warp_group == 0) {
    registers_shrink<56>();
    HopperLoader<T, kDim, Keys> load{args, block, keys, barriers, key_end};
    for (int i = 0; i <= tiles; ++i) {  // keys of tile i, then values of the tile before
      if (i < tiles) {
        const int at = i % kHopperStages;
        mbarrier_wait(&barriers.empty_k[at], (i / kHopperStages & 1) ^ 1);
        load.template tile<false>(k + at * kTileSize, key_begin + int64_t{i} * kHopperKeys, &barriers.full_k[at]);
      }
      if (i > 0) {
        const int at = (i - 1) % kHopperStages;
        mbarrier_wait(&barriers.empty_v[at], ((i - 1) / kHopperStages & 1) ^ 1);
        load.template tile<true>(v + at * kTileSize, key_begin + int64_t{i - 1} * kHopperKeys, &barriers.full_v[at]);
      }
    }
    cp_async_wait<0>();
    load.land();
    return;
  }

  registers_grow<224>();
  const int group = warp_group - 1, lane = lane_index();
  const int group_row0 = block.row0 + group * 64, row0 = group_row0 + warp_index() % 4 * 16 + lane / 4;
  const int row[2] = {row0, row0 + 8};
  const int group_end = group_row0 + 64 < block.rows ? group_row0 + 64 : block.rows;
  const Sight sight(a, block, row, block.sees(a, group_row0), block.sees(a, group_end - 1), key_begin);
  {
    constexpr int kPerRow = kDim / kChunk;
    for (int i = thread_index() % 128; i < 64 * kPerRow; i += 128) {
      const int r = group * 64 + i / kPerRow, c = i % kPerRow;
      const int64_t mine = block.row0 + r;
      const bool there = mine < block.rows && c * kChunk < p.D;
      const T* from = reinterpret_cast<const T*>(p.q);
      if (there)
        from = packed_row<T>(p, block.found.s, block.b, block.hkv, mine, p.q, p.q_sb, p.q_ss, p.q_sh) + c * kChunk;
      cp_async16(q + Columns64<kHopperRows>::at(r, c), from, there);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    named_sync(kQueryBarrier + group, 128);
  }

  float x[kScores][4], o[kOut][4], alphas[2];
  uint32_t weights[kScores / 2][4];  // p, as the first operand
  clear(x);
  clear(o);
  RowPair state{{-infinity(), -infinity()}, {0.0f, 0.0f}};
  const auto scores = [&](int i) {  // asks for q k_i^T
    const T* tile = k + i % kHopperStages * kTileSize;
    FASTOPS_UNROLL
    for (int d = 0; d < kDim; d += 16)
      wgmma_ss<T>(x, wgmma_tile(q + d / 64 * 64 * kHopperRows + group * 64 * 64 + d % 64, 0, 1024),
                  wgmma_tile(tile + d / 64 * 64 * kHopperKeys + d % 64, 0, 1024), d > 0);
  };
  const auto values = [&](int i) {  // asks for o += p v_i
    const T* tile = v + i % kHopperStages * kTileSize;
    FASTOPS_UNROLL
    for (int j = 0; j < kHopperKeys; j += 16)
      wgmma_rs<T>(o, weights[j / 16], wgmma_tile(tile + j * 64, kHopperKeys * 128, 1024), true);
  };
  const auto parity = [](int i) { return static_cast<uint32_t>(i / kHopperStages & 1); };
  const auto release = [&](Mbarrier* empty) {
    if (lane == 0) mbarrier_arrive(empty);
  };
  const auto weigh = [&](int i) {  // scores to weights
    modify(a, block.found.s, x, row, block.b, block.hkv, key_begin + i * kHopperKeys + 2 * (lane % 4));
    sight.hide(x, i * kHopperKeys);
    online_softmax<hopper_polynomial(kDim)>(x, a.unit, state, alphas);
  };
  const auto pack = [&] {
    FASTOPS_UNROLL
    for (int j = 0; j < kScores / 2; ++j) {
      FASTOPS_UNROLL
      for (int i = 0; i < 4; ++i)
        weights[j][i] = pack2<T>(x[2 * j + i / 2][i % 2 * 2], x[2 * j + i / 2][i % 2 * 2 + 1]);
    }
  };

  if (tiles == 0) return finish<T>(a, block, row, state, o, barriers.broken != 0);
  if (group == 1) named_arrive(kTurnBarrier, 256);  // the first turn is group 0's
  mbarrier_wait(&barriers.full_k[0], 0);
  named_sync(kTurnBarrier + group, 256);
  wgmma_hold(x);
  wgmma_fence();
  scores(0);
  wgmma_commit();
  if (group == 0 || tiles > 1) named_arrive(kTurnBarrier + 1 - group, 256);
  wgmma_wait<0>();
  wgmma_hold(x);
  release(&barriers.empty_k[0]);
  weigh(0);
  pack();
  for (int i = 1; i < tiles; ++i) {
    mbarrier_wait(&barriers.full_k[i % kHopperStages], parity(i));
    named_sync(kTurnBarrier + group, 256);
    wgmma_hold(x);
    wgmma_hold(o);
    wgmma_fence();
    scores(i);
    wgmma_commit();
    mbarrier_wait(&barriers.full_v[(i - 1) % kHopperStages], parity(i - 1));
    wgmma_fence();
    values(i - 1);
    wgmma_commit();
    if (group == 0 || i + 1 < tiles) named_arrive(kTurnBarrier + 1 - group, 256);
    wgmma_wait<1>();
    wgmma_hold(x);
    release(&barriers.empty_k[i % kHopperStages]);
    weigh(i);
    wgmma_wait<0>();
    wgmma_hold(o);
    release(&barriers.empty_v[(i - 1) % kHopperStages]);
    rescale(o, alphas);
    pack();
  }
  mbarrier_wait(&barriers.full_v[(tiles - 1) % kHopperStages], parity(tiles - 1));
  wgmma_hold(o);
  wgmma_fence();
  values(tiles - 1);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(o);
  finish<T>(a, block, row, state, o, barriers.broken != 0);
#endif
}

}  // namespace fastops::cuda
