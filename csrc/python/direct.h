// Calls from Python that go straight to the C API (docs/design/001-torch-binding.md, "Direct calls"). A call is taken
// only where torch's dispatcher would have had nothing to do but to find our kernel: plain tensors on the CPU, nothing
// recorded, traced or profiled. It says no (None) to all else, and to whatever the kernel refuses, and the caller goes
// the long way, which can do everything and knows what to say.
#pragma once
#include <ATen/dlpack.h>
#include <Python.h>

#include <cmath>
#include <type_traits>

#include "fastops/fastops.h"
#include "torch/run.h"

namespace fastops::direct {

// A tensor as a view; false (no error set) where it is not a plain dense one on the CPU, or wants a gradient. Its last
// dimension, or with any_order one of them, must be contiguous.
bool view(PyObject* object, fastops_tensor* to, bool any_order = false);

// Whether calls may pass by the dispatcher at this moment.
bool allowed();

// A new contiguous tensor like `object`, which `view` took; or null (no error set).
PyObject* like(PyObject* object);

// Leading dimensions as one: [..., K] to [M, K]; false where that takes a copy.
bool flatten(fastops_tensor* t);

// A new contiguous tensor like `seen` but for its last dimension, or null (no error set).
PyObject* like_with(const fastops_tensor& seen, int64_t last);

// A new contiguous one, or null (no error set).
PyObject* empty(const int64_t* size, int ndim, fastops_dtype dtype = FASTOPS_F32);

// Of a torch.dtype.
fastops_dtype dtype_from(PyObject* object);

// The functions fastops._C gets; the first is `begin`, without which no call is taken.
PyMethodDef* methods();
PyObject* begin(PyObject*, PyObject* const* args, Py_ssize_t n);

// A number, also a whole one, and a whole one; false (no error set) for anything else.
bool number(PyObject* object, float* to);
bool whole(PyObject* object, int64_t* to);

// Runs what the fields below have filled in; the results (borrowed from the caller or new) as Python returns them.
struct Call {
  static constexpr int kMost = 12;
  PyObject* const* args;
  PyObject* written[kMost];  // whose version counters step
  int n_written = 0;
  PyObject* results[kMost];  // owned
  int n_results = 0;

  explicit Call(PyObject* const* arguments) : args(arguments) {}
  Call(const Call&) = delete;
  ~Call() {
    for (int i = 0; i < n_results; ++i) Py_XDECREF(results[i]);
  }
  // The tensor to write to, or for None the one that make() gives.
  template <class F>
  bool result(PyObject* object, const F& make) {
    if (object != Py_None) {
      written[n_written++] = object;
      Py_INCREF(object);
    } else if ((object = make()) == nullptr) {
      return false;
    }
    results[n_results++] = object;
    return true;
  }
  bool no_result() {
    Py_INCREF(Py_None);
    results[n_results++] = Py_None;
    return true;
  }
  PyObject* run(fastops_torch_function function, fastops_torch_workspace workspace, const void* desc);
};

// ---- what an argument is --------------------------------------------------------------------------------------------

template <auto Member>
struct Input {
  template <class D>
  static bool take(Call&, D& d, PyObject* object) {
    return view(object, &(d.*Member));
  }
};

template <auto Member>
struct Optional {
  template <class D>
  static bool take(Call&, D& d, PyObject* object) {
    return object == Py_None || view(object, &(d.*Member));
  }
};

template <auto Member>
struct Updated {
  template <class D>
  static bool take(Call& call, D& d, PyObject* object) {
    call.written[call.n_written++] = object;
    return view(object, &(d.*Member));
  }
};

template <auto Member>
struct OptionalUpdated {
  template <class D>
  static bool take(Call& call, D& d, PyObject* object) {
    return object == Py_None || Updated<Member>::take(call, d, object);
  }
};

// A tensor to write to, None for a new one like argument `Like` (none where that is None), or False for none.
template <auto Member, int Like>
struct Result {
  template <class D>
  static bool take(Call& call, D& d, PyObject* object) {
    if (object == Py_False || (object == Py_None && call.args[Like] == Py_None)) return call.no_result();
    return call.result(object, [&] { return like(call.args[Like]); }) &&
           view(call.results[call.n_results - 1], &(d.*Member));
  }
};

// [..., K] as rows.
template <auto Member>
struct Rows {
  template <class D>
  static bool take(Call&, D& d, PyObject* object) {
    return view(object, &(d.*Member)) && flatten(&(d.*Member));
  }
};

// The K that rows must have.
template <auto Member>
struct Columns {
  template <class D>
  static bool take(Call&, D& d, PyObject* object) {
    int64_t k = 0;
    return whole(object, &k) && k == (d.*Member).size[1];
  }
};

// As Result, a new one like argument `Like`, seen as `Seen`, with the last dimension of `Last`.
template <auto Member, int Like, auto Seen, auto Last>
struct ResultWith {
  template <class D>
  static bool take(Call& call, D& d, PyObject* object) {
    const fastops_tensor& last = d.*Last;
    return call.result(object, [&] { return like_with(d.*Seen, last.size[last.ndim - 1]); }) &&
           view(call.results[call.n_results - 1], &(d.*Member));
  }
};

// One that another field reads.
struct Ignored {
  template <class D>
  static bool take(Call&, D&, PyObject*) {
    return true;
  }
};

// As Result, [..., N] for the rows of argument `Of` and the N of argument `N`.
template <auto Member, int Of, int N>
struct RowsResult {
  template <class D>
  static bool take(Call& call, D& d, PyObject* object) {
    int64_t n = 0;
    fastops_tensor rows;
    if (!whole(call.args[N], &n) || n < 0 || !view(call.args[Of], &rows)) return false;
    fastops_tensor& out = d.*Member;
    if (!call.result(object, [&] { return like_with(rows, n); }) || !view(call.results[call.n_results - 1], &out) ||
        out.ndim != rows.ndim)
      return false;
    rows.size[rows.ndim - 1] = n;
    for (int i = 0; i < rows.ndim; ++i)
      if (out.size[i] != rows.size[i]) return false;
    return flatten(&out);
  }
};

template <auto Member>
struct Number {
  template <class D>
  static bool take(Call&, D& d, PyObject* object) {
    return number(object, &(d.*Member));
  }
};

// NaN for None, and only for None.
template <auto Member>
struct OptionalNumber {
  template <class D>
  static bool take(Call&, D& d, PyObject* object) {
    d.*Member = NAN;
    return object == Py_None || (number(object, &(d.*Member)) && !std::isnan(d.*Member));
  }
};

template <auto Member>
struct Whole {
  template <class D>
  static bool take(Call&, D& d, PyObject* object) {
    int64_t n = 0;
    if (!whole(object, &n)) return false;
    d.*Member = static_cast<std::decay_t<decltype(d.*Member)>>(n);
    return true;
  }
};

template <auto Member>
struct Flag {
  template <class D>
  static bool take(Call&, D& d, PyObject* object) {
    d.*Member = object == Py_True;
    return PyBool_Check(object);
  }
};

template <class D>
bool nothing(D&) {
  return true;
}

// The whole of a METH_FASTCALL function: D is or begins with the C API's descriptor B, Run is its function, Finish a
// last step on the descriptor, or a refusal.
template <class D, class B, fastops_status (*Run)(const B*, fastops_env*),
          fastops_status (*Workspace)(const B*, const fastops_env*, size_t*), bool (*Finish)(D&), class... Fields>
PyObject* operate(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != static_cast<Py_ssize_t>(sizeof...(Fields))) {
    PyErr_Format(PyExc_TypeError, "needs %zd arguments, got %zd", static_cast<Py_ssize_t>(sizeof...(Fields)), n);
    return nullptr;
  }
  if (!allowed()) Py_RETURN_NONE;
  Call call(args);
  D d{};
  d.struct_size = sizeof d;
  int i = 0;
  if (!(Fields::take(call, d, args[i++]) && ...) || !Finish(d)) Py_RETURN_NONE;
  return call.run(reinterpret_cast<fastops_torch_function>(Run), reinterpret_cast<fastops_torch_workspace>(Workspace),
                  static_cast<const B*>(&d));
}

}  // namespace fastops::direct
