// The backward of random layouts, strides and sizes against a plain loop in double.
#include "backward.h"

#include "support.h"

using namespace sfllava;
using namespace sfllava::test;

namespace {

// Small integers, as elements and as doubles.
struct Numbers {
  std::vector<uint8_t> bytes;
  std::vector<double> values;

  Numbers(Random& random, int64_t count, Dtype dtype) : bytes(count * size_of(dtype)) {
    uint8_t small[17 * 4];
    for (int32_t i = 0; i < 17; ++i) put(small, i, i - 8, dtype);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t pick = random.in(0, 16);
      std::memcpy(&bytes[i * size_of(dtype)], small + pick * size_of(dtype), size_of(dtype));
      values.push_back(pick - 8);
    }
  }
};

// What a place between bins weighs, along one axis.
double weight(Bin bin, int32_t place, int32_t index, const std::vector<Bin>& bins, int32_t length) {
  if (bin.size() == 1) return 1;
  const double second = middle(index, size_of(bins), length) - bin.start;
  return place == bin.start ? 1 - second : second;
}

struct Strides {
  int64_t channels, token, patch, frame;
};

// The gradient [frames, patches, channels], and the sum of what it was added from, without signs.
void add_expected(const Layout& layout, const Numbers& grad, const Numbers& features, const Strides& strides,
                  std::vector<double>& sum, std::vector<double>& size) {
  for_tokens(layout, [&](const Box& box) {
    const PathwaySpec& path = box.path;
    for (int64_t d = 0; d < strides.channels; ++d) {
      const double given = grad.values[box.token * strides.token + d];
      double most = -INFINITY;
      int64_t winner = -1;
      for_elements(box, [&](int32_t frame, int32_t row, int32_t col) {
        const int64_t patch = patch_at(path, row, col);
        const int64_t to = (frame * int64_t{layout.patches} + patch) * strides.channels + d;
        double share = given;
        if (path.reduce == kMax) {
          const double x = features.values[frame * strides.frame + patch * strides.patch + d];
          if (x > most) most = x, winner = to;
          return;
        }
        if (path.reduce == kMean) share /= double{1.0} * box.frames.size() * box.rows.size() * box.cols.size();
        if (path.reduce == kLinear) {
          share *= weight(box.rows, row, box.row, path.rows, layout.height(path)) *
                   weight(box.cols, col, box.col, path.cols, path.width) / box.frames.size();
        }
        sum[to] += share;
        size[to] += std::fabs(share);
      });
      if (winner >= 0) {
        sum[winner] += given;
        size[winner] += std::fabs(given);
      }
    }
  });
}

void test_call(Random& random, Dtype dtype) {
  constexpr int32_t kChannels[] = {1, 7, 15, 16, 31, 32, 33, 64, 100, 1030};
  const Layout layout = random_layout(random);
  const std::vector<int32_t> table = make_table(layout);
  Strides strides{kChannels[random.in(0, 9)], 0, 0, 0};
  strides.token = strides.channels + random.in(0, 1) * random.in(0, 40);
  strides.patch = strides.channels + random.in(0, 1) * random.in(0, 9);
  strides.frame = strides.patch * (layout.patches + random.in(0, 1));
  const int64_t read = (layout.frames - 1) * strides.frame + (layout.patches - 1) * strides.patch + strides.channels;
  const Numbers grad(random, (layout.tokens - 1) * strides.token + strides.channels, dtype);
  const Numbers features(random, read, dtype);
  const int64_t count = int64_t{layout.frames} * layout.patches * strides.channels;
  Guarded out(count * size_of(dtype));
  const cpu::Backward backward{Plan(table.data()),
                               grad.bytes.data(),
                               strides.token,
                               features.bytes.data(),
                               strides.frame,
                               strides.patch,
                               out.data(),
                               strides.channels,
                               dtype,
                               strides.channels * size_of(dtype) % 64 == 0};
  const int64_t tasks = cpu::count_tasks(backward);
  for (int64_t begin = 0; begin < tasks;) {
    const int64_t end = std::min(tasks, begin + random.in(1, 9));
    cpu::run_tasks(backward, begin, end);
    begin = end;
  }
  std::vector<double> sum(count), size(count);
  add_expected(layout, grad, features, strides, sum, size);
  const double unit = dtype == Dtype::kFloat32 ? 0 : std::ldexp(1, dtype == Dtype::kBFloat16 ? -9 : -12);
  // float16 has denormals below 2^-14.
  const double least = dtype == Dtype::kFloat16 ? std::ldexp(1, -25) : 0;
  for (int64_t i = 0; i < count; ++i) {
    const double slack = 2 * unit * std::fabs(sum[i]) + std::ldexp(1, -18) * size[i] + least;
    CHECK(std::fabs(value_at(out.data(), i, dtype) - sum[i]) <= slack);
  }
  CHECK(out.guards_untouched());
}

}  // namespace

int main() {
  for_isas([](const char*) {
    Random random(6);
    for (int i = 0; i < 100; ++i) {
      for (const Dtype dtype : kDtypes) test_call(random, dtype);
    }
  });
}
