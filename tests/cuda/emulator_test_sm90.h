// The part of emulator_test.cpp for sm_90, inside its namespace: the copy engine, barriers that count bytes, products
// of warp groups.
#pragma once

// Where the 128-byte swizzle of the PTX ISA's tensor-map figure puts 16-byte chunk c of row r: row 1 begins with chunk
// 1, row 2 with chunk 2, ..., row 8 again with chunk 0. Bytes from the tile's beginning.
int swizzled(int r, int c) { return r * 128 + ((c ^ (r % 8)) * 16); }

struct TmaArgs {
  TensorMap map;
  uint16_t* out;  // 16 rows of 64
  int c0, c1, c2, c3, mistake;
};
void tma_kernel(TmaArgs a) {
  char* tile = dynamic_shared();
  auto* bar = reinterpret_cast<Mbarrier*>(tile + 16 * 128);
  if (thread_index() == 0) {
    mbarrier_init(bar, 2);
    mbarrier_ready();
  }
  block_sync();
  if (thread_index() == 0) {
    mbarrier_arrive_expect(bar, a.mistake == 2 ? 4096 : 2048);
    tma_load(a.mistake == 3 ? tile + 512 : tile, &a.map, bar, a.c0, a.c1, a.c2, a.c3);
  }
  if (thread_index() == 32 && a.mistake != 4) mbarrier_arrive(bar);
  if (a.mistake != 1) mbarrier_wait(bar, 0);
  for (int i = thread_index(); i < 1024; i += 64)
    a.out[i] = *reinterpret_cast<uint16_t*>(tile + swizzled(i / 64, i % 64 / 8) + i % 8 * 2);
  if (a.mistake == 1) mbarrier_wait(bar, 0);
}
void test_tma() {
  // [2][3][20][72] elements: 10000 d3 + 1000 d2 + 40 d1 + d0 as numbers of 16 bits.
  alignas(16) static uint16_t from[2 * 3 * 20 * 72];
  for (int d3 = 0; d3 < 2; ++d3)
    for (int d2 = 0; d2 < 3; ++d2)
      for (int d1 = 0; d1 < 20; ++d1)
        for (int d0 = 0; d0 < 72; ++d0)
          from[((d3 * 3 + d2) * 20 + d1) * 72 + d0] = static_cast<uint16_t>(20000 * d3 + 5000 * d2 + 80 * d1 + d0);
  TmaArgs a{};
  const fastops_cuda_env env{};
  EXPECT(tensor_map({from, {72, 20, 3, 2}, {72, 20 * 72, 3 * 20 * 72}, 16}, &env, &a.map), "no map");
  EXPECT(!tensor_map({from, {72, 20, 3, 2}, {71, 20 * 72, 3 * 20 * 72}, 16}, &env, &a.map), "rows of 142 bytes");
  EXPECT(tensor_map({from, {72, 20, 3, 2}, {72, 20 * 72, 3 * 20 * 72}, 16}, &env, &a.map), "no map");
  uint16_t out[1024];
  a.out = out;
  a.c2 = 2;
  a.c3 = 1;
  for (int c1 : {0, 7, -3})
    for (int c0 : {0, 64}) {
      a.c0 = c0;
      a.c1 = c1;
      const Outcome o = start<tma_kernel>(a, 64, 3072, static_cast<uint64_t>(c1 + 5));
      EXPECT(o.status == FASTOPS_OK, "%s", o.message.c_str());
      for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 64; ++c) {
          const bool inside = c1 + r >= 0 && c1 + r < 20 && c0 + c < 72;
          const int want = inside ? (20000 + 10000 + 80 * (c1 + r) + c0 + c) % 65536 : 0;
          EXPECT(out[r * 64 + c] == want, "box at %d, %d: row %d column %d is %d, not %d", c0, c1, r, c,
                 out[r * 64 + c], want);
        }
    }
  a.c0 = a.c1 = 0;
  a.mistake = 1;  // read before the wait: NaN patterns
  start<tma_kernel>(a, 64, 3072);
  EXPECT(out[0] == 0xffff && out[1000] == 0xffff, "the box landed before anybody waited: %x", out[0]);
  a.mistake = 2;
  expect_failure("bytes", start<tma_kernel>(a, 64, 3072), "deadlock: every warp waits");
  a.mistake = 3;
  expect_failure("crooked", start<tma_kernel>(a, 64, 3072), "no multiple of 1024");
  a.mistake = 4;
  expect_failure("arrivals", start<tma_kernel>(a, 64, 3072), "lanes 0 to 31 mbarrier_wait (emulator_test_sm90.h:");
}

// d of one product: a [64][16] and b [16][64] as numbers, from shared memory (ss) or with a in registers (rs).
struct WgmmaTest {
  const float *a, *b;  // [64][16], [64 columns][16]
  float* out;          // [64][64]
  bool registers;
  int mistake;
};
void put(char* at, float x) {
  bf16 y;
  narrow(x, &y);
  std::memcpy(at, &y, 2);
}
void wgmma_kernel(WgmmaTest t) {
  char *a = dynamic_shared(), *b = a + 64 * 128;
  for (int i = thread_index(); i < 64 * 16; i += 128) {
    const int r = i / 16, k = i % 16;
    put(a + swizzled(r, 2 + k / 8) + k % 8 * 2, t.a[i]);  // columns 16 to 31 of the tile: 32 bytes into each row
    if (t.registers)
      put(b + swizzled(k, r / 8) + r % 8 * 2, t.b[i]);  // rows along n
    else
      put(b + swizzled(r, k / 8) + k % 8 * 2, t.b[i]);  // rows along k
  }
  fence_proxy_async();
  block_sync();
  const int lane = lane_index(), row = warp_index() * 16 + lane / 4, k = lane % 4 * 2;
  uint32_t x[4];
  const auto pair = [&](int r, int c) { return pack2<bf16>(t.a[r * 16 + c], t.a[r * 16 + c + 1]); };
  x[0] = pair(row, k);
  x[1] = pair(row + 8, k);
  x[2] = pair(row, k + 8);
  x[3] = pair(row + 8, k + 8);
  float d[8][4];
  for (auto& n : d)
    for (float& y : n) y = 100.0f;
  for (int twice = 0; twice < 2; ++twice) {
    wgmma_fence();
    if (t.registers)
      wgmma_rs<bf16>(d, x, wgmma_tile(b, 64 * 128, 1024), true);
    else
      wgmma_ss<bf16>(d, wgmma_tile(a + 32, 0, 1024), wgmma_tile(b, 0, 1024), twice > 0);
    wgmma_commit();
  }
  if (t.mistake == 1 && d[0][0] != d[0][0]) x[0] = 0;  // results in flight are NaN; operands are still needed
  if (t.mistake != 2) wgmma_wait<0>();
  for (int n = 0; n < 8; ++n)
    for (int i = 0; i < 4; ++i) t.out[(row + i / 2 * 8) * 64 + 8 * n + k + i % 2] = d[n][i];
}
void test_wgmma() {
  float a[64 * 16], b[64 * 16], out[64 * 64];
  for (int i = 0; i < 64 * 16; ++i) {
    a[i] = static_cast<float>(i * 7 % 13) - 6.0f;
    b[i] = static_cast<float>(i * 5 % 11) - 5.0f;
  }
  for (int registers = 0; registers < 2; ++registers) {
    const Outcome o = start<wgmma_kernel>(WgmmaTest{a, b, out, registers == 1, 0}, 128, 17 * 1024);
    EXPECT(o.status == FASTOPS_OK, "%s", o.message.c_str());
    for (int m = 0; m < 64; ++m)
      for (int n = 0; n < 64; ++n) {
        float want = registers ? 100.0f : 0.0f;  // twice the product; ss forgets what stood there
        for (int k = 0; k < 16; ++k) want += 2.0f * a[m * 16 + k] * b[n * 16 + k];
        EXPECT(out[m * 64 + n] == want, "%s: row %d column %d is %g, not %g", registers ? "rs" : "ss", m, n,
               static_cast<double>(out[m * 64 + n]), static_cast<double>(want));
      }
  }
  const Outcome changed = start<wgmma_kernel>(WgmmaTest{a, b, out, true, 1}, 128, 17 * 1024);
  EXPECT(changed.status == FASTOPS_OK, "%s", changed.message.c_str());
  float clean = 100.0f, without = 100.0f;  // operands are read at the wait: the change below it shows
  for (int k = 0; k < 16; ++k) {
    clean += 2.0f * a[k] * b[k];
    if (k > 7) without += 2.0f * a[k] * b[k];
  }
  EXPECT(clean != without && out[0] == without, "an operand changed in flight: %g", static_cast<double>(out[0]));
  expect_failure("unwaited", start<wgmma_kernel>(WgmmaTest{a, b, out, false, 2}, 128, 17 * 1024),
                 "warp 0 ended with products that nobody waited for");
  EXPECT(out[0] != out[0], "results were there before the wait: %g", static_cast<double>(out[0]));
}

struct FenceTest {
  const uint16_t* from;
  float* out;
  bool fence;
};
void fence_kernel(FenceTest t) {
  char* tile = dynamic_shared();
  for (int i = thread_index(); i < 512; i += 128) cp_async16(tile + i * 16, t.from + i * 8, true);
  cp_async_commit();
  cp_async_wait<0>();
  if (t.fence) fence_proxy_async();
  block_sync();
  float d[8][4] = {};
  wgmma_fence();
  wgmma_ss<bf16>(d, wgmma_tile(tile, 0, 1024), wgmma_tile(tile, 0, 1024), false);
  wgmma_commit();
  wgmma_wait<0>();
  t.out[thread_index()] = d[0][0];
}
void test_fence() {
  alignas(16) static uint16_t from[4096];
  float out[128];
  EXPECT(start<fence_kernel>(FenceTest{from, out, true}, 128, 8192).status == FASTOPS_OK, "with the fence");
  expect_failure("fence", start<fence_kernel>(FenceTest{from, out, false}, 128, 8192), "without fence_proxy_async");
}

struct TurnTest {
  int* out;
  int mistake;
};
// Two groups of two warps write in turns.
void turn_kernel(TurnTest t) {
  const int group = warp_index() / 2;
  auto* next = reinterpret_cast<int*>(dynamic_shared());
  if (thread_index() == 0) *next = 0;
  block_sync();
  if (group == 1) named_arrive(1, 128);
  for (int i = 0; i < 4; ++i) {
    named_sync(1 + group, 128);
    if (thread_index() % 64 == 0) t.out[(*next)++] = group;
    if (group == 0 || i < 3 || t.mistake == 1) named_arrive(2 - group, 128);
  }
}
void test_named() {
  int out[8];
  for (uint64_t seed = 0; seed < 8; ++seed) {
    const Outcome o = start<turn_kernel>(TurnTest{out, 0}, 128, 128, seed);
    EXPECT(o.status == FASTOPS_OK, "%s", o.message.c_str());
    for (int i = 0; i < 8; ++i) EXPECT(out[i] == i % 2, "turn %d was %d's", i, out[i]);
  }
  expect_failure("left over", start<turn_kernel>(TurnTest{out, 1}, 128, 128), "named barrier 1 half full");
}

struct ClusterArgs {
  TensorMap map;  // boxes of 8 rows
  uint16_t* out;  // [blocks][8 rows a block][64]
  int blocks, mistake;
};
// Every block fetches eight rows for all; each tells the others when it has read what came, `rounds` times over.
void cluster_kernel(ClusterArgs a) {
  char* tile = dynamic_shared();
  auto* full = reinterpret_cast<Mbarrier*>(tile + a.blocks * 1024);
  auto* empty = full + 1;
  const int rank = cluster_rank(), words = a.blocks * 512;
  if (thread_index() == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, a.blocks);
    mbarrier_ready();
  }
  if (a.mistake == 1)
    block_sync();
  else
    cluster_sync();
  for (int round = 0; round < 3; ++round) {
    if (thread_index() == 0) {
      mbarrier_arrive_expect(full, static_cast<uint32_t>(a.blocks * 1024));
      tma_load_all(tile + rank * 1024, &a.map, full, (1u << a.blocks) - 1, 0, round * a.blocks * 8 + rank * 8, 0, 0);
    }
    mbarrier_wait(full, round & 1);
    uint16_t* out = a.out + (block_x() * 3 + round) * words;
    for (int i = thread_index(); i < words; i += 64)
      out[i] = *reinterpret_cast<uint16_t*>(tile + swizzled(i / 64, i % 64 / 8) + i % 8 * 2);
    block_sync();
    if (thread_index() == 0)
      for (int to = 0; to < a.blocks + (a.mistake == 3); ++to) mbarrier_arrive_at(empty, to);
    if (a.mistake != 4 && (a.mistake != 2 || round < 2)) mbarrier_wait(empty, round & 1);
  }
  if (a.mistake == 2) return;
  if (a.mistake != 5) cluster_arrive();
  cluster_wait();
}
void test_cluster() {
  alignas(16) static uint16_t from[96 * 64];
  for (int i = 0; i < 96 * 64; ++i) from[i] = static_cast<uint16_t>(i * 7);
  uint16_t out[8 * 3 * 4 * 512];
  const fastops_cuda_env env{};
  ClusterArgs a{};
  EXPECT(tensor_map({from, {64, 96, 1, 1}, {64, 8, 8}, 8}, &env, &a.map), "no map");
  a.out = out;
  const auto run = [&](int blocks, int mistake, uint64_t seed, int grid) {
    a.blocks = blocks;
    a.mistake = mistake;
    char message[FASTOPS_MESSAGE_SIZE] = "";
    fastops_cuda_env e{};
    e.struct_size = sizeof e;
    e.message = message;
    e.seed = seed;
    const auto shared = static_cast<size_t>(blocks) * 1024 + 64;
    const fastops_status status = launch<cluster_kernel>({grid, 1, 1, 64, shared, blocks}, &e, a);
    return Outcome{status, message};
  };
  for (int blocks : {1, 2, 4})
    for (uint64_t seed = 0; seed < 8; ++seed) {
      const Outcome o = run(blocks, 0, seed, 2 * blocks);
      EXPECT(o.status == FASTOPS_OK, "%d blocks: %s", blocks, o.message.c_str());
      for (int b = 0; b < 2 * blocks; ++b)
        for (int i = 0; i < 3 * blocks * 512; ++i)
          EXPECT(out[b * 3 * blocks * 512 + i] == from[i], "block %d of %d: word %d is %d, not %d", b, blocks, i,
                 out[b * 3 * blocks * 512 + i], from[i]);
    }
  // Each mistake shows, for some order of the warps at least.
  const char* says[] = {"", "there is no mbarrier",  "block 1 of the cluster has ended", "the cluster has no block 2",
                        "", "without having arrived"};
  for (int mistake = 1; mistake <= 5; ++mistake) {
    bool seen = false;
    for (uint64_t seed = 0; seed < 32 && !seen; ++seed) {
      const Outcome o = run(2, mistake, seed, 2);
      if (mistake == 4)  // a box for the next round comes over the one that is being read
        for (int i = 0; i < 6 * 1024; ++i) seen = seen || out[i] != from[i % (3 * 1024)];
      else
        seen = o.message.find(says[mistake]) != std::string::npos;
    }
    EXPECT(seen, "mistake %d passes, or says: %s", mistake, run(2, mistake, 0, 2).message.c_str());
  }
  EXPECT(run(2, 0, 0, 3).status == FASTOPS_ERR_INTERNAL, "three blocks in clusters of two");
}

// The layout that the copy engine writes and products read.
void test_columns64() {
  using L = Columns64<128>;
  for (int r = 0; r < 128; ++r)
    for (int c = 0; c < 16; ++c)
      EXPECT(L::at(r, c) * 2 == c / 8 * 128 * 128 + swizzled(r, c % 8), "row %d chunk %d at %d", r, c, L::at(r, c));
}
