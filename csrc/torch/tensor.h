// Tensor arguments of a boxed kernel, and what every binding checks.
#pragma once

#include <stdexcept>
#include <string>

#include "sfllava/dtype.h"
#include "sfllava/plan.h"
#include "stable_abi.h"

namespace sfllava {

inline void check(bool ok, const char* message) {
  if (!ok) throw std::runtime_error(std::string("sfllava_fast: ") + message);
}

// The stack hands over its ownership.
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
  bool on(int32_t device_type) const { return get<int32_t>(aoti_torch_get_device_type) == device_type; }
  // Of the same shape as `other`, without gaps.
  bool is_contiguous_like(const Tensor& other) const {
    if (dim() != other.dim()) return false;
    int64_t step = 1;
    for (int i = static_cast<int>(dim()) - 1; i >= 0; step *= size(i--)) {
      if (size(i) != other.size(i) || (size(i) > 1 && stride(i) != step)) return false;
    }
    return true;
  }
  void* data() const { return get<void*>(aoti_torch_get_data_ptr); }

  template <class T>
  T get(AOTITorchError (*read)(AtenTensorHandle, T*)) const {
    T value{};
    check(read(handle_, &value) == 0, "torch could not describe a tensor");
    return value;
  }

 private:
  AtenTensorHandle handle_;
};

inline Dtype kernel_dtype(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return Dtype::kFloat32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::kBFloat16;
  check(dtype == aoti_torch_dtype_float16(), "features must be float32, bfloat16 or float16");
  return Dtype::kFloat16;
}

inline bool is_table(const Tensor& tensor) {
  return tensor.dim() == 1 && tensor.dtype() == aoti_torch_dtype_int32() &&
         (tensor.size(0) <= 1 || tensor.stride(0) == 1);
}

// Everything but the devices; `tokens` are those of a forward, or their gradient.
inline void check_tensors(const Tensor& features, const Tensor& plan, const Tensor& tokens) {
  check(features.dim() == 3 && tokens.dim() == 2,
        "features must be [frames, patches, channels] and tokens [tokens, channels]");
  check(tokens.dtype() == features.dtype() && tokens.size(1) == features.size(2),
        "tokens must have the features' dtype and channels");
  const bool unit = features.size(2) <= 1 || (features.stride(2) == 1 && tokens.stride(1) == 1);
  check(unit, "features and tokens need unit stride over channels");
  check(is_table(plan), "the plan must be a contiguous int32 table");
  const char* wrong = check_plan(static_cast<const int32_t*>(plan.data()), plan.size(0), features.size(0),
                                 features.size(1), tokens.size(0));
  check(!wrong, wrong);
}

}  // namespace sfllava
