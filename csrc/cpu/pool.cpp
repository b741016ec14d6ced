#include "pool.h"

#include <cstdlib>
#include <cstring>
#include <memory>

#include "tasks.h"

namespace sfllava::cpu {

using RunTasks = void (*)(const Pooling&, int64_t, int64_t);
void run_tasks_avx512(const Pooling&, int64_t, int64_t);
void run_tasks_avx2(const Pooling&, int64_t, int64_t);
void run_tasks_generic(const Pooling&, int64_t, int64_t);

namespace {

struct Isa {
  const char* name;
  RunTasks run;
};

bool supported(const Isa& isa) {
#if defined(SFLLAVA_X86)
  if (std::strcmp(isa.name, "avx512") == 0) return __builtin_cpu_supports("avx512f");
  if (std::strcmp(isa.name, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
#endif
  return true;
}

const Isa kIsas[] = {
#if defined(SFLLAVA_X86)
    {"avx512", run_tasks_avx512},
    {"avx2", run_tasks_avx2},
#endif
    {"generic", run_tasks_generic},
};

const Isa* find_isa(const char* name) {
  for (const Isa& isa : kIsas) {
    if ((!name || std::strcmp(name, isa.name) == 0) && supported(isa)) return &isa;
  }
  return nullptr;
}

const Isa* current = find_isa(nullptr);

}  // namespace

float* thread_sums(int64_t channels) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> sums;
  thread_local int64_t size = 0;
  const int64_t needed = count_sums(channels) * static_cast<int64_t>(sizeof(float));
  if (needed > size) {
    sums.reset(static_cast<float*>(std::aligned_alloc(kLineBytes, needed)));
    size = needed;
  }
  return sums.get();
}

int64_t count_tasks(const Plan& plan) { return int64_t{plan.groups()} * most_bands(plan); }

void run_tasks(const Pooling& p, int64_t begin, int64_t end) { current->run(p, begin, end); }

const char* isa_name() { return current->name; }

bool force_isa(const char* name) {
  const Isa* isa = find_isa(name);
  if (isa) current = isa;
  return isa != nullptr;
}

}  // namespace sfllava::cpu
