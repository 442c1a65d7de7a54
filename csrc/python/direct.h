// Calls from Python that go straight to the C API (docs/design/001-torch-binding.md, "Direct calls"). A call is taken
// only where torch's dispatcher would have had nothing to do but to find our kernel: plain tensors on the CPU, nothing
// recorded, traced or profiled. It says no (None) to all else, and to whatever the kernel refuses, and the caller goes
// the long way, which can do everything and knows what to say.
#pragma once
#include <ATen/dlpack.h>
#include <Python.h>

#include "fastops/fastops.h"
#include "torch/run.h"

namespace fastops::direct {

// A tensor as a view; false (no error set) where it is not a plain dense one on the CPU, or wants a gradient.
bool view(PyObject* object, fastops_tensor* to);

// Whether calls may pass by the dispatcher at this moment.
bool allowed();

// A new contiguous tensor like `object`, which `view` took; or null (no error set).
PyObject* like(PyObject* object);

// The functions fastops._C gets.
PyMethodDef* methods();

// Runs what the fields below have filled in; the results (borrowed from the caller or new) as Python returns them.
struct Call {
  static constexpr int kMost = 4;
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

// A tensor to write to, or None for a new one like argument `Like` (and None where that is None).
template <auto Member, int Like>
struct Result {
  template <class D>
  static bool take(Call& call, D& d, PyObject* object) {
    if (object != Py_None) {
      call.written[call.n_written++] = object;
      Py_INCREF(object);
    } else if (call.args[Like] != Py_None) {
      object = like(call.args[Like]);
      if (object == nullptr) return false;
    } else {
      Py_INCREF(object);
    }
    call.results[call.n_results++] = object;
    return object == Py_None || view(object, &(d.*Member));
  }
};

template <auto Member>
struct Number {
  template <class D>
  static bool take(Call&, D& d, PyObject* object) {
    if (!PyFloat_CheckExact(object)) return false;
    d.*Member = static_cast<float>(PyFloat_AS_DOUBLE(object));
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

// The whole of a METH_FASTCALL function: Run is the C API's, Finish a last step on the descriptor, or a refusal.
template <class D, fastops_status (*Run)(const D*, fastops_env*),
          fastops_status (*Workspace)(const D*, const fastops_env*, size_t*), bool (*Finish)(D&), class... Fields>
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
                  &d);
}

}  // namespace fastops::direct
