// The best way to prefetch on each processor that was measured.
#pragma once

#include <cstdint>

namespace sfllava::cpu {

// What is prefetched while some patches are read.
enum class Prefetch {
  kNextStep,  // the patches after them, one after the other, into the second-level cache
  kStreams,   // of each patch the line kAheadBytes on, into the first-level cache
};
constexpr int64_t kAheadBytes = 1280;

struct Tuning {
  const char* processor;
  const char* name;    // of the way to prefetch
  int32_t amd_family;  // 0: any processor
  Prefetch prefetch;
};

// The one that is used.
const Tuning& tuning();

// Picks one by its name, or this processor's for nullptr; false if there is none.
bool force_tuning(const char* name);

}  // namespace sfllava::cpu
