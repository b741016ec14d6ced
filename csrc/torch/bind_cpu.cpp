// sfllava_fast::pool(Tensor features, Tensor plan, Tensor(a!) out) -> () on the CPU. The schema is defined in Python.

#include <algorithm>

#include "../cpu/pool.h"
#include "tensor.h"

namespace {

using namespace sfllava;

// Stores go around the cache where the output would not fit there anyway and its rows are lines of the cache.
bool should_stream(const Tensor& out, int64_t element_size) {
  constexpr int64_t kLine = 64, kLarge = 4 << 20;
  const int64_t row = out.size(1) * element_size, pitch = out.stride(0) * element_size;
  const bool aligned = reinterpret_cast<uintptr_t>(out.data()) % kLine == 0 && row % kLine == 0 && pitch % kLine == 0;
  return aligned && row * out.size(0) >= kLarge;
}

void pool(const Tensor& features, const Tensor& plan, const Tensor& out) {
  const int32_t cpu_device = aoti_torch_device_type_cpu();
  check(features.on(cpu_device) && plan.on(cpu_device) && out.on(cpu_device),
        "features, plan and out must be on the CPU");
  check_tensors(features, plan, out);
  if (features.size(2) == 0) return;
  const Dtype dtype = kernel_dtype(features.dtype());
  cpu::Pooling pooling{Plan(static_cast<const int32_t*>(plan.data())),
                       features.data(), features.stride(0), features.stride(1),
                       out.data(),      out.stride(0),      features.size(2),
                       dtype,           should_stream(out, dtype == Dtype::kFloat32 ? 4 : 2)};
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
