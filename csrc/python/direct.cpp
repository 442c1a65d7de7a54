#include "python/direct.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fastops::direct {
namespace {

using Wrap = PyObject* (*)(const void* tensor);

// What `begin` was given. All live as long as the process.
struct {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  const DLPackExchangeAPI* exchange = nullptr;
  PyObject *forced = nullptr, *profiler = nullptr, *forward = nullptr, *guards = nullptr, *step = nullptr;
  PyObject *empty_strided = nullptr, *dtypes = nullptr, *dtype_keyword = nullptr;
  PyObject *requires_grad = nullptr, *profiling = nullptr, *level = nullptr;
  Wrap wrap = nullptr;  // torch's function that makes a Python object of a tensor, or none
} g;

fastops_dtype dtype_of(const DLDataType& t) {
  if (t.lanes != 1) return FASTOPS_DTYPE_NONE;
  switch (t.code) {
    case kDLFloat:
      return t.bits == 32 ? FASTOPS_F32 : t.bits == 16 ? FASTOPS_F16 : FASTOPS_DTYPE_NONE;
    case kDLBfloat:
      return t.bits == 16 ? FASTOPS_BF16 : FASTOPS_DTYPE_NONE;
    case kDLInt:
      return t.bits == 32 ? FASTOPS_I32 : t.bits == 64 ? FASTOPS_I64 : t.bits == 8 ? FASTOPS_I8 : FASTOPS_DTYPE_NONE;
    case kDLFloat8_e4m3fn:
      return FASTOPS_F8_E4M3;
    case kDLUInt:
      return t.bits == 8 ? FASTOPS_U8 : FASTOPS_DTYPE_NONE;
    case kDLBool:
      return t.bits == 8 ? FASTOPS_BOOL : FASTOPS_DTYPE_NONE;
    default:
      return FASTOPS_DTYPE_NONE;
  }
}

bool exchanged(PyObject* object, DLTensor* t) {
  if (Py_TYPE(object) != g.tensor && Py_TYPE(object) != g.parameter) return false;
  if (g.exchange->dltensor_from_py_object_no_sync(object, t) == 0) return true;
  PyErr_Clear();  // no storage: sparse, a transform's wrapper
  return false;
}

}  // namespace

bool view(PyObject* object, fastops_tensor* to, bool any_order) {
  DLTensor t;
  if (!exchanged(object, &t)) return false;
  const fastops_dtype dtype = dtype_of(t.dtype);
  if (t.device.device_type != kDLCPU || dtype == FASTOPS_DTYPE_NONE || t.ndim < 1 || t.ndim > FASTOPS_MAX_DIMS)
    return false;
  // Also keeps out what torch would have to negate first: the imaginary part of a conjugate has strides of 2 and more.
  bool contiguous = t.strides[t.ndim - 1] == 1;
  for (int i = 0; any_order && i < t.ndim; ++i) contiguous = contiguous || t.strides[i] == 1;
  if (!contiguous) return false;
  to->ndim = t.ndim;
  for (int i = 0; i < t.ndim; ++i) {
    to->size[i] = t.shape[i];
    to->stride[i] = t.strides[i];
  }
  to->data = static_cast<char*>(t.data) + t.byte_offset;
  to->dtype = dtype;
  if (fastops_torch_records() == 0) return true;
  PyObject* wants = PyObject_GetAttr(object, g.requires_grad);
  const bool no = wants == Py_False;
  if (wants == nullptr) PyErr_Clear();
  Py_XDECREF(wants);
  return no;
}

bool whole(PyObject* object, int64_t* to) {
  if (!PyLong_CheckExact(object)) return false;
  *to = PyLong_AsLongLong(object);
  if (PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

bool allowed() {
  if (g.exchange == nullptr || fastops_torch_on_cpu() == 0) return false;
  PyObject* forced = nullptr;
  if (PyContextVar_Get(g.forced, nullptr, &forced) != 0 || forced == nullptr) {
    PyErr_Clear();
    return false;
  }
  const bool free = PyDict_Check(forced) && PyDict_GET_SIZE(forced) == 0;
  Py_DECREF(forced);
  if (!free || PyDict_GetItem(g.profiler, g.profiling) != Py_False) return false;
  int64_t level = 0;  // of forward-mode differentiation, -1 outside
  PyObject* now = PyDict_GetItem(g.forward, g.level);
  if (now == nullptr || !whole(now, &level) || level >= 0) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(g.guards); ++i) {
    PyObject* busy = PyObject_CallNoArgs(PyTuple_GET_ITEM(g.guards, i));
    const int is = busy == nullptr ? -1 : PyObject_IsTrue(busy);
    if (is < 0) PyErr_Clear();
    Py_XDECREF(busy);
    if (is != 0) return false;
  }
  return true;
}

bool number(PyObject* object, float* to) {
  if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) return false;
  *to = static_cast<float>(PyFloat_AsDouble(object));
  if (PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

bool flatten(fastops_tensor* t) {
  const int k = t->ndim - 1;
  int64_t rows = 1, step = t->size[k];
  bool one = true, none = false;  // so far; no row at all
  for (int i = 0; i < k; ++i) none = none || t->size[i] == 0;
  for (int i = k - 1; i >= 0; --i) {
    if (t->size[i] != 1) {
      if (one)
        step = t->stride[i];
      else if (!none && t->stride[i] != rows * step)
        return false;
      one = false;
    }
    rows *= t->size[i];
  }
  t->size[1] = t->size[k];
  t->size[0] = rows;
  t->stride[1] = 1;
  t->stride[0] = step;
  t->ndim = 2;
  return true;
}

PyObject* empty(const int64_t* sizes, int ndim, fastops_dtype dtype) {
  int64_t strides[FASTOPS_MAX_DIMS], step = 1;
  for (int i = ndim; i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  if (g.wrap != nullptr) {
    void* tensor = fastops_torch_empty(sizes, strides, ndim, dtype);
    if (tensor == nullptr) return nullptr;
    PyObject* made = g.wrap(tensor);
    fastops_torch_release(tensor);
    if (made == nullptr) PyErr_Clear();
    return made;
  }
  PyObject* args[] = {PyTuple_New(ndim), PyTuple_New(ndim), PyTuple_GET_ITEM(g.dtypes, dtype)};
  PyObject* made = nullptr;
  if (args[0] != nullptr && args[1] != nullptr) {
    for (int i = 0; i < ndim; ++i) {
      PyTuple_SET_ITEM(args[0], i, PyLong_FromLongLong(sizes[i]));
      PyTuple_SET_ITEM(args[1], i, PyLong_FromLongLong(strides[i]));
    }
    made = PyObject_Vectorcall(g.empty_strided, args, 2, g.dtype_keyword);
  }
  if (made == nullptr) PyErr_Clear();
  Py_XDECREF(args[0]);
  Py_XDECREF(args[1]);
  return made;
}

PyObject* like(PyObject* object) {
  fastops_tensor seen;
  return view(object, &seen) ? empty(seen.size, seen.ndim, static_cast<fastops_dtype>(seen.dtype)) : nullptr;
}

PyObject* like_with(const fastops_tensor& seen, int64_t last) {
  int64_t size[FASTOPS_MAX_DIMS];
  for (int i = 0; i < seen.ndim; ++i) size[i] = i == seen.ndim - 1 ? last : seen.size[i];
  return empty(size, seen.ndim, static_cast<fastops_dtype>(seen.dtype));
}

fastops_dtype dtype_from(PyObject* object) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(g.dtypes); ++i)
    if (PyTuple_GET_ITEM(g.dtypes, i) == object) return static_cast<fastops_dtype>(i);
  return FASTOPS_DTYPE_NONE;
}

namespace {

// torch's function, found by name because torch's C API has none, and tried before it is taken: else null.
Wrap find_wrap() {
#if defined(__linux__)
  void* torch = dlopen("libtorch_python.so", RTLD_NOLOAD | RTLD_LAZY);
  if (torch == nullptr) return nullptr;
  const auto wrap = reinterpret_cast<Wrap>(dlsym(torch, "_Z16THPVariable_WrapRKN2at10TensorBaseE"));
  dlclose(torch);
  return wrap;
#else
  return nullptr;
#endif
}
bool wraps() {
  const int64_t size[] = {2, 3};
  PyObject* made = empty(size, 2, FASTOPS_BF16);
  fastops_tensor seen{};
  const bool right = made != nullptr && Py_TYPE(made) == g.tensor && view(made, &seen) && seen.ndim == 2 &&
                     seen.size[0] == 2 && seen.size[1] == 3 && seen.stride[0] == 3 && seen.dtype == FASTOPS_BF16;
  Py_XDECREF(made);
  return right;
}

}  // namespace

PyObject* Call::run(fastops_torch_function function, fastops_torch_workspace workspace, const void* desc) {
  if (n_written > 0) {  // before, for it may be forbidden: then the long way says so
    PyObject* list = PyTuple_New(n_written);
    if (list == nullptr) return nullptr;
    for (int i = 0; i < n_written; ++i) {
      Py_INCREF(written[i]);
      PyTuple_SET_ITEM(list, i, written[i]);
    }
    PyObject* stepped = PyObject_CallOneArg(g.step, list);
    Py_DECREF(list);
    if (stepped == nullptr) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    Py_DECREF(stepped);
  }
  fastops_status status;
  char message[FASTOPS_MESSAGE_SIZE];
  Py_BEGIN_ALLOW_THREADS;
  status = fastops_torch_run(function, workspace, desc, message);
  Py_END_ALLOW_THREADS;
  if (status != FASTOPS_OK) Py_RETURN_NONE;
  if (n_results == 0) Py_RETURN_TRUE;
  if (n_results == 1) {
    Py_INCREF(results[0]);
    return results[0];
  }
  PyObject* all = PyTuple_New(n_results);
  if (all == nullptr) return nullptr;
  for (int i = 0; i < n_results; ++i) {
    Py_INCREF(results[i]);
    PyTuple_SET_ITEM(all, i, results[i]);
  }
  return all;
}

// begin(Tensor, Parameter, exchange, forced, profiler, forward_ad, guards, step, empty_strided, dtypes)
PyObject* begin(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 10) {
    PyErr_SetString(PyExc_TypeError, "direct_begin needs 10 arguments");
    return nullptr;
  }
  const auto* header =
      static_cast<const DLPackExchangeAPIHeader*>(PyCapsule_GetPointer(args[2], "dlpack_exchange_api"));
  while (header != nullptr && header->version.major != 1) header = header->prev_api;
  if (header == nullptr) {  // no API, or a later one: every call goes the long way
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 0; i < n; ++i) Py_INCREF(args[i]);
  g.tensor = reinterpret_cast<PyTypeObject*>(args[0]);
  g.parameter = reinterpret_cast<PyTypeObject*>(args[1]);
  g.forced = args[3];
  g.profiler = args[4];
  g.forward = args[5];
  g.guards = args[6];
  g.step = args[7];
  g.empty_strided = args[8];
  g.dtypes = args[9];
  g.requires_grad = PyUnicode_InternFromString("requires_grad");
  g.profiling = PyUnicode_InternFromString("_is_profiler_enabled");
  g.level = PyUnicode_InternFromString("_current_level");
  g.dtype_keyword = Py_BuildValue("(s)", "dtype");
  g.exchange = reinterpret_cast<const DLPackExchangeAPI*>(header);
  g.wrap = find_wrap();
  if (g.wrap != nullptr && !wraps()) g.wrap = nullptr;
  Py_RETURN_TRUE;
}

}  // namespace fastops::direct
