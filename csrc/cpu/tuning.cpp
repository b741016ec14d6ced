#include "tuning.h"

#include <cstring>

#if defined(SFLLAVA_X86)
#include <cpuid.h>
#endif

namespace sfllava::cpu {
namespace {

// Share of copy_ in float32 4096, bfloat16 4096, float16 4096, bfloat16 1024, float16 1024, one thread, AVX-512; "none"
// is the kernel before, which kept the sums of several boxes and prefetched nothing:
//   AMD family 25 model 17 (Zen 4): next step 1.08 1.16 .88 .82 .83; none .99 1.03 .89 .70 .69;
//                                   streams .81 .75-.80 .71-.84 .60-.66 .63-.67, each 5 to 10 % slower than none.
//   AMD family 26 (Zen 5): streams .89 .84 .84 .82 .84; none .81 .56 .57 .58 .59. The next step was not tried there.
// A Zen 4 reads one long stream at the rate of a copy, and six at once, 2 KB apart, at little more than half of it.
constexpr Tuning kTunings[] = {
    {"AMD family 26", "streams", 26, Prefetch::kStreams},
    {"any other processor, measured on AMD family 25 model 17", "next step", 0, Prefetch::kNextStep},
};

// 0: of another vendor.
int32_t amd_family() {
#if defined(SFLLAVA_X86)
  uint32_t most = 0, a = 0, b = 0, c = 0, d = 0;
  char vendor[12];
  if (!__get_cpuid(0, &most, &b, &c, &d)) return 0;
  std::memcpy(vendor, &b, 4);
  std::memcpy(vendor + 4, &d, 4);
  std::memcpy(vendor + 8, &c, 4);
  if (std::memcmp(vendor, "AuthenticAMD", 12) != 0 || !__get_cpuid(1, &a, &b, &c, &d)) return 0;
  return static_cast<int32_t>((a >> 8 & 15) + (a >> 20 & 255));
#else
  return 0;
#endif
}

const Tuning* find_tuning(const char* name) {
  const int32_t family = amd_family();
  for (const Tuning& tuning : kTunings) {
    const bool fits = name ? std::strcmp(name, tuning.name) == 0 : !tuning.amd_family || tuning.amd_family == family;
    if (fits) return &tuning;
  }
  return nullptr;
}

const Tuning* current = find_tuning(nullptr);

}  // namespace

const Tuning& tuning() { return *current; }

bool force_tuning(const char* name) {
  const Tuning* tuning = find_tuning(name);
  if (tuning) current = tuning;
  return tuning != nullptr;
}

}  // namespace sfllava::cpu
