// The kernels for one element type; each is a source file of its own, to compile side by side.
#pragma once

#include "lanes.h"

namespace sfllava::gpu {

// Blocks that a multiprocessor must have registers for: ptxas takes too few for some and spills. A strip of boxes of
// two rows holds twice as much.
template <Direction kDirection, class Shape>
constexpr int kTileBlocks = Shape::kBoxHeight == 1 ? kTuning<kDirection>.blocks : kTuning<kDirection>.blocks * 3 / 5;
constexpr int box_blocks(Direction direction) { return direction == Direction::kForward ? 8 : 4; }

// clang-format off: it takes the products for pointers
template <Direction kDirection, class T, class Shape>
__global__ __launch_bounds__(kWarp * kTuning<kDirection>.warps, kTileBlocks<kDirection, Shape>)
void tile_kernel(const __grid_constant__ Launch launch) {
  run_tile_lane<kDirection, T, Shape>(launch, blockIdx.x, threadIdx.x, threadIdx.y);
}

template <Direction kDirection, class T, int N>
__global__ __launch_bounds__(kWarp * kBlockWarps, box_blocks(kDirection))
void box_kernel(const __grid_constant__ Launch launch) {
  run_box_lane<kDirection, T, N>(launch, blockIdx.x, threadIdx.x, threadIdx.y);
}
// clang-format on

template <Direction kDirection, class T>
void launch_one(const Choice& choice, cudaStream_t stream) {
  const Launch& call = choice.launch;
  const dim3 blocks(static_cast<unsigned>(call.grid.blocks)), lanes(call.grid.across, call.grid.down);
  if (choice.path == Path::kTile) {
    with_shape(call.nest,
               [&](auto shape) { tile_kernel<kDirection, T, decltype(shape)><<<blocks, lanes, 0, stream>>>(call); });
  } else if (choice.packed) {
    box_kernel<kDirection, T, kPackBytes / sizeof(T)><<<blocks, lanes, 0, stream>>>(call);
  } else {
    box_kernel<kDirection, T, 1><<<blocks, lanes, 0, stream>>>(call);
  }
}

template <class T>
cudaError_t launch(const Choice& choice, cudaStream_t stream) {
  if (choice.direction == Direction::kForward) {
    launch_one<Direction::kForward, T>(choice, stream);
  } else {
    launch_one<Direction::kBackward, T>(choice, stream);
  }
  return cudaGetLastError();
}

}  // namespace sfllava::gpu
