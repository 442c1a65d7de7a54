// Rotary embedding on a GPU, after an RMS norm of each head where weights are given, and straight into a paged cache:
// one pass over q, k and v. Heads are taken 16 bytes a thread where the whole head turns and its pieces are a power of
// two (a head of 128 takes 8 threads), and by a warp, element by element, otherwise.
#include "core/op_checks.h"
#include "core/rows.h"
#include "cuda/launch.h"
#include "cuda/layout/row.h"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;

struct RopeTensor {
  Rows in, out;
  char* cache;
  const void* weight;
  int64_t in_step, out_step, cache_page, cache_slot, cache_step;  // bytes
  int32_t heads, dim;
  bool weight_f32;
};
struct RopeArgs {
  RopeTensor part[3];  // q, k, v
  Rows cos, sin, positions;
  const int64_t* slots;
  int64_t tokens, places, slot_count, page;  // places: tokens of a sequence
  int64_t angle_rows;
  int32_t heads, half, angle_dtype, lanes;
  float eps, offset;
  bool interleaved, inverse, per_place, positions_per_place, positions64;
};

// Where one head of a token comes from and goes to.
struct RopeHead {
  const char* in;
  char *out, *cached;
  const RopeTensor* part;
  bool turns;
  int64_t angle;  // -1: outside cos and sin
};

FASTOPS_DEVICE RopeHead rope_head(const RopeArgs& a, int64_t token, int head) {
  int i = 0;
  while (head >= a.part[i].heads) head -= a.part[i++].heads;
  const RopeTensor& p = a.part[i];
  RopeHead h{
      p.in.at(token) + head * p.in_step, p.out ? p.out.at(token) + head * p.out_step : nullptr, nullptr, &p, i < 2, 0};
  if (a.slots && i > 0) {
    const int64_t slot = a.slots[token];
    if (slot >= 0 && slot < a.slot_count)
      h.cached = p.cache + slot / a.page * p.cache_page + slot % a.page * p.cache_slot + head * p.cache_step;
  }
  if (a.positions) {
    const char* at = a.positions.at(a.positions_per_place ? token % a.places : token);
    h.angle = a.positions64 ? *reinterpret_cast<const int64_t*>(at) : *reinterpret_cast<const int32_t*>(at);
    if (h.angle < 0 || h.angle >= a.angle_rows) h.angle = -1;
  } else {
    h.angle = a.per_place ? token % a.places : token;
  }
  return h;
}

}  // namespace

// a.lanes threads for each head, a power of two up to 32; each turns kElements pairs that lie together (halves), or
// kElements / 2 pairs of neighbours.
template <class T, int kElements>
FASTOPS_KERNEL(kThreads, 4)
rope_pieces(const RopeArgs a) {
  const int lanes = a.lanes;
  const int64_t i = block_x() * kThreads + thread_index(), item = i / lanes;
  const int piece = static_cast<int>(i % lanes);
  const bool there = item < a.tokens * a.heads;  // threads of no head still take part in the sums
  RopeHead h{};
  int64_t token = 0;
  float x[2][kElements], square = 0.0f;
  const int pieces = a.interleaved ? 1 : 2;
  if (there) {
    token = item / a.heads;
    h = rope_head(a, token, static_cast<int>(item % a.heads));
  }
  const bool takes_part = there && h.turns;
  FASTOPS_UNROLL
  for (int s = 0; s < 2; ++s) {
    if (!takes_part || s >= pieces) continue;
    load_elements<T>(h.in, s * a.half + piece * kElements, x[s]);
    FASTOPS_UNROLL
    for (int e = 0; e < kElements; ++e) square += x[s][e] * x[s][e];
  }
  for (int mask = lanes / 2; mask > 0; mask /= 2) square += shuffle_xor(square, mask);
  if (!there) return;
  if (!h.turns) {  // a value on its way into the cache
    if (h.cached == nullptr) return;
    for (int c = piece; c * kElements < h.part->dim; c += lanes) {
      float v[kElements];
      load_elements<T>(h.in, c * kElements, v);
      store_elements<T>(h.cached, c * kElements, v);
    }
    return;
  }
  if (h.part->weight) {
    const float rstd = 1.0f / sqrt_precise(square / static_cast<float>(h.part->dim) + a.eps);
    FASTOPS_UNROLL
    for (int s = 0; s < 2; ++s) {
      if (s >= pieces) continue;
      float w[kElements];
      load_vector<T>(h.part->weight, h.part->weight_f32, s * a.half + piece * kElements, w);
      FASTOPS_UNROLL
      for (int e = 0; e < kElements; ++e) x[s][e] *= rstd * (w[e] + a.offset);
    }
  }
  const float sign = a.inverse ? -1.0f : 1.0f;
  FASTOPS_UNROLL
  for (int e = 0; e < kElements; ++e) {
    if (a.interleaved && e % 2 == 1) continue;
    const int pair = a.interleaved ? (piece * kElements + e) / 2 : piece * kElements + e;
    const float c = h.angle < 0 ? not_a_number() : number_at(a.cos.at(h.angle), a.angle_dtype, pair);
    const float s = h.angle < 0 ? not_a_number() : sign * number_at(a.sin.at(h.angle), a.angle_dtype, pair);
    float& u = x[0][e];
    float& v = a.interleaved ? x[0][(e + 1) % kElements] : x[1][e];
    const float left = u * c - v * s, right = v * c + u * s;
    u = left;
    v = right;
  }
  FASTOPS_UNROLL
  for (int s = 0; s < 2; ++s) {
    if (s >= pieces) continue;
    if (h.out) store_elements<T>(h.out, s * a.half + piece * kElements, x[s]);
    if (h.cached) store_elements<T>(h.cached, s * a.half + piece * kElements, x[s]);
  }
}

// A warp for each head, any size, part and alignment.
template <class T>
FASTOPS_KERNEL(kThreads, 4)
rope_elements(const RopeArgs a) {
  const int64_t item = block_x() * (kThreads / 32) + warp_index();
  if (item >= a.tokens * a.heads) return;
  const RopeHead h = rope_head(a, item / a.heads, static_cast<int>(item % a.heads));
  const int lane = lane_index(), dim = h.part->dim;
  const T* in = reinterpret_cast<const T*>(h.in);
  const auto put = [&](int i, float x) {
    if (h.out) narrow(x, reinterpret_cast<T*>(h.out) + i);
    if (h.cached) narrow(x, reinterpret_cast<T*>(h.cached) + i);
  };
  if (!h.turns) {
    for (int i = lane; i < dim && h.cached; i += 32) reinterpret_cast<T*>(h.cached)[i] = in[i];
    return;
  }
  float rstd = 1.0f;
  if (h.part->weight) {
    float square = 0.0f;
    for (int i = lane; i < dim; i += 32) square += widen(in[i]) * widen(in[i]);
    for (int mask = 16; mask > 0; mask /= 2) square += shuffle_xor(square, mask);
    rstd = 1.0f / sqrt_precise(square / static_cast<float>(dim) + a.eps);
  }
  const auto get = [&](int i) {
    const float x = widen(in[i]);
    if (!h.part->weight) return x;
    float w[1];
    load_vector<T>(h.part->weight, h.part->weight_f32, i, w);
    return x * (rstd * (w[0] + a.offset));
  };
  const float sign = a.inverse ? -1.0f : 1.0f;
  for (int pair = lane; pair < a.half; pair += 32) {
    const int i = a.interleaved ? 2 * pair : pair, j = a.interleaved ? 2 * pair + 1 : pair + a.half;
    const float c = h.angle < 0 ? not_a_number() : number_at(a.cos.at(h.angle), a.angle_dtype, pair);
    const float s = h.angle < 0 ? not_a_number() : sign * number_at(a.sin.at(h.angle), a.angle_dtype, pair);
    const float u = get(i), v = get(j);
    put(i, u * c - v * s);
    put(j, v * c + u * s);
  }
  for (int i = 2 * a.half + lane; i < dim; i += 32) put(i, get(i));
}

}  // namespace fastops::cuda

#if !defined(__CUDACC_RTC__)  // the rest is the host's
namespace fastops::cuda {
namespace {

RopeTensor part_of(const fastops_tensor& in, const fastops_tensor& out, const fastops_tensor& cache,
                   const fastops_tensor& weight) {
  RopeTensor p{};
  if (!given(in)) return p;
  const int64_t size = size_of(in.dtype);
  p.in = Rows(in, 2);
  p.out = Rows(out, 2);
  p.heads = static_cast<int32_t>(in.size[in.ndim - 2]);
  p.dim = static_cast<int32_t>(last(in));
  p.in_step = in.stride[in.ndim - 2] * size;
  if (given(out)) p.out_step = out.stride[out.ndim - 2] * size;
  if (given(cache)) {
    p.cache = static_cast<char*>(cache.data);
    p.cache_page = cache.stride[0] * size;
    p.cache_slot = cache.stride[1] * size;
    p.cache_step = cache.stride[2] * size;
  }
  p.weight = weight.data;
  p.weight_f32 = weight.dtype == FASTOPS_F32;
  return p;
}

bool aligned(const RopeTensor& p) {
  const auto steps = [](std::initializer_list<int64_t> bytes) {
    for (int64_t b : bytes)
      if (b % 16 != 0) return false;
    return true;
  };
  return (!p.in || p.in.aligned(16)) && (!p.out || p.out.aligned(16)) &&
         reinterpret_cast<uintptr_t>(p.cache) % 16 == 0 &&
         steps({p.in_step, p.out_step, p.cache_page, p.cache_slot, p.cache_step});
}

template <class T>
fastops_status run(RopeArgs& a, fastops_cuda_env* env) {
  constexpr int kElements = 16 / sizeof(T);
  const int dim = a.part[0].dim, span = a.interleaved ? dim : a.half;  // what the threads of a head share
  bool wide = 2 * a.half == dim && span % kElements == 0 && a.part[2].dim % kElements == 0;
  for (const RopeTensor& p : a.part) wide = wide && aligned(p);
  a.lanes = wide ? span / kElements : 32;
  wide = wide && a.lanes <= 32 && (a.lanes & (a.lanes - 1)) == 0;
  const int64_t heads = a.tokens * a.heads, each = kThreads / (wide ? a.lanes : 32);
  const Grid grid{(heads + each - 1) / each, 1, 1, kThreads, 0};
  return wide ? launch<rope_pieces<T, kElements>>(grid, env, a) : launch<rope_elements<T>>(grid, env, a);
}

}  // namespace

}  // namespace fastops::cuda

using namespace fastops;
using namespace fastops::cuda;

extern "C" fastops_status fastops_cuda_rope(const fastops_rope_desc* desc, fastops_cuda_env* env) {
  const fastops_rope_desc& d = *desc;
  Device device;
  const fastops_status status = device_of(env, &device);
  if (status != FASTOPS_OK) return status;
  Checks c("rope", env->message);
  if (!check_rope(d, c, true)) return c.status();
  env->variant = "sm80";
  RopeArgs a{};
  a.part[0] = part_of(d.q, d.q_out, fastops_tensor{}, d.q_weight);
  a.part[1] = part_of(d.k, d.k_out, d.k_cache, d.k_weight);
  a.part[2] = part_of(d.v, fastops_tensor{}, d.v_cache, fastops_tensor{});
  a.cos = Rows(d.cos);
  a.sin = Rows(d.sin);
  a.positions = Rows(d.positions, 0);
  a.tokens = a.part[0].in.count;
  a.places = d.q.ndim == 4 ? d.q.size[1] : a.tokens;
  a.per_place = d.cos.ndim - 1 < d.q.ndim - 2;
  a.positions_per_place = d.positions.ndim < d.q.ndim - 2;
  a.positions64 = d.positions.dtype == FASTOPS_I64;
  a.angle_rows = given(d.positions) ? d.cos.size[0] : 0;
  a.slots = static_cast<const int64_t*>(d.slots.data);
  if (given(d.slots)) {
    a.page = d.k_cache.size[1];
    a.slot_count = d.k_cache.size[0] * a.page;
  }
  a.heads = a.part[0].heads + a.part[1].heads + a.part[2].heads;
  a.half = static_cast<int32_t>(last(d.cos));
  a.angle_dtype = d.cos.dtype;
  a.eps = d.eps;
  a.offset = d.weight_offset;
  a.interleaved = d.interleaved != 0;
  a.inverse = d.inverse != 0;
  if (d.q.dtype == FASTOPS_F32) return run<float>(a, env);
  return d.q.dtype == FASTOPS_F16 ? run<f16>(a, env) : run<bf16>(a, env);
}
#endif
