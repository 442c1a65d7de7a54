// The algorithm, written once in the vocabulary of cpu/isa/vec_*.h.
namespace fastops::cpu::FASTOPS_ISA {
namespace {

template <class T>
void scale_add_as(const T* x, const T* y, T* out, int64_t n, float alpha) {
  const vf a = vset(alpha);
  int64_t i = 0;
  for (; i + W <= n; i += W) vstore(out + i, vfma(a, vload(x + i), vload(y + i)));
  const int rest = static_cast<int>(n - i);
  if (rest > 0) vstoren(out + i, vfma(a, vloadn(x + i, rest), vloadn(y + i, rest)), rest);
}

template <class T>
void scale_add_cast(const char* x, const char* y, char* out, int64_t n, float alpha) {
  scale_add_as(reinterpret_cast<const T*>(x), reinterpret_cast<const T*>(y), reinterpret_cast<T*>(out), n, alpha);
}

void scale_add_run(const char* x, const char* y, char* out, int64_t n, float alpha, int32_t dtype) {
  if (dtype == FASTOPS_F32) scale_add_cast<float>(x, y, out, n, alpha);
  if (dtype == FASTOPS_F16) scale_add_cast<f16>(x, y, out, n, alpha);
  if (dtype == FASTOPS_BF16) scale_add_cast<bf16>(x, y, out, n, alpha);
}

}  // namespace

extern const ScaleAddTable scale_add_table;
const ScaleAddTable scale_add_table = {&scale_add_run};

}  // namespace fastops::cpu::FASTOPS_ISA
