#include "tasks.h"
#include "vec_generic.h"

namespace sfllava::cpu {

void run_tasks_generic(const Pooling& p, int64_t begin, int64_t end) { run_tasks_with<Generic>(p, begin, end); }

}  // namespace sfllava::cpu
