// Calls to the C API's functions, for the CPU and for CUDA.
#include <cstdlib>
#include <memory>
#include <new>

#include "torch/tensor.h"

namespace fastops::binding {
namespace {

struct DeleteGuard {
  void operator()(DeviceGuardOpaque* guard) const { aoti_torch_delete_device_guard(guard); }
};

void torch_threads(void*, int64_t n, int64_t grain, fastops_range_fn f, void* arg) {
  struct Call {
    fastops_range_fn f;
    void* arg;
  } call{f, arg};
  check_shim(torch_parallel_for(
      0, n, grain,
      [](int64_t begin, int64_t end, void* ctx) {
        auto* c = static_cast<Call*>(ctx);
        c->f(c->arg, begin, end);
      },
      &call));
}

// One per thread, grown to what the C API asks (at most 1 MiB per worker for attention) and reused by every call.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void reserve(size_t bytes) {
    if (bytes <= size_) return;
    std::free(data_);
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = std::aligned_alloc(64, size_);
    if (data_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};
Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}

}  // namespace

fastops_status run_on_cpu(fastops_torch_function run, fastops_torch_workspace workspace, const void* desc,
                          char* message) {
  uint32_t threads = 1;
  check_shim(torch_get_num_threads(&threads));
  fastops_env env{};
  env.struct_size = sizeof env;
  env.num_threads = static_cast<int32_t>(threads);
  env.parallel_for = &torch_threads;
  env.message = message;
  env.workspace = scratch().data();
  env.workspace_size = scratch().size();
  fastops_status status = run(desc, &env);
  if (status == FASTOPS_ERR_WORKSPACE && workspace != nullptr) {  // the kept one turned out too small
    size_t bytes = 0;
    status = workspace(desc, &env, &bytes);
    if (status == FASTOPS_OK) {
      scratch().reserve(bytes);
      env.workspace = scratch().data();
      env.workspace_size = scratch().size();
      status = run(desc, &env);
    }
  }
  if (status == FASTOPS_OK) remember_variant(env.variant);
  return status;
}

// The launches go on the device's current stream; the workspace is the allocator's, which gives it to work behind them
// only.
void Place::on_cuda(CudaFunction function, const void* desc) const {
  const Library* library = library_for(gpu_);
  if (library == nullptr || function == kNotOnCuda)
    raise(FASTOPS_ERR_UNSUPPORTED, gpu_ ? "no kernels for this GPU are loaded" : "the emulator is not loaded");
  std::unique_ptr<DeviceGuardOpaque, DeleteGuard> guard;
  if (gpu_) {
    int32_t now = 0;
    check_shim(aoti_torch_get_current_device_index(&now));
    if (now != index_) {
      DeviceGuardHandle handle = nullptr;
      check_shim(aoti_torch_create_device_guard(index_, &handle));
      guard.reset(handle);
    }
  }
  char message[FASTOPS_MESSAGE_SIZE] = "";
  fastops_cuda_env env{};
  env.struct_size = sizeof env;
  env.message = message;
  prepare(&env, gpu_, index_);
  OptTensor workspace;
  fastops_status status = FASTOPS_OK;
  if (library->workspace[function] != nullptr) {
    size_t bytes = 0;
    status = library->workspace[function](desc, &env, &bytes);
    if (status == FASTOPS_OK && bytes != 0) {
      workspace = empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
      env.workspace = workspace->mutable_data_ptr();
      env.workspace_size = bytes;
    }
  }
  if (status == FASTOPS_OK) status = library->run[function](desc, &env);
  if (status != FASTOPS_OK) raise(status, message);
  remember_variant(env.variant);
}

}  // namespace fastops::binding

extern "C" {

fastops_status fastops_torch_run(fastops_torch_function run, fastops_torch_workspace workspace, const void* desc,
                                 char* message) {
  try {
    return fastops::binding::run_on_cpu(run, workspace, desc, message);
  } catch (const std::exception&) {
    return FASTOPS_ERR_INTERNAL;
  }
}

void* fastops_torch_empty(const int64_t* size, const int64_t* stride, int ndim, fastops_dtype dtype) {
  using fastops::binding::ScalarType;
  static constexpr ScalarType kTypes[] = {ScalarType::Undefined, ScalarType::Float,        ScalarType::Half,
                                          ScalarType::BFloat16,  ScalarType::Int,          ScalarType::Long,
                                          ScalarType::Bool,      ScalarType::Double,       ScalarType::Byte,
                                          ScalarType::Char,      ScalarType::Float8_e4m3fn};
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(ndim, size, stride, static_cast<int32_t>(kTypes[dtype]),
                                                        aoti_torch_device_type_cpu(), 0, &handle);
  return error == AOTI_TORCH_SUCCESS ? handle : nullptr;
}
void fastops_torch_release(void* tensor) { aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(tensor)); }

int fastops_torch_on_cpu(void) { return (fastops::binding::mode() & fastops::binding::kEmulate) == 0; }
int fastops_torch_records(void) { return aoti_torch_grad_mode_is_enabled(); }

}  // extern "C"
