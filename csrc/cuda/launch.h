// The GPU aggregator: raw pointers and a stream in.
#pragma once

#include "sfllava/dtype.h"
#include "sfllava/geometry.h"

namespace sfllava::gpu {

// Patches [frames, patches, channels] and tokens [tokens, channels] on the device, both with unit channel stride.
// Strides count elements. A backward reads the tokens' gradient and writes the patches' gradient, without gaps.
struct Tensors {
  const void* features;
  int64_t frame_stride, patch_stride;
  const void* grad;  // of the tokens; a forward has none
  void* out;
  int64_t token_stride;  // of the tokens, or of their gradient
  int64_t channels;
};

enum class Direction { kForward, kBackward };

// One call; `plan` is the checked table on the host, `table` the same numbers on the device.
struct Pooling {
  Direction direction;
  Plan plan;
  const int32_t* table;
  Tensors tensors;
  Dtype dtype;
};

// What a kernel gets to know.
struct Launch {
  Plan plan;  // on the device
  Tensors tensors;
  Grid grid;
  int32_t units;
  int64_t vectors;  // per row of channels
  int32_t shares;   // of a group, on the box path of a forward
  Nest nest;        // on the tile path
};

enum class Path { kTile, kBox };

// How a call is served; `packed`: 16 bytes a lane, not one element.
struct Choice {
  Direction direction;
  Path path;
  bool packed;
  Launch launch;
};

Choice choose(const Pooling& pooling);

// Whether the tile path serves the plan where pointers and strides are aligned.
bool is_tiled(const Plan& plan, Direction direction);

// Launches the kernel on the current device; null, or what CUDA says went wrong. `stream` is a cudaStream_t.
// The call must have tokens and channels.
const char* pool(const Pooling& pooling, void* stream);

}  // namespace sfllava::gpu
