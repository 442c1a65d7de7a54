// The attention C API on the CPU: plan the work items, lay out the workspace, run them on the injected threads.
#include "cpu/attention/attention.h"

#include <cstring>
#include <limits>

#include "core/isa.h"
#include "core/parallel.h"
#include "core/status.h"
#include "core/attention_check.h"
#include "cpu/attention/merge.h"

namespace fastops::cpu {

const AttentionTable& attention_table_for(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::amx:
      return amx::attention_table;
    case Isa::amx_emu:
      return amx_emu::attention_table;
    case Isa::avx512_bf16:
      return avx512_bf16::attention_table;
    case Isa::avx512:
      return avx512::attention_table;
    case Isa::avx2:
      return avx2::attention_table;
    default:
      return scalar::attention_table;
  }
#else
  (void)isa;
  return scalar::attention_table;
#endif
}

namespace {

// Everything below depends on shapes, lengths and the machine's cores: results must not change with the number of
// threads.
constexpr int64_t kFewItems = 16;  // below this, blocks of query rows become smaller
constexpr int64_t kKeyStep = 64;   // a split begins and ends at multiples of it,
constexpr int64_t kMinSplitKeys = 256;
constexpr int64_t kPartialBudget = 384 << 10;  // bytes for all partial results
constexpr int64_t kSerialWork = 300000;        // multiply-adds under which waking a thread costs more than it saves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a packed item: as many as keep q and the accumulator within about 300 KiB (a part of L2), because packing a
// K/V tile is paid once per item.
int32_t block_rows_for(int D, int Dv) {
  const int d = D > Dv ? D : Dv;
  return d <= 64 ? 480 : d <= 128 ? 288 : 192;
}

struct Plan {
  int64_t items = 0;         // work items, in the order of item_at()
  int64_t partial_rows = 0;  // rows of partial results
  int64_t work = 0;          // multiply-adds, roughly
  int64_t max_rows = 0;
};

bool is_direct(const AttentionParams& p, const Sequence& s) { return s.Sq * p.G <= kDirectRows; }

int64_t blocks_of(const AttentionParams& p, const Sequence& s) { return ceil_div(s.Sq * p.G, p.block_rows); }

int64_t head_groups_of(const AttentionParams& p, const Sequence& s) {
  return is_direct(p, s) ? ceil_div(p.Hkv, p.direct_heads) : p.Hkv;
}

// The keys that the queries of a sequence see together; lo in steps of splits.
KeyRange keys_seen(const AttentionParams& p, const Sequence& s) {
  if (s.Sq < 1) return {0, 0};
  const KeyRange first = visible_keys(p, s, 0), last = visible_keys(p, s, s.Sq - 1);
  return {first.lo / kKeyStep * kKeyStep, last.hi > first.lo ? last.hi : first.lo};
}

// What an item over `keys` keys of a sequence costs, in rows of K and V read: 16 rows of q take as long as reading
// does.
double item_cost(const AttentionParams& p, const Sequence& s, int64_t keys) {
  const int64_t rows = s.Sq * p.G < p.block_rows ? s.Sq * p.G : p.block_rows;
  const int64_t heads = !is_direct(p, s) ? 1 : p.Hkv < p.direct_heads ? p.Hkv : p.direct_heads;
  return static_cast<double>(keys) * static_cast<double>(heads) * (1.0 + static_cast<double>(rows) / 16.0);
}

// The splits of a sequence's items: `count` of `keys` keys each, from `first` on.
struct Splits {
  int64_t first, keys, count;
};

Splits splits_of(const AttentionParams& p, const Sequence& s) {
  if (p.split_cost == 0.0 || s.Sq * p.G > p.block_rows) return {0, s.Sk, 1};
  const KeyRange seen = keys_seen(p, s);
  const int64_t span = seen.hi - seen.lo, most = span / kMinSplitKeys;
  const double wanted = item_cost(p, s, span) / p.split_cost - 0.25;  // up to 1.25 of the cost stay whole
  int64_t n = wanted < static_cast<double>(most) ? static_cast<int64_t>(wanted) : most;
  n += n < most && static_cast<double>(n) < wanted;
  if (n <= 1) return {0, s.Sk, 1};
  const int64_t keys = ceil_div(ceil_div(span, n), kKeyStep) * kKeyStep;
  return {seen.lo, keys, ceil_div(span, keys)};
}

// The cost of a split, 0 for none, when a call has `base` items of at least `least`, at most `most`, `total` together.
double split_cost(int64_t cores, int64_t base, double least, double most, double total) {
  if (base == 0 || cores == 1 || (base >= 4 * cores && most * static_cast<double>(2 * cores) <= total)) return 0.0;
  if (most > 1.25 * least) return total / static_cast<double>(4 * cores);
  int64_t n = 1;  // all alike: the smallest number of splits with which every core has as many, or many enough
  while (base * n < 2 * cores || (base * n % cores != 0 && base * n < 4 * cores)) ++n;
  return n == 1 ? 0.0 : most / static_cast<double>(n);
}

// Fills p.block_rows and p.split_cost, and (when given) the prefix sums of items and partial rows per sequence.
Plan make_plan(AttentionParams& p, int64_t cores, int64_t* item_prefix = nullptr, int64_t* partial_prefix = nullptr) {
  Plan plan;
  p.block_rows = block_rows_for(p.D, p.Dv);
  p.split_cost = 0.0;
  int64_t max_rows = 0, visible = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    const Sequence s = sequence(p, b);
    if (s.Sq * p.G > max_rows) max_rows = s.Sq * p.G;
    visible += s.Sq * s.Sk;
  }
  plan.max_rows = max_rows;
  plan.work = visible * p.Hq * (p.D + p.Dv);
  // Heads that lie next to each other are read as one stream (attention_modes.inl.h, Direct).
  const int64_t k_row = p.D / kv_channels(p.kq.kind, 1), v_row = p.Dv / kv_channels(p.vq.kind, 1);
  const bool adjacent = p.k_sh == k_row && p.v_sh == v_row && p.k_ss >= p.Hkv * k_row && p.v_ss >= p.Hkv * v_row;
  int64_t neighbours = kDirectHeads;
  if (p.quant && kDecodedFloats / kDecodedKeys / (p.D + p.Dv) < neighbours)
    neighbours = kDecodedFloats / kDecodedKeys / (p.D + p.Dv);
  p.direct_heads = adjacent && p.Hkv > 1 ? static_cast<int32_t>(p.Hkv < neighbours ? p.Hkv : neighbours) : 1;
  auto base_items = [&p] {
    int64_t n = 0;
    for (int64_t b = 0; b < p.B; ++b) {
      const Sequence s = sequence(p, b);
      n += blocks_of(p, s) * head_groups_of(p, s);
    }
    return n;
  };
  int64_t base = base_items();
  while (base < kFewItems && p.block_rows > 96 && max_rows > 96) {  // smaller blocks share out better
    p.block_rows = p.block_rows / 2 >= 96 ? p.block_rows / 2 / 96 * 96 : 96;
    base = base_items();
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
    total += cost * static_cast<double>(n);
    items += n;
  }
  auto partial_bytes = [&p] {
    int64_t rows = 0;
    for (int64_t b = 0; b < p.B; ++b) {
      const Sequence s = sequence(p, b);
      const int64_t n = splits_of(p, s).count;
      if (n > 1) rows += n * s.Sq * p.Hq;
    }
    return rows * (p.Dv + 1) * static_cast<int64_t>(sizeof(float));
  };
  p.split_cost = split_cost(cores, items, least, most, total);
  while (p.split_cost > 0.0 && partial_bytes() > kPartialBudget) p.split_cost *= 2.0;
  for (int64_t b = 0; b < p.B; ++b) {
    const Sequence s = sequence(p, b);
    if (item_prefix) item_prefix[b] = plan.items;
    if (partial_prefix) partial_prefix[b] = plan.partial_rows;
    const int64_t n = splits_of(p, s).count;
    plan.items += blocks_of(p, s) * head_groups_of(p, s) * n;
    if (n > 1) plan.partial_rows += n * s.Sq * p.Hq;
  }
  if (item_prefix) item_prefix[p.B] = plan.items;
  if (partial_prefix) partial_prefix[p.B] = plan.partial_rows;
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
    const int64_t rows = plan.max_rows <= kDirectRows || p.block_rows < direct ? direct : p.block_rows;
    item_prefix = take((p.B + 1) * 8);
    partial_prefix = take((p.B + 1) * 8);
    partial_out = take(plan.partial_rows * p.Dv * 4);
    partial_lse = take(plan.partial_rows * 4);
    scratch_bytes =
        align64(attention_scratch(p.D, p.Dv, static_cast<int>(rows), attention_key_tile(p.D, p.Dv), p.quant).total * 4);
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
  const int64_t groups = head_groups_of(p, s), step = is_direct(p, s) ? p.direct_heads : 1;
  it.hkv = rest % groups * step;
  it.heads = p.Hkv - it.hkv < step ? p.Hkv - it.hkv : step;
  const int64_t block = blocks - 1 - rest / groups;
  it.row0 = block * p.block_rows;
  it.rows = rows - it.row0 < p.block_rows ? rows - it.row0 : p.block_rows;
  it.key0 = cut.first + split * cut.keys;
  it.key1 = split + 1 == splits ? s.Sk : it.key0 + cut.keys;
  if (splits > 1) {  // partials of a sequence: [kv head][split][rows]
    const int64_t slot = partial_prefix[lo] + (it.hkv * splits + split) * rows;
    it.partial_out = partial_out + slot * p.Dv;
    it.partial_lse = partial_lse + slot;
    it.partial_step = splits * rows;
  }
  return it;
}

int64_t element_size(int32_t dtype) { return dtype == FASTOPS_F32 ? 4 : 2; }

void merge_sequence(const AttentionParams& p, const AttentionTable& table, int64_t b, int64_t hkv,
                    const int64_t* partial_prefix, const float* partial_out, const float* partial_lse) {
  const Sequence s = sequence(p, b);
  const int64_t splits = splits_of(p, s).count, rows = s.Sq * p.G;
  const int64_t base = partial_prefix[b] + hkv * splits * rows;
  for (int64_t r = 0; r < rows; ++r) {
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
  const Isa isa = active_isa();
  const AttentionTable& table = attention_table_for(isa);
  env->variant = isa_name(isa);
  char* ws = static_cast<char*>(env->workspace);
  auto* item_prefix = reinterpret_cast<int64_t*>(ws + at.item_prefix);
  auto* partial_prefix = reinterpret_cast<int64_t*>(ws + at.partial_prefix);
  auto* partial_out = reinterpret_cast<float*>(ws + at.partial_out);
  auto* partial_lse = reinterpret_cast<float*>(ws + at.partial_lse);
  make_plan(p, cores, item_prefix, partial_prefix);
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
    parallel_items(inner, p.B * p.Hkv, [&](int64_t i, int) {
      if (splits_of(p, sequence(p, i / p.Hkv)).count > 1)
        merge_sequence(p, table, i / p.Hkv, i % p.Hkv, partial_prefix, partial_out, partial_lse);
    });
  }
  clear_tail(p, desc->q.size[0]);
  return FASTOPS_OK;
}
