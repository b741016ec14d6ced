// sfllava_fast::pool_gpu(Tensor features, Tensor plan, Tensor table, Tensor(a!) out) -> () on CUDA. The schema is
// defined in Python.

#include "../cuda/launch.h"
#include "stable_abi_cuda.h"
#include "tensor.h"

namespace {

using namespace sfllava;

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    check(aoti_torch_create_device_guard(device, &handle_) == 0, "torch could not switch to the features' device");
  }
  ~DeviceGuard() { aoti_torch_delete_device_guard(handle_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  DeviceGuardHandle handle_ = nullptr;
};

int32_t device_of(const Tensor& tensor) { return tensor.get<int32_t>(aoti_torch_get_device_index); }

void check_devices(const Tensor& features, const Tensor& plan, const Tensor& table, const Tensor& out) {
  const int32_t cuda = aoti_torch_device_type_cuda();
  check(features.on(cuda) && table.on(cuda) && out.on(cuda), "features, table and out must be on a CUDA device");
  const int32_t device = device_of(features);
  check(device_of(table) == device && device_of(out) == device, "features, table and out must be on one device");
  check(plan.on(aoti_torch_device_type_cpu()), "the plan must be on the CPU");
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
  check(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "torch has no current stream");
  return stream;
}

// The table's numbers are taken on trust: reading them would wait for the device.
void pool(const Tensor& features, const Tensor& plan, const Tensor& table, const Tensor& out) {
  check_devices(features, plan, table, out);
  check_tensors(features, plan, out);
  check(is_table(table) && table.size(0) == plan.size(0), "the table must be the plan on the features' device");
  const gpu::Pooling pooling{
      {static_cast<const int32_t*>(plan.data())},
      static_cast<const int32_t*>(table.data()),
      {features.data(), features.stride(0), features.stride(1), out.data(), out.stride(0), features.size(2)},
      kernel_dtype(features.dtype())};
  const int32_t device = device_of(features);
  const DeviceGuard guard(device);
  if (features.size(2) == 0 || pooling.plan.groups() == 0) return;
  const char* wrong = gpu::pool(pooling, current_stream(device));
  check(!wrong, wrong);
}

void boxed_pool(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor features(stack[0]), plan(stack[1]), table(stack[2]), out(stack[3]);
  pool(features, plan, table, out);
}

struct Registration {
  Registration() {
    constexpr uint64_t kTorch210 = (2ULL << 56) | (10ULL << 48);
    TorchLibraryHandle library = nullptr;
    check(aoti_torch_library_init_impl("sfllava_fast", "CUDA", __FILE__, __LINE__, &library) == 0 &&
              torch_library_impl(library, "pool_gpu", boxed_pool, kTorch210) == 0,
          "torch did not take the CUDA kernel");
  }
} registration;

}  // namespace

// For `info` and the tests, through ctypes. "tile" or "box": the path of a plan whose pointers and strides are
// aligned; null for a table that is not sound.
extern "C" __attribute__((visibility("default"))) const char* sfllava_cuda_path(const int32_t* table, int64_t size) {
  if (size < kHeader) return nullptr;
  const Plan plan{table};
  if (check_plan(table, size, plan.frames(), plan.patches(), plan.tokens())) return nullptr;
  return gpu::is_tiled(plan) ? "tile" : "box";
}

// What the kernels were compiled for, such as "80;90;100;120+PTX".
extern "C" __attribute__((visibility("default"))) const char* sfllava_cuda_archs() { return SFLLAVA_CUDA_ARCHS; }
