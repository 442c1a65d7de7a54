// Calls to the CUDA half of the C API.
#include <memory>

#include "torch/tensor.h"

namespace fastops::binding {
namespace {

struct DeleteGuard {
  void operator()(DeviceGuardOpaque* guard) const { aoti_torch_delete_device_guard(guard); }
};

}  // namespace

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
