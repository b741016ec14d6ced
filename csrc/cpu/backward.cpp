#include "backward.h"

#include "isa.h"
#include "spread.h"

namespace sfllava::cpu {

int64_t count_tasks(const Backward& b) { return int64_t{b.plan.frames()} * kBands; }

void run_tasks(const Backward& b, int64_t begin, int64_t end) { isa().backward(b, begin, end); }

}  // namespace sfllava::cpu
