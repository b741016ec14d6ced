// sfllava_fast::pool(Tensor features, Tensor plan, Tensor(a!) out) -> () on the CPU. The schema is defined in Python.

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../cpu/pool.h"
#include "stable_abi.h"

namespace {

using namespace sfllava;

void check(bool ok, const char* message) {
  if (!ok) throw std::runtime_error(std::string("sfllava_fast::pool: ") + message);
}

// A tensor argument: the stack hands over its ownership.
class Tensor {
 public:
  explicit Tensor(StableIValue value) : handle_(reinterpret_cast<AtenTensorHandle>(value)) {}
  ~Tensor() { aoti_torch_delete_tensor_object(handle_); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t size(int i) const { return get<int64_t*>(aoti_torch_get_sizes)[i]; }
  int64_t stride(int i) const { return get<int64_t*>(aoti_torch_get_strides)[i]; }
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  bool on_cpu() const { return get<int32_t>(aoti_torch_get_device_type) == aoti_torch_device_type_cpu(); }
  void* data() const { return get<void*>(aoti_torch_get_data_ptr); }

 private:
  template <class T>
  T get(AOTITorchError (*read)(AtenTensorHandle, T*)) const {
    T value{};
    check(read(handle_, &value) == 0, "torch could not describe a tensor");
    return value;
  }

  AtenTensorHandle handle_;
};

cpu::Dtype kernel_dtype(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return cpu::Dtype::kFloat32;
  if (dtype == aoti_torch_dtype_bfloat16()) return cpu::Dtype::kBFloat16;
  check(dtype == aoti_torch_dtype_float16(), "features must be float32, bfloat16 or float16");
  return cpu::Dtype::kFloat16;
}

// Stores go around the cache where the output would not fit there anyway and its rows are lines of the cache.
bool should_stream(const Tensor& out, int64_t element_size) {
  constexpr int64_t kLine = 64, kLarge = 4 << 20;
  const int64_t row = out.size(1) * element_size, pitch = out.stride(0) * element_size;
  const bool aligned = reinterpret_cast<uintptr_t>(out.data()) % kLine == 0 && row % kLine == 0 && pitch % kLine == 0;
  return aligned && row * out.size(0) >= kLarge;
}

void check_tensors(const Tensor& features, const Tensor& plan, const Tensor& out) {
  check(features.on_cpu() && plan.on_cpu() && out.on_cpu(), "features, plan and out must be on the CPU");
  check(features.dim() == 3 && out.dim() == 2, "features must be [frames, patches, channels] and out [tokens, channels]");
  check(out.dtype() == features.dtype() && out.size(1) == features.size(2), "out must have the features' dtype and channels");
  const bool unit = features.size(2) <= 1 || (features.stride(2) == 1 && out.stride(1) == 1);
  check(unit, "features and out need unit stride over channels");
  check(plan.dim() == 1 && plan.dtype() == aoti_torch_dtype_int32() && (plan.size(0) <= 1 || plan.stride(0) == 1),
        "the plan must be a contiguous int32 table");
  const char* wrong = check_plan(static_cast<const int32_t*>(plan.data()), plan.size(0), features.size(0),
                                 features.size(1), out.size(0));
  check(!wrong, wrong);
}

void pool(const Tensor& features, const Tensor& plan, const Tensor& out) {
  check_tensors(features, plan, out);
  if (features.size(2) == 0) return;
  const cpu::Dtype dtype = kernel_dtype(features.dtype());
  cpu::Pooling pooling{{static_cast<const int32_t*>(plan.data())},
                       features.data(), features.stride(0), features.stride(1),
                       out.data(),      out.stride(0),      features.size(2),
                       dtype,           should_stream(out, dtype == cpu::Dtype::kFloat32 ? 4 : 2)};
  const int64_t tasks = cpu::count_tasks(pooling.plan);
  // Threads pay from about a quarter of a million elements each.
  const int64_t per_task = std::max<int64_t>(1, features.size(0) * features.size(1) * features.size(2) / std::max<int64_t>(1, tasks));
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / per_task);
  const auto body = [](int64_t begin, int64_t end, void* context) {
    cpu::run_tasks(*static_cast<const cpu::Pooling*>(context), begin, end);
  };
  check(torch_parallel_for(0, tasks, grain, body, &pooling) == 0, "torch's thread pool failed");
}

void boxed_pool(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor features(stack[0]), plan(stack[1]), out(stack[2]);
  pool(features, plan, out);
}

struct Registration {
  Registration() {
    constexpr uint64_t kTorch210 = (2ULL << 56) | (10ULL << 48);
    TorchLibraryHandle library = nullptr;
    check(aoti_torch_library_init_impl("sfllava_fast", "CPU", __FILE__, __LINE__, &library) == 0 &&
              torch_library_impl(library, "pool", boxed_pool, kTorch210) == 0,
          "torch did not take the CPU kernel");
  }
} registration;

}  // namespace

// For `info` and the tests, through ctypes.
extern "C" __attribute__((visibility("default"))) const char* sfllava_isa() { return cpu::isa_name(); }
extern "C" __attribute__((visibility("default"))) bool sfllava_force_isa(const char* name) { return cpu::force_isa(name); }
