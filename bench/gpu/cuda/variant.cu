// The default layout's bfloat16 tile kernel of one direction (-DVARIANT_DIRECTION) in one tuning (-DSFLLAVA_TUNING),
// behind a C function: bench/gpu/tune.py compiles one library for each.
#include "choose.cpp"
#include "kernels.h"

namespace sfllava::gpu {

constexpr Direction kDirection = Direction::VARIANT_DIRECTION;
using Default = Shape<6, 1, 2, kMax>;

static bool is_default(const Nest& nest) {
  return nest.width == Default::kWidth && nest.box_height == Default::kBoxHeight &&
         nest.box_width == Default::kBoxWidth && nest.fine_reduce == Default::kReduce;
}

// `plan` is the checked table on the host, `table` the same numbers on the device; the rest as in Tensors. A forward
// has no gradient. Null, or what is wrong.
extern "C" __attribute__((visibility("default"))) const char* sfllava_variant(
    const int32_t* plan, const int32_t* table, const void* features, int64_t frame_stride, int64_t patch_stride,
    const void* grad, void* out, int64_t token_stride, int64_t channels, void* stream) {
  const Tensors tensors{features, frame_stride, patch_stride, grad, out, token_stride, channels};
  const Choice choice = choose({kDirection, Plan(plan), table, tensors, Dtype::kBFloat16});
  const Launch& call = choice.launch;
  if (choice.path != Path::kTile || !is_default(call.nest)) return "not the default layout's tiles";
  const dim3 blocks(static_cast<unsigned>(call.grid.blocks)), lanes(call.grid.across, call.grid.down);
  tile_kernel<kDirection, BFloat16, Default><<<blocks, lanes, 0, static_cast<cudaStream_t>(stream)>>>(call);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace sfllava::gpu
