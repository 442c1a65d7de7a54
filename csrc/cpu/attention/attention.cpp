// The attention C API on the CPU: plan the work items, lay out the workspace, run them on the injected threads.
#include "cpu/attention/attention.h"

#include <cstring>
#include <limits>

#include "core/parallel.h"
#include "core/status.h"
#include "core/attention_check.h"
#include "cpu/attention/merge.h"

namespace fastops::cpu {

namespace {

// Everything below depends on shapes, lengths and the machine's cores: results must not change with the number of
// threads.
constexpr int64_t kKeyStep = 64;         // a split begins and ends at multiples of it,
constexpr double kLeastSplit = 512.0;    // costs at least so much (item_cost), or has 256 keys,
constexpr double kGoodSplit = 1500.0;    // and so much where every core has one;
constexpr double kWholeCall = 2000.0;    // calls of less are not split
constexpr int64_t kSerialWork = 300000;  // multiply-adds under which waking a thread costs more than it saves

// Bytes for all partial results (fastops.h promises them).
int64_t partial_room(int64_t cores) { return cores < 4 ? 384 << 10 : cores < 512 ? cores << 17 : 64 << 20; }

// Rows of a packed item, at most: as many as keep q and the accumulator within about 300 KiB (a part of L2), because
// packing a K/V tile is paid once per item.
constexpr int32_t kLeastBlock = 96;  // they are a multiple of it
int32_t most_block_rows(int D, int Dv) {
  const int d = D > Dv ? D : Dv;
  return d <= 64 ? 480 : d <= 128 ? 288 : 192;
}

struct Plan {
  int64_t items = 0;         // work items, in the order of item_at()
  int64_t partial_rows = 0;  // rows of partial results
  int64_t work = 0;          // multiply-adds, roughly
  int64_t max_rows = 0;
};

// KV heads of an item: with more groups of rows fewer, a power of two, so that lanes padded to whole vectors fit as
// well.
int64_t heads_of(const AttentionParams& p, const Sequence& s) {
  if (!is_direct(p, s)) return 1;
  int64_t most = kDirectHeads;
  while (most > 1 && most * s.Sq * p.G > kDirectRows * kDirectHeads) most /= 2;
  return p.direct_heads < most ? p.direct_heads : most;
}

int64_t blocks_of(const AttentionParams& p, const Sequence& s) { return ceil_div(s.Sq * p.G, p.block_rows); }

int64_t head_groups_of(const AttentionParams& p, const Sequence& s) { return ceil_div(p.Hkv, heads_of(p, s)); }

// The keys that the queries of a sequence see together; lo in steps of splits.
KeyRange keys_seen(const AttentionParams& p, const Sequence& s) {
  if (s.Sq < 1) return {0, 0};
  const KeyRange first = visible_keys(p, s, 0), last = visible_keys(p, s, s.Sq - 1);
  return {first.lo / kKeyStep * kKeyStep, last.hi > first.lo ? last.hi : first.lo};
}

// What a sequence costs over `keys` keys, and what its largest item does, in rows of K and V read: 16 rows of q take as
// long as reading does, and 40 as long as packing.
double cost_of(const AttentionParams& p, const Sequence& s, int64_t keys, int64_t blocks, int64_t rows, int64_t heads) {
  const double fixed = is_direct(p, s) ? 1.0 : 2.5;
  return static_cast<double>(keys * heads) * (static_cast<double>(blocks) * fixed + static_cast<double>(rows) / 16.0);
}
double sequence_cost(const AttentionParams& p, const Sequence& s, int64_t keys) {
  return cost_of(p, s, keys, blocks_of(p, s), s.Sq * p.G, p.Hkv);
}
double item_cost(const AttentionParams& p, const Sequence& s, int64_t keys) {
  const int64_t rows = s.Sq * p.G < p.block_rows ? s.Sq * p.G : p.block_rows;
  return cost_of(p, s, keys, 1, rows, heads_of(p, s));
}

// Bytes of a partial result of one query, all heads.
int64_t row_bytes(const AttentionParams& p) { return p.Hq * (p.Dv + 1) * static_cast<int64_t>(sizeof(float)); }

// As many splits as `span` keys of a sequence may have: for shorter ones, beginning an item and merging its result cost
// too much.
int64_t most_splits(const AttentionParams& p, const Sequence& s, int64_t span) {
  const int64_t least = static_cast<int64_t>(kLeastSplit / item_cost(p, s, 1)) / kKeyStep * kKeyStep + kKeyStep;
  const int64_t fit = p.partial_room / (s.Sq * row_bytes(p)), most = span / (least < 256 ? least : 256);
  return fit < most ? fit : most;
}

// The splits of a sequence's items: `count` of `keys` keys each, from `first` on.
struct Splits {
  int64_t first, keys, count;
};

Splits splits_of(const AttentionParams& p, const Sequence& s) {
  if (p.split_cost == 0.0 || s.Sq < 1) return {0, s.Sk, 1};
  const KeyRange seen = keys_seen(p, s);
  const int64_t span = seen.hi - seen.lo, most = most_splits(p, s, span);
  const double wanted = item_cost(p, s, span) / p.split_cost - 0.25;  // up to 1.25 of the cost stay whole
  int64_t n = wanted < static_cast<double>(most) ? static_cast<int64_t>(wanted) : most;
  n += n < most && static_cast<double>(n) < wanted;
  if (n <= 1) return {0, s.Sk, 1};
  const int64_t keys = ceil_div(ceil_div(span, n), kKeyStep) * kKeyStep;
  return {seen.lo, keys, ceil_div(span, keys)};
}

// The cost of a split, 0 for none, when a call has `base` items of at least `least`, at most `most`, `total` together.
double split_cost(int64_t cores, int64_t base, double least, double most, double total) {
  if (cores == 1 || total < kWholeCall || (base >= 4 * cores && most * static_cast<double>(2 * cores) <= total))
    return 0.0;
  const double share = total / static_cast<double>(cores);
  if (most > 1.25 * least) return share / 4.0 > kGoodSplit ? share / 4.0 : share < kGoodSplit ? share : kGoodSplit;
  const int64_t enough = share / 2.0 >= kGoodSplit ? 2 * cores : cores;
  int64_t n = 1;  // all alike: the smallest number of splits with which every core has as many, or many enough
  while (base * n < enough || (base * n % cores != 0 && base * n < 2 * enough)) ++n;
  return n == 1 ? 0.0 : most / static_cast<double>(n);
}

// The time until the last of `cores` cores is done, about, with blocks of p.block_rows rows.
double time_with_blocks(const AttentionParams& p, int64_t cores) {
  int64_t items = 0;
  double total = 0.0, longest = 0.0;
  for (int64_t b = 0; b < p.B; ++b) {
    const Sequence s = sequence(p, b);
    const KeyRange seen = keys_seen(p, s);
    const int64_t span = seen.hi - seen.lo, n = blocks_of(p, s) * head_groups_of(p, s);
    if (span == 0) continue;
    int64_t splits = most_splits(p, s, span);
    if (splits > ceil_div(2 * cores, n)) splits = ceil_div(2 * cores, n);
    if (splits < 1 || n >= 4 * cores) splits = 1;
    const double item = item_cost(p, s, span) / static_cast<double>(splits);
    longest = item > longest ? item : longest;
    total += sequence_cost(p, s, span);
    items += n * splits;
  }
  return items <= cores ? longest : total / static_cast<double>(cores) + longest / 2.0;
}

// What the plan in p comes to, and (when given) the prefix sums of items and partial rows per sequence.
Plan count_items(const AttentionParams& p, int64_t* item_prefix = nullptr, int64_t* partial_prefix = nullptr) {
  Plan plan;
  for (int64_t b = 0; b < p.B; ++b) {
    const Sequence s = sequence(p, b);
    if (item_prefix) item_prefix[b] = plan.items;
    if (partial_prefix) partial_prefix[b] = plan.partial_rows;
    const int64_t n = splits_of(p, s).count;
    plan.items += blocks_of(p, s) * head_groups_of(p, s) * n;
    if (n > 1) plan.partial_rows += n * s.Sq * p.Hq;
    if (s.Sq * p.G > plan.max_rows) plan.max_rows = s.Sq * p.G;
    plan.work += s.Sq * s.Sk;
  }
  plan.work *= p.Hq * (p.D + p.Dv);
  if (item_prefix) item_prefix[p.B] = plan.items;
  if (partial_prefix) partial_prefix[p.B] = plan.partial_rows;
  return plan;
}

// Fills the plan of p.
Plan make_plan(AttentionParams& p, int64_t cores) {
  p.block_rows = most_block_rows(p.D, p.Dv);
  p.split_cost = 0.0;
  p.partial_room = partial_room(cores);
  // Heads that lie next to each other are read as one stream (attention_modes.inl.h, Direct).
  const int64_t k_row = p.D / kv_channels(p.kq.kind, 1), v_row = p.Dv / kv_channels(p.vq.kind, 1);
  const bool adjacent = p.k_sh == k_row && p.v_sh == v_row && p.k_ss >= p.Hkv * k_row && p.v_ss >= p.Hkv * v_row;
  int64_t neighbours = kDirectHeads;
  if (p.quant && kDecodedFloats / kDecodedKeys / (p.D + p.Dv) < neighbours)
    neighbours = kDecodedFloats / kDecodedKeys / (p.D + p.Dv);
  p.direct_heads = adjacent && p.Hkv > 1 ? static_cast<int32_t>(p.Hkv < neighbours ? p.Hkv : neighbours) : 1;
  int64_t max_rows = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t rows = sequence(p, b).Sq * p.G;
    max_rows = rows > max_rows ? rows : max_rows;
  }
  const int32_t most_rows = p.block_rows;
  double best = max_rows > kLeastBlock && cores > 1 ? time_with_blocks(p, cores) : 0.0;
  for (int32_t rows = most_rows - kLeastBlock; best > 0.0 && rows >= kLeastBlock; rows -= kLeastBlock) {
    const int32_t before = p.block_rows;
    p.block_rows = rows;
    const double time = time_with_blocks(p, cores);
    if (time < best)
      best = time;
    else
      p.block_rows = before;
  }
  int64_t items = 0;
  double least = 0.0, most = 0.0, total = 0.0;
  for (int64_t b = 0; b < p.B; ++b) {
    const Sequence s = sequence(p, b);
    const KeyRange seen = keys_seen(p, s);
    const double cost = item_cost(p, s, seen.hi - seen.lo);
    if (cost == 0.0) continue;
    const int64_t n = blocks_of(p, s) * head_groups_of(p, s);
    least = items == 0 || cost < least ? cost : least;
    most = cost > most ? cost : most;
    total += sequence_cost(p, s, seen.hi - seen.lo);
    items += n;
  }
  p.split_cost = split_cost(cores, items, least, most, total);
  Plan plan = count_items(p);
  while (plan.partial_rows * (p.Dv + 1) * static_cast<int64_t>(sizeof(float)) > p.partial_room) {
    p.split_cost *= 2.0;
    plan = count_items(p);
  }
  return plan;
}

int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Workspace: item prefix | partial prefix | partial out | partial lse | one scratch per worker.
struct Layout {
  int64_t item_prefix, partial_prefix, partial_out, partial_lse, scratch, scratch_bytes, total;
  Layout(const AttentionParams& p, const Plan& plan, int workers) {
    int64_t at = 0;
    auto take = [&at](int64_t bytes) {
      const int64_t here = at;
      at += align64(bytes);
      return here;
    };
    const int64_t direct = kDirectRows * kDirectHeads;
    const int64_t rows = plan.max_rows <= kSharedRows || p.block_rows < direct ? direct : p.block_rows;
    item_prefix = take((p.B + 1) * 8);
    partial_prefix = take((p.B + 1) * 8);
    partial_out = take(plan.partial_rows * p.Dv * 4);
    partial_lse = take(plan.partial_rows * 4);
    const int64_t few = attention_scratch(p, static_cast<int>(direct)).total;
    const int64_t most = attention_scratch(p, static_cast<int>(rows)).total;
    scratch_bytes = align64((few > most ? few : most) * 4);
    scratch = take(scratch_bytes * workers);
    total = at;
  }
};

int workers_of(const fastops_env* env, const Plan& plan) {
  if (env == nullptr || env->parallel_for == nullptr || env->num_threads <= 1 || plan.work < kSerialWork) return 1;
  return static_cast<int>(env->num_threads < plan.items ? env->num_threads : (plan.items > 0 ? plan.items : 1));
}

// Item i of the call. Within a sequence the last query blocks come first: causal ones see the most keys.
AttentionItem item_at(const AttentionParams& p, int64_t i, const int64_t* item_prefix, const int64_t* partial_prefix,
                      float* partial_out, float* partial_lse) {
  int64_t lo = 0, hi = p.B - 1;  // the last sequence whose prefix is <= i and that has items
  while (lo < hi) {
    const int64_t mid = (lo + hi + 1) / 2;
    if (item_prefix[mid] <= i) {
      lo = mid;
    } else {
      hi = mid - 1;
    }
  }
  const Sequence s = sequence(p, lo);
  const Splits cut = splits_of(p, s);
  const int64_t blocks = blocks_of(p, s), splits = cut.count, rows = s.Sq * p.G;
  int64_t rest = i - item_prefix[lo];
  AttentionItem it{};
  it.b = lo;
  const int64_t split = rest % splits;
  rest /= splits;
  const int64_t groups = head_groups_of(p, s), step = heads_of(p, s);
  it.hkv = rest % groups * step;
  it.heads = p.Hkv - it.hkv < step ? p.Hkv - it.hkv : step;
  const int64_t block = blocks - 1 - rest / groups;
  it.row0 = block * p.block_rows;
  it.rows = rows - it.row0 < p.block_rows ? rows - it.row0 : p.block_rows;
  it.key0 = cut.first + split * cut.keys;
  it.key1 = split + 1 == splits ? s.Sk : it.key0 + cut.keys;
  if (splits > 1) {  // partials of a sequence: [kv head][split][rows]
    const int64_t slot = partial_prefix[lo] + (it.hkv * splits + split) * rows + it.row0;
    it.partial_out = partial_out + slot * p.Dv;
    it.partial_lse = partial_lse + slot;
    it.partial_step = splits * rows;
  }
  return it;
}

int64_t element_size(int32_t dtype) { return dtype == FASTOPS_F32 ? 4 : 2; }

// Part `part` of `parts` of the rows of a sequence's KV head.
void merge_sequence(const AttentionParams& p, const AttentionTable& table, int64_t b, int64_t hkv, int64_t part,
                    int64_t parts, const int64_t* partial_prefix, const float* partial_out, const float* partial_lse) {
  const Sequence s = sequence(p, b);
  const int64_t splits = splits_of(p, s).count, rows = s.Sq * p.G;
  if (splits < 2) return;
  const int64_t base = partial_prefix[b] + hkv * splits * rows;
  for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
    const int64_t qi = s.q0 + r / p.G, head = hkv * p.G + r % p.G;
    const auto state = [&](int64_t i) {
      const int64_t row = base + i * rows + r;
      return MergeInput{reinterpret_cast<const char*>(partial_out + row * p.Dv), partial_lse[row]};
    };
    const float lse =
        merge_row(table, splits, state, FASTOPS_F32, p.Dv, p.sinks ? p.sinks + head * p.sinks_stride : nullptr,
                  p.out + (b * p.o_sb + qi * p.o_ss + head * p.o_sh) * element_size(p.out_dtype), p.out_dtype);
    if (p.lse) p.lse[b * p.lse_sb + head * p.lse_sh + qi * p.lse_ss] = lse;
  }
}

// Rows of a ragged q behind the last sequence belong to no one: 0 and -inf, so that padded batches stay clean.
void clear_tail(const AttentionParams& p, int64_t total_rows) {
  if (p.cu_q == nullptr) return;
  for (int64_t i = p.cu_q[p.B * p.cu_q_stride]; i < total_rows; ++i)
    for (int64_t h = 0; h < p.Hq; ++h) {
      std::memset(p.out + (i * p.o_ss + h * p.o_sh) * element_size(p.out_dtype), 0,
                  static_cast<size_t>(p.Dv * element_size(p.out_dtype)));
      if (p.lse) p.lse[h * p.lse_sh + i * p.lse_ss] = -std::numeric_limits<float>::infinity();
    }
}

}  // namespace
}  // namespace fastops::cpu

using namespace fastops;
using namespace fastops::cpu;

extern "C" fastops_status fastops_attention_check(const fastops_attention_desc* desc, char* message) {
  AttentionParams p;
  return check_attention(*desc, &p, message);
}

extern "C" fastops_status fastops_attention_workspace(const fastops_attention_desc* desc, const fastops_env* env,
                                                      size_t* bytes) {
  AttentionParams p;
  const fastops_status status = check_attention(*desc, &p, env ? env->message : nullptr);
  if (status != FASTOPS_OK) return status;
  const Plan plan = make_plan(p, plan_cores());
  *bytes = static_cast<size_t>(Layout(p, plan, workers_of(env, plan)).total);
  return FASTOPS_OK;
}

extern "C" fastops_status fastops_attention_fwd(const fastops_attention_desc* desc, fastops_env* env) {
  AttentionParams p;
  const fastops_status status = check_attention(*desc, &p, env->message);
  if (status != FASTOPS_OK) return status;
  const char* refusal = isa_refusal();
  if (refusal == nullptr) refusal = plan_refusal();
  if (refusal != nullptr) {
    set_message(env->message, "%s", refusal);
    return FASTOPS_ERR_UNSUPPORTED;
  }
  const int64_t cores = plan_cores();  // once: it may be set meanwhile
  const Plan plan = make_plan(p, cores);
  const int workers = workers_of(env, plan);
  const Layout at(p, plan, workers);
  if (static_cast<int64_t>(env->workspace_size) < at.total || env->workspace == nullptr) {
    set_message(env->message, "attention: workspace has %zu bytes, needs %lld", env->workspace_size,
                static_cast<long long>(at.total));
    return FASTOPS_ERR_WORKSPACE;
  }
  const auto variant = FASTOPS_CHOOSE_ANY(AttentionTable, attention_table);
  const AttentionTable& table = variant.table;
  env->variant = variant.name;
  char* ws = static_cast<char*>(env->workspace);
  auto* item_prefix = reinterpret_cast<int64_t*>(ws + at.item_prefix);
  auto* partial_prefix = reinterpret_cast<int64_t*>(ws + at.partial_prefix);
  auto* partial_out = reinterpret_cast<float*>(ws + at.partial_out);
  auto* partial_lse = reinterpret_cast<float*>(ws + at.partial_lse);
  count_items(p, item_prefix, partial_prefix);
  fastops_env inner = *env;
  inner.num_threads = workers;
  parallel_items(inner, plan.items, [&](int64_t i, int worker) {
    const auto item = [&](int64_t k) { return item_at(p, k, item_prefix, partial_prefix, partial_out, partial_lse); };
    AttentionItem now = item(i), next{};
    if (i + 1 < plan.items) {
      next = item(i + 1);
      now.then = &next;
    }
    table.item(p, now, reinterpret_cast<float*>(ws + at.scratch + worker * at.scratch_bytes));
  });
  if (plan.partial_rows > 0) {
    const int64_t heads = p.B * p.Hkv, wish = ceil_div(4 * cores, heads);
    const int64_t parts = wish < plan.max_rows ? wish : plan.max_rows;
    parallel_items(inner, heads * parts, [&](int64_t i, int) {
      const int64_t head = i / parts;
      merge_sequence(p, table, head / p.Hkv, head % p.Hkv, i % parts, parts, partial_prefix, partial_out, partial_lse);
    });
  }
  clear_tail(p, desc->q.size[0]);
  return FASTOPS_OK;
}
