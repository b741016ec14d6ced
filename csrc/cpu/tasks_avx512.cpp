#include "tasks.h"
#include "vec_avx512.h"

namespace sfllava::cpu {

void run_tasks_avx512(const Pooling& p, int64_t begin, int64_t end) { run_tasks_with<Avx512>(p, begin, end); }

}  // namespace sfllava::cpu
