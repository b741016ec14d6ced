// Means over boxes: a division by way of the reciprocal rounds as IEEE's does, for every divisor that is divided by so.
#include "support.h"
#include "vec.h"

using namespace sfllava;
using namespace sfllava::test;

namespace {

// By two sizes, one after the other: a first quotient may be -0.
float quotient_of(float x, int32_t rows, int32_t size) {
  gpu::Pack<float, 4> pack;
  for (int i = 0; i < 4; ++i) pack.set(i, x);
  gpu::Sums<kMean, 4> sums(pack);
  sums.finish(1, rows, size);
  return sums.get(2);
}

void check_quotient(float x, int32_t rows, int32_t size) {
  const float first = rows == 1 ? 0.0f + x : (0.0f + x) / static_cast<float>(rows);
  const float expected = size == 1 ? first : first / static_cast<float>(size), got = quotient_of(x, rows, size);
  CHECK(bit_cast<uint32_t>(got) == bit_cast<uint32_t>(expected) || (std::isnan(got) && std::isnan(expected)));
}

constexpr float kEdges[] = {0.0f,   -0.0f, -1e-45f, -1e-38f,  1e-30f,    2e-30f,
                            -3e29f, 1e30f, 3.4e38f, INFINITY, -INFINITY, NAN};

}  // namespace

// Every `step`-th mantissa; 1 tries all, in seconds.
int main(int count, char** words) {
  const uint32_t step = count > 1 ? static_cast<uint32_t>(std::atoi(words[1])) : 97;
  for (int32_t size = 1; size <= gpu::kMostDivided + 3; ++size) {
    for (uint32_t mantissa = static_cast<uint32_t>(size) % step; mantissa < 1u << 23; mantissa += step) {
      check_quotient(bit_cast<float>(127u << 23 | mantissa), 1, size);
    }
    for (const float x : kEdges) check_quotient(x, 1, size), check_quotient(x, size, size);
  }
}
