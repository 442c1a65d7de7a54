// torch tensors as C API views, outputs, threads and scratch, and the function a device's tensors go to: all that a
// binding needs (docs/design/001-torch-binding.md).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "fastops/fastops.h"
#include "torch/libraries.h"
#include "torch/run.h"

namespace fastops::binding {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline void check_shim(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("fastops.InternalError: a torch call failed");
}

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  check_shim(aoti_torch_get_dtype(t.get(), &dtype));
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Float:
      return FASTOPS_F32;
    case ScalarType::Half:
      return FASTOPS_F16;
    case ScalarType::BFloat16:
      return FASTOPS_BF16;
    case ScalarType::Int:
      return FASTOPS_I32;
    case ScalarType::Long:
      return FASTOPS_I64;
    case ScalarType::Byte:
      return FASTOPS_U8;
    case ScalarType::Char:
      return FASTOPS_I8;
    case ScalarType::Float8_e4m3fn:
      return FASTOPS_F8_E4M3;
    case ScalarType::Bool:
      return FASTOPS_BOOL;
    case ScalarType::Double:
      return FASTOPS_F64;
    default:
      return FASTOPS_DTYPE_NONE;
  }
}

inline ScalarType scalar_type(const Tensor& t) {
  int32_t dtype = 0;
  check_shim(aoti_torch_get_dtype(t.get(), &dtype));
  return static_cast<ScalarType>(dtype);
}

// What no kernel takes, though the call is right.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void raise(fastops_status status, const char* message) {
  const char* kind = status == FASTOPS_ERR_VALUE         ? "fastops.ValueError: "
                     : status == FASTOPS_ERR_TYPE        ? "fastops.TypeError: "
                     : status == FASTOPS_ERR_UNSUPPORTED ? "fastops.NotSupportedError: "
                                                         : "fastops.InternalError: ";
  if (status == FASTOPS_ERR_UNSUPPORTED) throw Refusal(std::string(kind) + message);
  throw std::runtime_error(std::string(kind) + message);
}

// On torch's threads and this thread's scratch. May throw.
fastops_status run_on_cpu(fastops_torch_function run, fastops_torch_workspace workspace, const void* desc,
                          char* message);

// The instruction set the last call on this thread ran (read by fastops._C.last_variant).
extern "C" FASTOPS_API const char* fastops_torch_last_variant(void);
void remember_variant(const char* name);

// An operation of the C API: its function on the CPU, what asks for the workspace of that (or null), and on CUDA.
template <class Desc>
struct Function {
  fastops_status (*run)(const Desc*, fastops_env*);
  fastops_status (*workspace)(const Desc*, const fastops_env*, size_t*) = nullptr;
  CudaFunction cuda = kNotOnCuda;
};

// Where a call's tensors live: all where the first one does.
class Place {
 public:
  explicit Place(const Tensor& first) {
    check_shim(aoti_torch_get_device_type(first.get(), &type_));
    gpu_ = type_ != aoti_torch_device_type_cpu();
    if (gpu_) check_shim(aoti_torch_get_device_index(first.get(), &index_));
  }

  fastops_tensor view(const Tensor& t, const char* name) const {
    int32_t type = 0, index = 0;
    check_shim(aoti_torch_get_device_type(t.get(), &type));
    if (gpu_) check_shim(aoti_torch_get_device_index(t.get(), &index));
    if (type != type_ || index != index_)
      throw std::runtime_error(std::string("fastops.TypeError: ") + name +
                               (gpu_ ? " is on another device" : " is not on the CPU"));
    fastops_tensor r{};
    const auto sizes = t.sizes();
    const auto strides = t.strides();
    if (sizes.size() > FASTOPS_MAX_DIMS)
      throw std::runtime_error(std::string("fastops.ValueError: ") + name + " has " + std::to_string(sizes.size()) +
                               " dimensions, at most 5 are known");
    r.ndim = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) {
      r.size[i] = sizes[i];
      r.stride[i] = strides[i];
    }
    r.data = const_cast<void*>(t.const_data_ptr());
    r.dtype = dtype_of(t);
    return r;
  }
  fastops_tensor view(const OptTensor& t, const char* name) const { return t ? view(*t, name) : fastops_tensor{}; }

  Tensor empty(const int64_t* sizes, size_t dims, ScalarType dtype) const {
    int64_t strides[FASTOPS_MAX_DIMS], step = 1;
    for (size_t i = dims; i-- > 0;) {
      strides[i] = step;
      step *= sizes[i] > 0 ? sizes[i] : 1;
    }
    AtenTensorHandle handle = nullptr;
    check_shim(aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes, strides, static_cast<int32_t>(dtype), type_,
                                        index_, &handle));
    return Tensor(handle);
  }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return empty(sizes.begin(), sizes.size(), dtype);
  }

  // Whether the CUDA kernels take the call: on a GPU, or emulated.
  bool cuda() const { return gpu_ || (mode() & kEmulate) != 0; }

  template <class Desc>
  void call(const Function<Desc>& f, const Desc& d) const {
    if (gpu_ || (f.cuda != kNotOnCuda && cuda()))
      on_cuda(f.cuda, &d);
    else
      on_cpu(f, d);
  }

 private:
  template <class Desc>
  static void on_cpu(const Function<Desc>& f, const Desc& d) {
    char message[FASTOPS_MESSAGE_SIZE] = "";
    const fastops_status status = run_on_cpu(reinterpret_cast<fastops_torch_function>(f.run),
                                             reinterpret_cast<fastops_torch_workspace>(f.workspace), &d, message);
    if (status != FASTOPS_OK) raise(status, message);
  }

  void on_cuda(CudaFunction function, const void* desc) const;

  int32_t type_ = 0, index_ = 0;
  bool gpu_ = false;
};

}  // namespace fastops::binding
