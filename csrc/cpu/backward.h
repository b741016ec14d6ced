// The aggregator's backward: raw pointers in, raw pointers out.
#pragma once

#include <cstdint>

#include "sfllava/dtype.h"
#include "sfllava/plan.h"

namespace sfllava::cpu {

// The tokens' gradient [tokens, channels] and the patches [frames, patches, channels] that maxima chose from, both with
// unit channel stride; the gradient of the patches, without gaps. Strides count elements.
struct Backward {
  Plan plan;
  const void* grad;
  int64_t token_stride;
  const void* features;
  int64_t frame_stride, patch_stride;
  void* out;
  int64_t channels;
  Dtype dtype;
  bool stream;  // non-temporal stores: every patch of `out` is aligned to 64 bytes, and it outgrows the cache
};

// The work is cut into tasks that write disjoint patches; any order and any split gives the same bits.
int64_t count_tasks(const Backward& backward);

// Runs tasks [begin, end) in the calling thread.
void run_tasks(const Backward& backward, int64_t begin, int64_t end);

}  // namespace sfllava::cpu
