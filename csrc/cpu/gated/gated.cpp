// The gated activations' C API on the CPU: check, share the rows out.
#include "cpu/gated/gated.h"

#include "core/op_checks.h"
#include "core/parallel.h"

namespace fastops::cpu {
namespace {

constexpr int64_t kItemSize = 8192;  // elements: some microseconds of work

}  // namespace
}  // namespace fastops::cpu

using namespace fastops;
using namespace fastops::cpu;

extern "C" fastops_status fastops_gated_check(const fastops_gated_desc* desc, char* message) {
  Checks c("gated", message);
  check_gated(*desc, c);
  return c.status();
}

extern "C" fastops_status fastops_gated(const fastops_gated_desc* desc, fastops_env* env) {
  const fastops_gated_desc& d = *desc;
  Checks c("gated", env->message);
  if (!check_gated(d, c) || !c.can_run()) return c.status();
  const auto variant = FASTOPS_CHOOSE(GatedTable, gated_table);
  env->variant = variant.name;
  const bool backward = given(d.dout);
  const Rows gate(d.gate), up(d.up), out(backward ? fastops_tensor{} : d.out), dout(d.dout), dgate(d.dgate), dup(d.dup);
  const int64_t n = last(d.gate), rows = gate.count, esize = size_of(d.gate.dtype);
  if (n == 0 || rows == 0) return FASTOPS_OK;
  const bool stream = !backward && d.out.data != d.gate.data && d.out.data != d.up.data &&
                      rows * n * esize >= kStreamBytes && n * esize % 64 == 0 && out.aligned(64);
  // An item is a piece of one long row, or several short rows.
  const int64_t rows_per_item = n < kItemSize ? kItemSize / n : 1, pieces = (n + kItemSize - 1) / kItemSize;
  const int64_t items = (rows + rows_per_item - 1) / rows_per_item * pieces;
  const auto run = [&](int64_t item, int) {
    const int64_t first = item / pieces * rows_per_item, begin = item % pieces * kItemSize;
    const int64_t end = first + rows_per_item < rows ? first + rows_per_item : rows;
    for (int64_t row = first; row < end; ++row) {
      const auto at = [&](const Rows& t) { return t ? t.at(row) + begin * esize : nullptr; };
      const int64_t size = n - begin < kItemSize ? n - begin : kItemSize;
      const bool ends = begin + size == n, last_row = row + 1 == rows;  // of its row; of all
      const auto then = [&](const Rows& t) {
        return !ends ? t.at(row) + (begin + size) * esize : last_row ? nullptr : t.at(row + 1);
      };
      const GatedPiece p{at(gate), at(up), at(dout), at(out), at(dgate), at(dup), size, stream, then(gate), then(up)};
      if (backward)
        variant.table.backward(p, d.activation, d.gate.dtype);
      else
        variant.table.forward(p, d.activation, d.gate.dtype);
    }
  };
  parallel_items(*env, items, run, is_brief(rows * n, *env));
  return FASTOPS_OK;
}
