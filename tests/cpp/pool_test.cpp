// Pooling of random layouts, strides and sizes against a plain loop in double.
#include "support.h"

using namespace sfllava;
using namespace sfllava::test;

namespace {

struct Call {
  Layout layout;
  std::vector<int32_t> table;
  Dtype dtype;
  int64_t channels, patch_stride, frame_stride, token_stride;
  std::vector<uint8_t> features;
  std::vector<double> values;  // of the features

  double at(int64_t frame, int64_t patch, int64_t d) const {
    return values[frame * frame_stride + patch * patch_stride + d];
  }
};

Call random_call(Random& random, Dtype dtype) {
  constexpr int32_t kChannels[] = {1, 7, 15, 16, 31, 32, 33, 64, 100, 1030};
  Call call{random_layout(random), {}, dtype, kChannels[random.in(0, 9)], 0, 0, 0, {}, {}};
  call.table = make_table(call.layout);
  call.patch_stride = call.channels + random.in(0, 1) * random.in(0, 9);
  call.frame_stride = call.patch_stride * (call.layout.patches + random.in(0, 1));
  call.token_stride = call.channels + random.in(0, 1) * random.in(0, 40);
  const int64_t reach = (call.layout.frames - 1) * call.frame_stride +
                        (call.layout.patches - 1) * call.patch_stride + call.channels;
  call.features.resize(reach * size_of(dtype));
  uint8_t small[17 * 4];
  for (int32_t i = 0; i < 17; ++i) put(small, i, i - 8, dtype);
  for (int64_t i = 0; i < reach; ++i) {
    const int32_t pick = random.in(0, 16);
    std::memcpy(&call.features[i * size_of(dtype)], small + pick * size_of(dtype), size_of(dtype));
    call.values.push_back(pick - 8);
  }
  return call;
}

double expected(const Call& call, const PathwaySpec& path, Bin t, Bin r, Bin c, int64_t d) {
  double sum = 0, most = -INFINITY;
  for (int32_t i = t.start; i < t.stop; ++i) {
    for (int32_t j = r.start; j < r.stop; ++j) {
      for (int32_t k = c.start; k < c.stop; ++k) {
        const double x = call.at(i, int64_t{j} * path.width + k, d);
        sum += x;
        most = std::max(most, x);
      }
    }
  }
  return path.reduce == kMax ? most : sum / (static_cast<double>(t.size()) * r.size() * c.size());
}

void compare(const Call& call, const void* out) {
  // One rounding to the dtype, and three divisions in float32.
  const double unit =
      call.dtype == Dtype::kFloat32 ? 0 : std::ldexp(1, call.dtype == Dtype::kBFloat16 ? -9 : -12);
  const double slack = (unit + std::ldexp(1, -22)) * 1.001;
  int64_t token = 0;
  for (const PathwaySpec& path : call.layout.pathways) {
    for (const Bin& t : path.frames) {
      for (const Bin& r : path.rows) {
        for (const Bin& c : path.cols) {
          for (int64_t d = 0; d < call.channels; ++d) {
            const double want = expected(call, path, t, r, c, d);
            const double got = value_at(out, token * call.token_stride + d, call.dtype);
            CHECK(path.reduce == kMax ? got == want : std::fabs(got - want) <= slack * 2 * std::fabs(want));
          }
          ++token;
        }
      }
    }
  }
}

// The tasks in any order and any split.
void run_shuffled(Random& random, const cpu::Pooling& pooling) {
  const int64_t tasks = cpu::count_tasks(pooling.plan);
  std::vector<int64_t> order(tasks);
  for (int64_t i = 0; i < tasks; ++i) order[i] = i;
  for (int64_t i = tasks - 1; i > 0; --i) std::swap(order[i], order[random.in(0, static_cast<int32_t>(i))]);
  for (const int64_t task : order) cpu::run_tasks(pooling, task, task + 1);
}

void test_call(Random& random, Dtype dtype) {
  const Call call = random_call(random, dtype);
  CHECK(!check_plan(call.table.data(), static_cast<int64_t>(call.table.size()), call.layout.frames,
                    call.layout.patches, call.layout.tokens));
  Guarded out(((call.layout.tokens - 1) * call.token_stride + call.channels) * size_of(dtype));
  const bool lines = call.channels * size_of(dtype) % 64 == 0 && call.token_stride * size_of(dtype) % 64 == 0;
  const cpu::Pooling pooling{Plan(call.table.data()),
                             call.features.data(),
                             call.frame_stride,
                             call.patch_stride,
                             out.data(),
                             call.token_stride,
                             call.channels,
                             dtype,
                             lines};
  run_shuffled(random, pooling);
  compare(call, out.data());
  CHECK(out.guards_untouched());
}

}  // namespace

int main() {
  for_isas([](const char*) {
    Random random(3);
    for (int i = 0; i < 100; ++i) {
      for (const Dtype dtype : kDtypes) test_call(random, dtype);
    }
  });
}
