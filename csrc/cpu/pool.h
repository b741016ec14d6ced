// The CPU aggregator: raw pointers in, raw pointers out.
#pragma once

#include <cstdint>

#include "sfllava/dtype.h"
#include "sfllava/plan.h"

namespace sfllava::cpu {

// One call: patches [frames, patches, channels] and tokens [tokens, channels], both with unit channel stride.
// Strides count elements.
struct Pooling {
  Plan plan;
  const void* features;
  int64_t frame_stride, patch_stride;
  void* out;
  int64_t token_stride;
  int64_t channels;
  Dtype dtype;
  bool stream;  // non-temporal stores: every token row is aligned to 64 bytes, and the output outgrows the cache
};

// The work is cut into tasks that write disjoint tokens; any order and any split gives the same bits.
int64_t count_tasks(const Plan& plan);

// Runs tasks [begin, end) in the calling thread.
void run_tasks(const Pooling& pooling, int64_t begin, int64_t end);

// The instruction set that is used: "avx512", "avx2" or "generic". `force_isa` picks one by name, or the best
// one for nullptr; false if this processor or this build lacks it.
const char* isa_name();
bool force_isa(const char* name);

}  // namespace sfllava::cpu
