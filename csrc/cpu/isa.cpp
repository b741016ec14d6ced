#include "isa.h"

#include <cstring>

namespace sfllava::cpu {

extern const Isa avx512_isa, avx2_isa, generic_isa;

namespace {

bool supported(const Isa& isa) {
#if defined(SFLLAVA_X86)
  if (&isa == &avx512_isa) return __builtin_cpu_supports("avx512f");
  if (&isa == &avx2_isa) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return &isa == &generic_isa;
}

const Isa* const kIsas[] = {
#if defined(SFLLAVA_X86)
    &avx512_isa,
    &avx2_isa,
#endif
    &generic_isa,
};

const Isa* find_isa(const char* name) {
  for (const Isa* isa : kIsas) {
    if ((!name || std::strcmp(name, isa->name) == 0) && supported(*isa)) return isa;
  }
  return nullptr;
}

const Isa* current = find_isa(nullptr);

}  // namespace

const Isa& isa() { return *current; }

bool force_isa(const char* name) {
  const Isa* isa = find_isa(name);
  if (isa) current = isa;
  return isa != nullptr;
}

}  // namespace sfllava::cpu
