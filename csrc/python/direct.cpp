#include "python/direct.h"

#include "torch/halves.h"

namespace fastops::direct {
namespace {

// What `begin` was given. All live as long as the process.
struct {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  const DLPackExchangeAPI* exchange = nullptr;
  PyObject *forced = nullptr, *profiler = nullptr, *guards = nullptr, *step = nullptr, *empty_like = nullptr;
  PyObject *keywords = nullptr, *contiguous = nullptr, *requires_grad = nullptr, *profiling = nullptr;
} g;

fastops_dtype dtype_of(const DLDataType& t) {
  if (t.lanes != 1) return FASTOPS_DTYPE_NONE;
  switch (t.code) {
    case kDLFloat:
      return t.bits == 32 ? FASTOPS_F32 : t.bits == 16 ? FASTOPS_F16 : FASTOPS_DTYPE_NONE;
    case kDLBfloat:
      return t.bits == 16 ? FASTOPS_BF16 : FASTOPS_DTYPE_NONE;
    case kDLInt:
      return t.bits == 32 ? FASTOPS_I32 : t.bits == 64 ? FASTOPS_I64 : FASTOPS_DTYPE_NONE;
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

bool view(PyObject* object, fastops_tensor* to) {
  DLTensor t;
  if (!exchanged(object, &t)) return false;
  const fastops_dtype dtype = dtype_of(t.dtype);
  if (t.device.device_type != kDLCPU || dtype == FASTOPS_DTYPE_NONE || t.ndim < 1 || t.ndim > FASTOPS_MAX_DIMS)
    return false;
  // Also keeps out what torch would have to negate first: the imaginary part of a conjugate has strides of 2 and more.
  if (t.strides[t.ndim - 1] != 1) return false;
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
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(g.guards); ++i) {
    PyObject* busy = PyObject_CallNoArgs(PyTuple_GET_ITEM(g.guards, i));
    const int is = busy == nullptr ? -1 : PyObject_IsTrue(busy);
    if (is < 0) PyErr_Clear();
    Py_XDECREF(busy);
    if (is != 0) return false;
  }
  return true;
}

PyObject* like(PyObject* object) {
  PyObject* args[] = {object, g.contiguous};
  PyObject* made = PyObject_Vectorcall(g.empty_like, args, 1, g.keywords);
  if (made == nullptr) PyErr_Clear();
  return made;
}

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

namespace {

// begin(Tensor, Parameter, exchange, forced, profiler, guards, step, empty_like, contiguous)
PyObject* begin(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 9) {
    PyErr_SetString(PyExc_TypeError, "direct_begin needs 9 arguments");
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
  g.guards = args[5];
  g.step = args[6];
  g.empty_like = args[7];
  g.contiguous = args[8];
  g.requires_grad = PyUnicode_InternFromString("requires_grad");
  g.profiling = PyUnicode_InternFromString("_is_profiler_enabled");
  g.keywords = Py_BuildValue("(s)", "memory_format");
  g.exchange = reinterpret_cast<const DLPackExchangeAPI*>(header);
  Py_RETURN_TRUE;
}

// ---- the operators --------------------------------------------------------------------------------------------------

using Norm = fastops_norm_desc;
using Gated = fastops_gated_desc;
using Rope = fastops_rope_desc;

bool in_place(Norm& d) {
  d.out = d.x;
  d.sum = d.residual;
  return true;
}
bool layer(Norm& d) {
  d.layer = 1;
  return true;
}
template <fastops_activation Kind>
bool whole(Gated& d) {
  d.activation = Kind;
  return true;
}
template <fastops_activation Kind>
bool halves(Gated& d) {
  d.activation = Kind;
  return binding::halve(&d.gate, &d.up);
}

template <bool (*Finish)(Norm&), class... Fields>
constexpr auto norm = &operate<Norm, &fastops_norm, &fastops_norm_workspace, Finish, Fields...>;
template <bool (*Finish)(Gated&), class... Fields>
constexpr auto gated = &operate<Gated, &fastops_gated, nullptr, Finish, Fields...>;
template <class... Fields>
constexpr auto rope = &operate<Rope, &fastops_rope, nullptr, &nothing<Rope>, Fields...>;

constexpr auto rms_norm = norm<&nothing<Norm>, Input<&Norm::x>, Optional<&Norm::weight>, Number<&Norm::eps>,
                               Number<&Norm::weight_offset>, Result<&Norm::out, 0>>;
constexpr auto fused_add_rms_norm = norm<&in_place, Updated<&Norm::x>, Updated<&Norm::residual>,
                                         Optional<&Norm::weight>, Number<&Norm::eps>, Number<&Norm::weight_offset>>;
constexpr auto layer_norm = norm<&layer, Input<&Norm::x>, Optional<&Norm::weight>, Optional<&Norm::bias>,
                                 Number<&Norm::eps>, Result<&Norm::out, 0>>;

template <fastops_activation Kind>
constexpr auto and_mul = gated<&halves<Kind>, Input<&Gated::gate>, Result<&Gated::out, 1>>;
template <fastops_activation Kind>
constexpr auto pair = gated<&whole<Kind>, Input<&Gated::gate>, Input<&Gated::up>, Result<&Gated::out, 0>>;

constexpr auto apply_rope =
    rope<Input<&Rope::q>, Optional<&Rope::k>, Input<&Rope::cos>, Input<&Rope::sin>, Optional<&Rope::positions>,
         Flag<&Rope::interleaved>, Result<&Rope::q_out, 0>, Result<&Rope::k_out, 1>>;
constexpr auto qk_norm_rope =
    rope<Input<&Rope::q>, Optional<&Rope::k>, Optional<&Rope::q_weight>, Optional<&Rope::k_weight>, Input<&Rope::cos>,
         Input<&Rope::sin>, Number<&Rope::eps>, Number<&Rope::weight_offset>, Optional<&Rope::positions>,
         Flag<&Rope::interleaved>, Optional<&Rope::v>, Optional<&Rope::slots>, OptionalUpdated<&Rope::k_cache>,
         OptionalUpdated<&Rope::v_cache>, Result<&Rope::q_out, 0>, Result<&Rope::k_out, 1>>;

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
PyMethodDef method(const char* name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace

PyMethodDef* methods() {
  static PyMethodDef all[] = {method("direct_begin", &begin),
                              method("direct_rms_norm", rms_norm),
                              method("direct_fused_add_rms_norm", fused_add_rms_norm),
                              method("direct_layer_norm", layer_norm),
                              method("direct_silu_and_mul", and_mul<FASTOPS_SILU>),
                              method("direct_gelu_and_mul_tanh", and_mul<FASTOPS_GELU_TANH>),
                              method("direct_gelu_and_mul_none", and_mul<FASTOPS_GELU>),
                              method("direct_swiglu", pair<FASTOPS_SILU>),
                              method("direct_geglu_tanh", pair<FASTOPS_GELU_TANH>),
                              method("direct_geglu_none", pair<FASTOPS_GELU>),
                              method("direct_apply_rope", apply_rope),
                              method("direct_qk_norm_rope", qk_norm_rope),
                              {nullptr, nullptr, 0, nullptr}};
  return all;
}

}  // namespace fastops::direct
