/* A C11 program that uses the installed library: every function of the control plane, one call of each operator. */
#include <fastops/fastops.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(condition)                                                  \
  do {                                                                      \
    if (!(condition)) {                                                     \
      fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #condition, message); \
      return 1;                                                             \
    }                                                                       \
  } while (0)

enum { SQ = 3, SK = 5, H = 2, D = 8 };

static fastops_tensor dense(void* data, int ndim, const int64_t* size) {
  fastops_tensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.ndim = ndim;
  t.dtype = FASTOPS_F32;
  int64_t step = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    t.size[i] = size[i];
    t.stride[i] = step;
    step *= size[i];
  }
  return t;
}

/* A "thread pool" of two that counts its calls. */
static void two_halves(void* ctx, int64_t n, int64_t grain, fastops_range_fn f, void* arg) {
  (void)grain;
  ++*(int*)ctx;
  f(arg, 0, n / 2);
  f(arg, n / 2, n);
}

int main(void) {
  char message[FASTOPS_MESSAGE_SIZE] = "";
  char want[32];
  snprintf(want, sizeof want, "%d.%d.%d", FASTOPS_VERSION_MAJOR, FASTOPS_VERSION_MINOR, FASTOPS_VERSION_PATCH);
  REQUIRE(strcmp(fastops_version(), want) == 0);

  int supported = 0;
  for (const char* const* name = fastops_isa_names(); *name; ++name)
    if (fastops_isa_compiled(*name) && fastops_isa_supported(*name)) ++supported;
  REQUIRE(supported >= 1);
  REQUIRE(fastops_isa_refusal() == NULL);
  REQUIRE(fastops_isa_set("no such thing", message) == FASTOPS_ERR_VALUE);
  REQUIRE(strstr(message, "no such thing") != NULL);
  REQUIRE(fastops_isa_set("scalar", message) == FASTOPS_OK);
  REQUIRE(strcmp(fastops_isa_active(), "scalar") == 0);
  REQUIRE(fastops_isa_set(NULL, message) == FASTOPS_OK);

  static float q[SQ * H * D], k[SK * H * D], v[SK * H * D], out[SQ * H * D], lse[H * SQ];
  for (int i = 0; i < SQ * H * D; ++i) q[i] = sinf((float)i);
  for (int i = 0; i < SK * H * D; ++i) {
    k[i] = cosf((float)i);
    v[i] = sinf(0.5f * (float)i);
  }
  const int64_t q_size[4] = {1, SQ, H, D}, k_size[4] = {1, SK, H, D}, lse_size[3] = {1, H, SQ};
  fastops_attention_desc a;
  memset(&a, 0, sizeof a);
  a.struct_size = sizeof a;
  a.q = dense(q, 4, q_size);
  a.k = dense(k, 4, k_size);
  a.v = dense(v, 4, k_size);
  a.out = dense(out, 4, q_size);
  a.lse = dense(lse, 3, lse_size);
  a.scale = 0.25f;
  a.window_left = -1;
  a.window_right = 0; /* causal */

  int calls = 0;
  fastops_env env;
  memset(&env, 0, sizeof env);
  env.struct_size = sizeof env;
  env.num_threads = 2;
  env.parallel_for = two_halves;
  env.parallel_ctx = &calls;
  env.message = message;
  REQUIRE(fastops_attention_check(&a, message) == FASTOPS_OK);
  REQUIRE(fastops_attention_fwd(&a, &env) == FASTOPS_ERR_WORKSPACE);
  size_t bytes = 0;
  REQUIRE(fastops_attention_workspace(&a, &env, &bytes) == FASTOPS_OK);
  REQUIRE(bytes <= 2u << 20);
  env.workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);
  env.workspace_size = bytes;
  REQUIRE(fastops_attention_fwd(&a, &env) == FASTOPS_OK);
  REQUIRE(env.variant != NULL && strcmp(env.variant, fastops_isa_active()) == 0);

  for (int i = 0; i < SQ; ++i)
    for (int h = 0; h < H; ++h) {
      double sum = 0, expected[D] = {0};
      for (int j = 0; j <= i + SK - SQ; ++j) {
        double s = 0;
        for (int d = 0; d < D; ++d) s += (double)q[(i * H + h) * D + d] * k[(j * H + h) * D + d];
        const double p = exp(0.25 * s);
        sum += p;
        for (int d = 0; d < D; ++d) expected[d] += p * v[(j * H + h) * D + d];
      }
      REQUIRE(fabs(lse[h * SQ + i] - log(sum)) < 1e-5);
      for (int d = 0; d < D; ++d) REQUIRE(fabs(out[(i * H + h) * D + d] - expected[d] / sum) < 1e-5);
    }

  a.k.size[3] = D - 1;
  REQUIRE(fastops_attention_fwd(&a, &env) == FASTOPS_ERR_VALUE);
  REQUIRE(strncmp(message, "attention: k", 12) == 0);

  /* Merging a state with itself: the same values, and the LSE of twice the keys. */
  static float merged[SQ * H * D], merged_lse[H * SQ];
  fastops_tensor outs[2], lses[2];
  outs[0] = outs[1] = a.out;
  lses[0] = lses[1] = a.lse;
  fastops_merge_states_desc m;
  memset(&m, 0, sizeof m);
  m.struct_size = sizeof m;
  m.count = 2;
  m.outs = outs;
  m.lses = lses;
  m.out = dense(merged, 4, q_size);
  m.lse = dense(merged_lse, 3, lse_size);
  REQUIRE(fastops_merge_states_check(&m, message) == FASTOPS_OK);
  REQUIRE(fastops_merge_states(&m, &env) == FASTOPS_OK);
  for (int i = 0; i < SQ * H * D; ++i) REQUIRE(fabsf(merged[i] - out[i]) < 1e-6f);
  for (int i = 0; i < H * SQ; ++i) REQUIRE(fabsf(merged_lse[i] - lse[i] - 0.6931472f) < 1e-6f);

  enum { N = 100000 };
  static float x[N], y[N];
  const int64_t n_size[1] = {N};
  for (int i = 0; i < N; ++i) {
    x[i] = (float)i;
    y[i] = 1.0f;
  }
  fastops_scale_add_desc s;
  memset(&s, 0, sizeof s);
  s.struct_size = sizeof s;
  s.alpha = 2.0f;
  s.x = dense(x, 1, n_size);
  s.y = s.out = dense(y, 1, n_size);
  REQUIRE(fastops_scale_add_check(&s, message) == FASTOPS_OK);
  calls = 0;
  REQUIRE(fastops_scale_add(&s, &env) == FASTOPS_OK);
  REQUIRE(calls == 1);
  for (int i = 0; i < N; ++i) REQUIRE(y[i] == 2.0f * (float)i + 1.0f);

  free(env.workspace);
  printf("ok %s %s\n", fastops_version(), env.variant);
  return 0;
}
