#include "tasks.h"
#include "vec_avx2.h"

namespace sfllava::cpu {

void run_tasks_avx2(const Pooling& p, int64_t begin, int64_t end) { run_tasks_with<Avx2>(p, begin, end); }

}  // namespace sfllava::cpu
