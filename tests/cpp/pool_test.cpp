// Pooling of random layouts, strides and sizes against a plain loop in double.
#include "support.h"
#include "tuning.h"

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
  const int64_t reach =
      (call.layout.frames - 1) * call.frame_stride + (call.layout.patches - 1) * call.patch_stride + call.channels;
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

// What a place between bins weighs, along one axis.
double weight(Bin bin, int32_t place, int32_t index, const std::vector<Bin>& bins, int32_t length) {
  if (bin.size() == 1) return 1;
  const double second = middle(index, size_of(bins), length) - bin.start;
  return place == bin.start ? 1 - second : second;
}

struct Expected {
  double value, slack;
};

Expected expected(const Call& call, const Box& box, int64_t d) {
  const PathwaySpec& path = box.path;
  // One rounding to the dtype, and few in float32.
  const double unit = call.dtype == Dtype::kFloat32 ? 0 : std::ldexp(1, call.dtype == Dtype::kBFloat16 ? -9 : -12);
  double sum = 0, size = 0, most = -INFINITY;
  for_elements(box, [&](int32_t frame, int32_t row, int32_t col) {
    double x = call.at(frame, patch_at(path, row, col), d);
    most = std::max(most, x);
    if (path.reduce == kLinear) {
      x *= weight(box.rows, row, box.row, path.rows, call.layout.height(path)) *
           weight(box.cols, col, box.col, path.cols, path.width);
    }
    sum += x;
    size += std::fabs(x);
  });
  if (path.reduce == kMax) return {most, 0};
  double divisor = box.frames.size();
  if (path.reduce == kMean) divisor *= box.rows.size() * box.cols.size();
  const double mean = sum / divisor;
  return {mean, (2 * unit + std::ldexp(1, -21)) * 1.001 * std::fabs(mean) +
                    (path.reduce == kLinear ? std::ldexp(1, -21) * size / divisor : 0)};
}

// Every token, and nothing else.
void compare(const Call& call, Guarded& out) {
  for_tokens(call.layout, [&](const Box& box) {
    const int64_t at = box.token * call.token_stride;
    for (int64_t d = 0; d < call.channels; ++d) {
      const Expected want = expected(call, box, d);
      CHECK(std::fabs(value_at(out.data(), at + d, call.dtype) - want.value) <= want.slack);
    }
    out.restore(at * size_of(call.dtype), call.channels * size_of(call.dtype));
  });
  CHECK(out.untouched());
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
  CHECK(wrong_with(call.table, call.layout).empty());
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
  compare(call, out);
}

}  // namespace

int main() {
  for_isas([](const char*) {
    for (const char* tuning : {"streams", "next step"}) {
      CHECK(cpu::force_tuning(tuning));
      Random random(3);
      for (int i = 0; i < 100; ++i) {
        for (const Dtype dtype : kDtypes) test_call(random, dtype);
      }
    }
  });
}
