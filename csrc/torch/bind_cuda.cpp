// On CUDA, their schemas defined in Python:
// sfllava_fast::pool_gpu(Tensor features, Tensor plan, Tensor table, Tensor(a!) out) -> ()
// sfllava_fast::pool_backward_gpu(Tensor grad, Tensor features, Tensor plan, Tensor table, Tensor(a!) out) -> ()

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

void check_device(const Tensor& tensor, int32_t device) {
  const bool there = tensor.on(aoti_torch_device_type_cuda()) && device_of(tensor) == device;
  check(there, "features, tokens and table must be on one CUDA device");
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
  check(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "torch has no current stream");
  return stream;
}

// The table's numbers are taken on trust: reading them would wait for the device.
void check_tables(const Tensor& plan, const Tensor& table) {
  check(plan.on(aoti_torch_device_type_cpu()), "the plan must be on the CPU");
  check(is_table(table) && table.size(0) == plan.size(0), "the table must be the plan on the features' device");
}

void launch(gpu::Direction direction, const Tensor& features, const Tensor& plan, const Tensor& table,
            const gpu::Tensors& tensors) {
  const int32_t device = device_of(features);
  const DeviceGuard guard(device);
  const gpu::Pooling pooling{direction, Plan(static_cast<const int32_t*>(plan.data())),
                             static_cast<const int32_t*>(table.data()), tensors, kernel_dtype(features.dtype())};
  if (tensors.channels == 0 || pooling.plan.groups() == 0) return;
  const char* wrong = gpu::pool(pooling, current_stream(device));
  check(!wrong, wrong);
}

void pool(const Tensor& features, const Tensor& plan, const Tensor& table, const Tensor& out) {
  for (const Tensor* tensor : {&features, &table, &out}) check_device(*tensor, device_of(features));
  check_tables(plan, table);
  check_tensors(features, plan, out);
  launch(gpu::Direction::kForward, features, plan, table,
         {features.data(), features.stride(0), features.stride(1), nullptr, out.data(), out.stride(0),
          features.size(2)});
}

void spread(const Tensor& grad, const Tensor& features, const Tensor& plan, const Tensor& table, const Tensor& out) {
  for (const Tensor* tensor : {&features, &grad, &table, &out}) check_device(*tensor, device_of(features));
  check_tables(plan, table);
  check_tensors(features, plan, grad);
  check(out.dtype() == features.dtype() && out.is_contiguous_like(features),
        "out must have the features' dtype and shape, and be contiguous");
  launch(gpu::Direction::kBackward, features, plan, table,
         {features.data(), features.stride(0), features.stride(1), grad.data(), out.data(), grad.stride(0),
          features.size(2)});
}

void boxed_pool(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor features(stack[0]), plan(stack[1]), table(stack[2]), out(stack[3]);
  pool(features, plan, table, out);
}

void boxed_spread(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad(stack[0]), features(stack[1]), plan(stack[2]), table(stack[3]), out(stack[4]);
  spread(grad, features, plan, table, out);
}

struct Registration {
  Registration() {
    constexpr uint64_t kTorch210 = (2ULL << 56) | (10ULL << 48);
    TorchLibraryHandle library = nullptr;
    check(aoti_torch_library_init_impl("sfllava_fast", "CUDA", __FILE__, __LINE__, &library) == 0 &&
              torch_library_impl(library, "pool_gpu", boxed_pool, kTorch210) == 0 &&
              torch_library_impl(library, "pool_backward_gpu", boxed_spread, kTorch210) == 0,
          "torch did not take the CUDA kernels");
  }
} registration;

}  // namespace

// For the tests, through ctypes. "tile" or "box": the forward's path for a plan whose pointers and strides are aligned;
// null for a table that is not sound.
extern "C" __attribute__((visibility("default"))) const char* sfllava_cuda_path(const int32_t* table, int64_t size) {
  if (size < kHeader) return nullptr;
  if (check_plan(table, size, table[2], table[1], table[3])) return nullptr;
  return gpu::is_tiled(Plan(table), gpu::Direction::kForward) ? "tile" : "box";
}

// What the kernels were compiled for, such as "80;90;100;120+PTX".
extern "C" __attribute__((visibility("default"))) const char* sfllava_cuda_archs() { return SFLLAVA_CUDA_ARCHS; }
