// Best rows, gather, scatter and attention received, of random sizes and strides against plain loops.
#include "support.h"

using namespace sfllava;
using namespace sfllava::test;

namespace {

constexpr int32_t kSizes[] = {1, 7, 16, 33, 64, 130};

// Rows [batch, rows, channels] of small integers, apart from each other, in memory of its own that ends with the last.
struct Tensor3 {
  Dtype dtype;
  int64_t batch, rows, channels, pitch;
  std::vector<uint8_t> bytes;

  Tensor3(Random& random, Dtype dtype, int64_t batch, int64_t rows, int64_t channels)
      : dtype(dtype),
        batch(batch),
        rows(rows),
        channels(channels),
        pitch(channels + random.in(0, 1) * random.in(0, 9)) {
    bytes.resize(((batch * rows - 1) * pitch + channels) * size_of(dtype));
    for (int64_t i = 0; i < batch * rows; ++i) {
      for (int64_t d = 0; d < channels; ++d) put(bytes.data(), i * pitch + d, random.in(-8, 8), dtype);
    }
  }
  double at(int64_t b, int64_t row, int64_t d) const {
    return value_at(bytes.data(), (b * rows + row) * pitch + d, dtype);
  }
  cpu::Rows view() const {
    const int64_t step = pitch * size_of(dtype);
    return {reinterpret_cast<const char*>(bytes.data()), rows * step, step};
  }
};

std::vector<int64_t> random_index(Random& random, int64_t batch, int64_t count, int64_t tokens) {
  std::vector<int64_t> index;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<int64_t> all(tokens);
    for (int64_t i = 0; i < tokens; ++i) all[i] = i;
    for (int64_t i = tokens - 1; i > 0; --i) std::swap(all[i], all[random.in(0, static_cast<int32_t>(i))]);
    std::sort(all.begin(), all.begin() + count);
    index.insert(index.end(), all.begin(), all.begin() + count);
  }
  return index;
}

void test_rows(Random& random, Dtype dtype) {
  const int64_t batch = random.in(1, 2), tokens = random.in(1, 9), count = random.in(1, static_cast<int32_t>(tokens));
  const int64_t channels = kSizes[random.in(0, 5)], size = size_of(dtype), bytes = channels * size;
  const Tensor3 hidden(random, dtype, batch, tokens, channels), rows(random, dtype, batch, count, channels);
  const std::vector<int64_t> places = random_index(random, batch, count, tokens);
  const cpu::Index index{places.data(), count, 1, count};

  Guarded copied(batch * count * bytes);
  cpu::gather_rows({hidden.view(), tokens, {static_cast<char*>(copied.data()), count * bytes, bytes}, index, bytes}, 0,
                   batch * count);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t d = 0; d < channels; ++d) {
        CHECK(value_at(copied.data(), (b * count + k) * channels + d, dtype) == hidden.at(b, index.at(b, k), d));
      }
    }
  }
  CHECK(copied.guards_untouched());

  const bool blends = random.in(0, 1), in_place = random.in(0, 1);
  const std::vector<float> weights(batch * count, 0.5f);
  Guarded out(batch * tokens * bytes);
  cpu::ScatterRows call;
  call.out = {static_cast<char*>(out.data()), tokens * bytes, bytes};
  call.hidden = hidden.view();
  if (in_place) {
    for (int64_t i = 0; i < batch * tokens; ++i) {
      std::memcpy(static_cast<char*>(out.data()) + i * bytes, hidden.bytes.data() + i * hidden.pitch * size, bytes);
    }
    call.hidden = {call.out.data, call.out.batch_stride, call.out.row_stride};
  }
  call.rows = rows.view();
  call.index = index;
  call.weights = blends ? weights.data() : nullptr;
  call.hidden_rows = tokens;
  call.bytes = bytes;
  call.dtype = dtype;
  call.in_place = in_place;
  call.stream = !in_place && bytes % 64 == 0;
  const int64_t tasks = batch * cpu::tasks_of_each(call), cut = random.in(0, static_cast<int32_t>(tasks));
  cpu::scatter_rows(call, cut, tasks);
  cpu::scatter_rows(call, 0, cut);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t row = 0, k = 0; row < tokens; ++row) {
      const bool replaced = k < count && index.at(b, k) == row;
      for (int64_t d = 0; d < channels; ++d) {
        const double before = hidden.at(b, row, d), to = replaced ? rows.at(b, k, d) : before;
        const double want = blends ? (before + to) / 2 : to;  // exact in every dtype
        CHECK(value_at(out.data(), (b * tokens + row) * channels + d, dtype) == want);
      }
      k += replaced;
    }
  }
  CHECK(out.guards_untouched());
}

void test_choice(Random& random, Dtype dtype) {
  const int32_t start = random.in(0, 5), first = random.in(1, 20), second = random.in(1, 20);
  const Tensor3 scores(random, dtype, 1, 1, first + second);
  cpu::Frame frames[] = {{start, first, random.in(1, first), 0}, {start + first, second, random.in(1, second), 0}};
  frames[1].first = frames[0].kept;
  const int64_t places = frames[0].kept + frames[1].kept;
  Guarded kept(places * 8);
  const cpu::TopPerFrame call{
      scores.bytes.data(), 0, 1, dtype, frames, 2, start, static_cast<int64_t*>(kept.data()), places};
  CHECK(cpu::top_per_frame(call, 1, 2) && cpu::top_per_frame(call, 0, 1));
  const auto* got = static_cast<const int64_t*>(kept.data());
  for (const cpu::Frame& frame : frames) {
    std::vector<int64_t> order(frame.tokens);
    for (int32_t i = 0; i < frame.tokens; ++i) order[i] = frame.begin + i;
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return scores.at(0, 0, a - start) > scores.at(0, 0, b - start); });
    std::sort(order.begin(), order.begin() + frame.kept);
    CHECK(std::equal(order.begin(), order.begin() + frame.kept, got + frame.first));
  }
  CHECK(kept.guards_untouched());
}

void test_attention(Random& random, Dtype dtype) {
  const int64_t groups = random.in(1, 2), heads = groups * random.in(1, 3), tokens = random.in(1, 40);
  const int64_t count = random.in(1, static_cast<int32_t>(std::min<int64_t>(tokens, 9)));
  const int64_t channels = kSizes[random.in(0, 4)];
  const Tensor3 queries(random, dtype, heads, count, channels), keys(random, dtype, groups, tokens, channels);
  std::vector<float> out(tokens);
  cpu::AttentionReceived call{queries.bytes.data(),
                              {0, count * queries.pitch, queries.pitch},
                              keys.bytes.data(),
                              {0, tokens * keys.pitch, keys.pitch},
                              dtype,
                              1,
                              heads,
                              groups,
                              count,
                              tokens,
                              channels,
                              0.05f,
                              nullptr,
                              out.data()};
  std::vector<float> parts(cpu::count_tasks(call) * tokens);
  call.parts = parts.data();
  for (int64_t task = cpu::count_tasks(call); task-- > 0;) cpu::attention_received(call, task, task + 1);
  cpu::add_parts(call, 0, tokens);
  std::vector<double> want(tokens);
  for (int64_t row = 0; row < heads * count; ++row) {
    const int64_t head = row / count, query = row % count, seen = tokens - count + query + 1;
    std::vector<double> p(seen);
    double sum = 0;
    for (int64_t key = 0; key < seen; ++key) {
      double logit = 0;
      for (int64_t d = 0; d < channels; ++d)
        logit += queries.at(head, query, d) * keys.at(head / (heads / groups), key, d);
      sum += p[key] = std::exp(logit * 0.05f);
    }
    for (int64_t key = 0; key < seen; ++key) want[key] += p[key] / sum / static_cast<double>(heads * count);
  }
  for (int64_t key = 0; key < tokens; ++key) CHECK(std::fabs(out[key] - want[key]) <= 2e-5 * want[key] + 1e-9);
}

}  // namespace

int main() {
  for_isas([](const char*) {
    Random random(7);
    for (int i = 0; i < 200; ++i) {
      for (const Dtype dtype : kDtypes) {
        test_rows(random, dtype);
        test_choice(random, dtype);
        test_attention(random, dtype);
      }
    }
  });
}
