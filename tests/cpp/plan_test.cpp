// Corrupted plan tables: check_plan refuses them, or running them stays inside every buffer.
#include "support.h"

using namespace sfllava;
using namespace sfllava::test;

namespace {

constexpr int64_t kChannels = 5;

void run(const std::vector<int32_t>& table, const Layout& layout) {
  const std::vector<float> features(layout.frames * layout.patches * kChannels, 1.0f);
  Guarded out(layout.tokens * kChannels * 4);
  const cpu::Pooling pooling{Plan(table.data()), features.data(), layout.patches * kChannels,
                             kChannels,          out.data(),      kChannels,
                             kChannels,          Dtype::kFloat32, false};
  cpu::run_tasks(pooling, 0, cpu::count_tasks(pooling.plan));
  CHECK(out.guards_untouched());
}

bool accepted(const std::vector<int32_t>& table, const Layout& layout) { return wrong_with(table, layout).empty(); }

int32_t strange_number(Random& random, int32_t was) {
  switch (random.in(0, 5)) {
    case 0:
      return was < INT32_MAX ? was + 1 : was;
    case 1:
      return was > INT32_MIN ? was - 1 : was;
    case 2:
      return random.in(-2, 70);
    case 3:
      return INT32_MAX - random.in(0, 8);
    case 4:
      return INT32_MIN + random.in(0, 8);
    default:
      return static_cast<int32_t>(random.bits());
  }
}

void mutate(Random& random, std::vector<int32_t>& table) {
  for (int32_t n = random.in(1, 3); n > 0; --n) {
    int32_t& number = table[random.in(0, static_cast<int32_t>(table.size()) - 1)];
    number = strange_number(random, number);
  }
}

void test_random_mutations(uint32_t seed) {
  Random random(seed);
  int turned_down = 0, ran = 0;
  for (int i = 0; i < 30000; ++i) {
    const Layout layout = random_layout(random);
    std::vector<int32_t> table = make_table(layout);
    CHECK(accepted(table, layout));
    mutate(random, table);
    if (accepted(table, layout)) {
      run(table, layout);
      ++ran;
    } else {
      ++turned_down;
    }
  }
  std::printf("mutations: %d turned down, %d ran inside their buffers\n", turned_down, ran);
  CHECK(turned_down > 10000 && ran > 1000);
}

// Every number of one table, one at a time, to every strange value.
void test_each_number() {
  Random random(2);
  const std::vector<Bin> pairs = {{0, 2}, {2, 4}}, flat_pairs = {{0, 2}, {2, 4}, {4, 6}, {6, 8}, {8, 10}, {10, 12}};
  Layout layout{3,
                13,
                0,
                {{4, kMean, every(3), {{0, 2}, {1, 3}}, pairs, 1, 3, 1},
                 {12, kMax, {{0, 1}, {2, 3}}, every(1), flat_pairs, 1, 1},
                 {1, kMax, every(3), every(1), every(1), 0, 1},
                 {4, kLinear, {{0, 2}}, {{0, 2}, {2, 3}}, pairs, 1, 3}}};
  layout.order = kByFrame;
  count_tokens(layout);
  const std::vector<int32_t> good = make_table(layout);
  CHECK(accepted(good, layout));
  for (size_t i = 0; i < good.size(); ++i) {
    for (int n = 0; n < 40; ++n) {
      std::vector<int32_t> table = good;
      table[i] = strange_number(random, table[i]);
      if (accepted(table, layout)) run(table, layout);
      CHECK(i >= kHeader || table[i] == good[i] || !accepted(table, layout));
    }
  }
}

void test_tables_of_other_sizes() {
  const Layout layout{2, 4, 8, {{2, kMax, every(2), every(2), every(2)}}};
  const std::vector<int32_t> good = make_table(layout);
  for (size_t size = 0; size < good.size(); ++size) {
    const std::vector<int32_t> cut(good.begin(), good.begin() + static_cast<int64_t>(size));
    CHECK(!accepted(cut, layout));
  }
  const auto fits = [&](int64_t frames, int64_t patches, int64_t tokens) {
    return check_plan(good.data(), static_cast<int64_t>(good.size()), frames, patches, tokens).empty();
  };
  CHECK(fits(2, 4, 8));
  CHECK(!fits(1, 4, 8) && !fits(2, 3, 8) && !fits(2, 4, 7) && !fits(2 + (int64_t{1} << 32), 4, 8));
}

}  // namespace

// With a seed: other mutations, as `make fuzz` runs it.
int main(int argc, char** argv) {
  test_random_mutations(argc > 1 ? static_cast<uint32_t>(std::strtoul(argv[1], nullptr, 10)) : 1);
  if (argc > 1) return 0;
  test_each_number();
  test_tables_of_other_sizes();
}
