// What the CPU bindings share.
#pragma once

#include "library.h"

namespace sfllava {

inline void check_on_cpu(const Tensor& tensor, const char* name) {
  check(tensor.on(aoti_torch_device_type_cpu()), name, " must be on the CPU");
}

// Whether stores go around the cache: the output does not fit there, and its rows are whole lines of the cache.
// `steps`: its strides and the size of a row, in bytes.
inline bool should_stream(const void* out, std::initializer_list<int64_t> steps, int64_t bytes, int64_t least) {
  constexpr int64_t kLine = 64;
  int64_t low_bits = reinterpret_cast<intptr_t>(out);
  for (const int64_t step : steps) low_bits |= step;
  return low_bits % kLine == 0 && bytes >= least;
}

// body(begin, end) over [0, tasks) in torch's threads, each with at least about `least` units of work.
template <class Body>
void parallel_for(int64_t tasks, int64_t work_of_each, int64_t least, const Body& body) {
  const int64_t grain = work_of_each < least ? least / (work_of_each < 1 ? 1 : work_of_each) : 1;
  const auto run = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  check(torch_parallel_for(0, tasks, grain, run, const_cast<Body*>(&body)) == 0, "torch's thread pool failed");
}

}  // namespace sfllava
