// The GPU kernels' own code, lane by lane on the CPU: every token, and in a backward every patch, is written once, and
// equals plain arithmetic bit for bit.
#include "lanes.h"
#include "support.h"

using namespace sfllava;
using namespace sfllava::test;

namespace {

template <class Body>
void for_lanes(const gpu::Grid& grid, const Body& body) {
  for (uint32_t block = 0; block < grid.blocks; ++block) {
    for (int32_t y = 0; y < grid.down; ++y) {
      for (int32_t x = 0; x < grid.across; ++x) body(block, x, y);
    }
  }
}

template <gpu::Direction kDirection, class T>
void run(const gpu::Choice& choice) {
  const gpu::Launch& launch = choice.launch;
  for_lanes(launch.grid, [&](uint32_t block, int32_t x, int32_t y) {
    if (choice.path == gpu::Path::kTile) {
      gpu::with_shape(launch.nest,
                      [&](auto shape) { gpu::run_tile_lane<kDirection, T, decltype(shape)>(launch, block, x, y); });
    } else if (choice.packed) {
      gpu::run_box_lane<kDirection, T, gpu::kPackBytes / sizeof(T)>(launch, block, x, y);
    } else {
      gpu::run_box_lane<kDirection, T, 1>(launch, block, x, y);
    }
  });
}

gpu::Choice run(const gpu::Pooling& pooling) {
  const gpu::Choice choice = gpu::choose(pooling);
  CHECK(choice.launch.grid.launchable());
  with_element(pooling.dtype, [&](auto element) {
    using T = decltype(element);
    if (pooling.direction == gpu::Direction::kForward) {
      run<gpu::Direction::kForward, T>(choice);
    } else {
      run<gpu::Direction::kBackward, T>(choice);
    }
  });
  return choice;
}

std::vector<Bin> boxes(int32_t count, int32_t size) {
  std::vector<Bin> bins;
  for (int32_t i = 0; i < count; ++i) bins.push_back({i * size, (i + 1) * size});
  return bins;
}

struct TileSize {
  int32_t height, width, box_height, box_width;
};

// Tiles on every frame and boxes that nest in them on some, perhaps on one frame several times; a margin stays unread.
Layout nested_layout(Random& random, const TileSize& size) {
  const int32_t rows = random.in(1, 3), cols = random.in(1, 3), frames = random.in(1, 5);
  const int32_t height = rows * size.height + random.in(0, 1), width = cols * size.width + random.in(0, 2);
  PathwaySpec coarse{width, kMean, every(frames), boxes(rows, size.height), boxes(cols, size.width)};
  PathwaySpec fine{width,
                   size.box_height == 1 && size.box_width == 1 ? kMax : random.in(kMax, kMean),
                   {},
                   boxes(rows * (size.height / size.box_height), size.box_height),
                   boxes(cols * (size.width / size.box_width), size.box_width)};
  for (int32_t i = random.in(1, 7); i > 0; --i) {
    const int32_t frame = random.in(0, frames - 1);
    fine.frames.push_back({frame, frame + 1});
  }
  coarse.room = random.in(0, 1);
  fine.room = random.in(0, 1);
  const bool first = random.in(0, 1);
  Layout layout{frames,         height * width, 0, {first ? coarse : fine, first ? fine : coarse}, random.bits() % 2,
                random.in(0, 1)};
  count_tokens(layout);
  return layout;
}

TileSize random_tile_size(Random& random) {
  const int32_t boxes[3][2] = {{1, 1}, {1, 2}, {2, 2}};
  const auto& box = boxes[random.in(0, 2)];
  return {random.in(1, 3) * box[0], random.in(2, 3) * 2, box[0], box[1]};
}

struct Call {
  Layout layout;
  std::vector<int32_t> table;
  Dtype dtype;
  int64_t channels, patch_stride, frame_stride, token_stride;
  int64_t offset = 0;  // of every tensor, from a multiple of 64 bytes
  std::vector<uint8_t> features, grad;

  int64_t element() const { return size_of(dtype); }
  int64_t start(const std::vector<uint8_t>& bytes) const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(bytes.data());
    return static_cast<int64_t>((at + 63) / 64 * 64 - at) + offset * element();
  }
  const uint8_t* at(const std::vector<uint8_t>& bytes) const { return bytes.data() + start(bytes); }
  int64_t token_reach() const { return (layout.tokens - 1) * token_stride + channels; }
  gpu::Pooling pooling(gpu::Direction direction, void* out) const {
    const gpu::Tensors tensors{at(features), frame_stride, patch_stride, at(grad), out, token_stride, channels};
    return {direction, Plan(table.data()), table.data(), tensors, dtype};
  }
};

// Any bits, or ties, zeros of both signs, infinities and NaN side by side.
uint32_t random_element(Random& random, Dtype dtype, bool any) {
  static const float few[] = {0.0f, -0.0f, 1.0f, -1.0f, INFINITY, -INFINITY, NAN, 1e-40f};
  const uint32_t bits = any ? random.bits() : bit_cast<uint32_t>(few[random.in(0, 7)]);
  if (dtype == Dtype::kFloat32 || any) return bits;
  if (dtype == Dtype::kBFloat16) return bits >> 16;
  Float16 half;
  narrow(bit_cast<float>(bits), half);
  return half.bits;
}

// `reach` elements, and nothing after the last, so that the address sanitizer sees a read past it.
void fill(Random& random, const Call& call, int64_t reach, std::vector<uint8_t>& bytes) {
  bytes.resize(64 + (call.offset + reach) * call.element());
  bytes.resize(call.start(bytes) + reach * call.element());
  const bool any = random.in(0, 1);
  for (int64_t i = 0; i < reach; ++i) {
    const uint32_t bits = random_element(random, call.dtype, any);
    std::memcpy(&bytes[call.start(bytes) + i * call.element()], &bits, call.element());
  }
}

Call make_call(Random& random, const Layout& layout, Dtype dtype, bool aligned) {
  const int64_t pack = gpu::kPackBytes / size_of(dtype);
  constexpr int32_t kPacks[] = {1, 2, 31, 32, 33, 70}, kElements[] = {1, 7, 32, 33, 150};
  const int64_t channels = aligned ? kPacks[random.in(0, 5)] * pack : kElements[random.in(0, 4)];
  Call call{layout, make_table(layout), dtype, channels, 0, 0, 0, 0, {}, {}};
  const int64_t step = aligned ? pack : 1;
  call.patch_stride = channels + random.in(0, 1) * step;
  call.frame_stride = call.patch_stride * (layout.patches + random.in(0, 1));
  call.token_stride = channels + random.in(0, 3) * step;
  if (!aligned) call.offset = random.in(0, 3);
  fill(random, call, (layout.frames - 1) * call.frame_stride + (layout.patches - 1) * call.patch_stride + channels,
       call.features);
  fill(random, call, call.token_reach(), call.grad);
  return call;
}

template <class T>
T element_at(const uint8_t* from, int64_t i) {
  T element;
  std::memcpy(&element, from + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return element;
}

template <class T>
float feature(const Call& call, int64_t frame, int64_t patch, int64_t d) {
  return widen(element_at<T>(call.at(call.features), frame * call.frame_stride + patch * call.patch_stride + d));
}

// What an element of a box is multiplied by.
float weight(const Call& call, const Box& box, int32_t row, int32_t col) {
  const auto along = [](Bin bin, int32_t place, int32_t index, int32_t count, int32_t length) {
    if (bin.size() == 1) return 1.0f;
    const double parts = std::round((middle(index, count, length) - bin.start) * 2 * count);
    const float second = static_cast<float>(parts) / static_cast<float>(2 * count);
    return place == bin.start ? 1.0f - second : second;
  };
  const PathwaySpec& path = box.path;
  return along(box.rows, row, box.row, size_of(path.rows), call.layout.height(path)) *
         along(box.cols, col, box.col, size_of(path.cols), path.width);
}

// A mean, or the share of one element in it: divided by frames, rows and columns, or weighted.
float divided(float sum, const Box& box) {
  sum /= static_cast<float>(box.frames.size());
  if (box.path.reduce == kLinear) return sum;
  return sum / static_cast<float>(box.rows.size()) / static_cast<float>(box.cols.size());
}

// The contract in plain loops: a mean from 0 in (frame, row, column) order, the first of equals, NaN passed on.
template <class T>
float expected_token(const Call& call, const Box& box, int64_t d) {
  float sum = 0, most = 0;
  bool first = true;
  for_elements(box, [&](int32_t frame, int32_t row, int32_t col) {
    const float x = feature<T>(call, frame, patch_at(box.path, row, col), d);
    const float share = box.path.reduce == kLinear ? x * weight(call, box, row, col) : x;
    sum += share;
    if (first || x > most || std::isnan(x)) most = x;
    first = false;
  });
  return box.path.reduce == kMax ? most : divided(sum, box);
}

template <class T>
bool is_rounded(float value, const uint8_t* out, int64_t at) {
  T want;
  narrow(value, want);
  const T got = element_at<T>(out, at);
  return std::memcmp(&want, &got, sizeof(T)) == 0 || (std::isnan(widen(want)) && std::isnan(widen(got)));
}

template <class T>
void check_tokens(const Call& call, Guarded& out) {
  for_tokens(call.layout, [&](const Box& box) {
    const int64_t at = call.offset + box.token * call.token_stride;
    for (int64_t d = 0; d < call.channels; ++d) {
      CHECK(is_rounded<T>(expected_token<T>(call, box, d), static_cast<uint8_t*>(out.data()), at + d));
    }
    out.restore(at * call.element(), call.channels * call.element());
  });
}

// A mean spreads its gradient over its box in equal or weighted parts, a max gives it to the element that it kept.
template <class T>
void scatter(const Call& call, const Box& box, std::vector<float>& sums) {
  for (int64_t d = 0; d < call.channels; ++d) {
    const float grad = widen(element_at<T>(call.at(call.grad), box.token * call.token_stride + d));
    float most = 0;
    int64_t winner = -1;
    for_elements(box, [&](int32_t frame, int32_t row, int32_t col) {
      const int64_t patch = patch_at(box.path, row, col);
      const int64_t at = (frame * int64_t{call.layout.patches} + patch) * call.channels + d;
      const float x = feature<T>(call, frame, patch, d);
      if (box.path.reduce == kMean) sums[at] += divided(grad, box);
      if (box.path.reduce == kLinear) sums[at] += divided(grad, box) * weight(call, box, row, col);
      if (winner < 0 || x > most || std::isnan(x)) most = x, winner = at;
    });
    if (box.path.reduce == kMax) sums[winner] += grad;
  }
}

template <class T>
void check_gradient(const Call& call, Guarded& out) {
  std::vector<float> sums(int64_t{call.layout.frames} * call.layout.patches * call.channels);
  for_tokens(call.layout, [&](const Box& box) { scatter<T>(call, box, sums); });
  const int64_t count = static_cast<int64_t>(sums.size());
  for (int64_t i = 0; i < count; ++i) {
    CHECK(is_rounded<T>(sums[i], static_cast<uint8_t*>(out.data()), call.offset + i));
  }
  out.restore(call.offset * call.element(), count * call.element());
}

gpu::Path test_call(Random& random, const Layout& layout, Dtype dtype, bool aligned, gpu::Direction direction) {
  const Call call = make_call(random, layout, dtype, aligned);
  CHECK(wrong_with(call.table, layout).empty());
  const bool forward = direction == gpu::Direction::kForward;
  const int64_t reach = forward ? call.token_reach() : int64_t{layout.frames} * layout.patches * call.channels;
  Guarded out((call.offset + reach) * call.element());
  const gpu::Choice choice =
      run(call.pooling(direction, static_cast<uint8_t*>(out.data()) + call.offset * call.element()));
  CHECK(choice.packed || !aligned);
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    forward ? check_tokens<T>(call, out) : check_gradient<T>(call, out);
  });
  CHECK(out.untouched());
  return choice.path;
}

Layout shuffled(Layout layout, uint32_t order) {
  layout.order = order;
  return layout;
}

void test_values(gpu::Direction direction) {
  Random random(1);
  int tiles = 0;
  for (int i = 0; i < 60; ++i) {
    for (const Dtype dtype : kDtypes) {
      const Layout nested = nested_layout(random, random_tile_size(random));
      tiles += test_call(random, nested, dtype, true, direction) == gpu::Path::kTile;
      test_call(random, nested, dtype, false, direction);
      test_call(random, shuffled(nested, random.in(2, 99)), dtype, true, direction);
      test_call(random, random_layout(random), dtype, random.in(0, 1), direction);
    }
  }
  CHECK(direction == gpu::Direction::kForward ? tiles == 180 : tiles > 20);
}

// A column that counts the writes to each place.
struct Counts {
  using T = float;
  static constexpr int N = gpu::kPackBytes / sizeof(T);

  const std::vector<T>& features;
  int64_t patches;
  std::vector<int>& writes;

  const T* patch(int64_t frame, int64_t patch) const { return features.data() + (frame * patches + patch) * N; }
  int64_t patch_stride() const { return N; }
  gpu::Pack<T, N> read(const T* patch) const { return gpu::load<N>(patch); }
  gpu::Pack<T, N> grad(int64_t) const { return {}; }
  void write(int64_t token, const gpu::Pack<T, N>&) const { ++writes.at(token); }
  void spread(int64_t patch, const gpu::Pack<T, N>&) const { ++writes.at(patch); }
};

void run_unit(const gpu::Choice& choice, int32_t unit, const Counts& counts) {
  const gpu::Launch& launch = choice.launch;
  const bool forward = choice.direction == gpu::Direction::kForward;
  if (choice.path == gpu::Path::kTile) {
    gpu::with_shape(launch.nest, [&](auto shape) {
      using Shape = decltype(shape);
      forward ? gpu::run_tile_unit<gpu::Direction::kForward, Shape>(launch, unit, counts)
              : gpu::run_tile_unit<gpu::Direction::kBackward, Shape>(launch, unit, counts);
    });
  } else {
    forward ? gpu::pool_share(launch, unit, counts) : gpu::spread_patch(launch, unit, counts);
  }
}

void test_everything_is_written_once(const Layout& layout, gpu::Direction direction) {
  const std::vector<int32_t> table = make_table(layout);
  alignas(16) static float anything[4];
  const int64_t patches = int64_t{layout.frames} * layout.patches;
  std::vector<float> features(patches * Counts::N);
  std::vector<int> writes(direction == gpu::Direction::kForward ? layout.tokens : patches);
  const Counts counts{features, layout.patches, writes};
  const gpu::Tensors tensors{anything, 4, 4, anything, anything, 4, Counts::N};
  const gpu::Choice choice = gpu::choose({direction, Plan(table.data()), table.data(), tensors, Dtype::kFloat32});
  for (int32_t unit = 0; unit < choice.launch.units; ++unit) run_unit(choice, unit, counts);
  std::vector<int> wanted(writes.size(), direction == gpu::Direction::kBackward);
  if (direction == gpu::Direction::kForward) for_tokens(layout, [&](const Box& box) { wanted[box.token] = 1; });
  CHECK(writes == wanted);
}

void test_writes(gpu::Direction direction) {
  Random random(2);
  for (int i = 0; i < 2000; ++i) {
    test_everything_is_written_once(nested_layout(random, random_tile_size(random)), direction);
    test_everything_is_written_once(random_layout(random), direction);
  }
  if (direction == gpu::Direction::kBackward) {  // no frame is read
    test_everything_is_written_once({2, 4, 0, {{2, kMean, {}, every(2), every(2)}}}, direction);
  }
}

void test_grids() {
  Random random(3);
  for (int i = 0; i < 300; ++i) {
    const int64_t units = random.in(1, 40), vectors = random.in(1, 600);
    const int32_t warps = 1 << random.in(0, 3);
    const gpu::Grid grid = gpu::make_grid(units, vectors, warps);
    CHECK(grid.across % gpu::kWarp == 0 && grid.across * grid.down <= gpu::kWarp * warps);
    std::vector<int> visits(units * vectors);
    for_lanes(grid, [&](uint32_t block, int32_t x, int32_t y) {
      const gpu::Lane lane = gpu::find_lane(grid, block, x, y);
      if (lane.unit < units && lane.vector < vectors) ++visits.at(lane.unit * vectors + lane.vector);
    });
    CHECK(std::all_of(visits.begin(), visits.end(), [](int count) { return count == 1; }));
  }
  // The last lane of the largest launch, and the first that is refused.
  const gpu::Grid largest = gpu::make_grid(INT32_MAX - 3, 1);
  CHECK(largest.launchable());
  CHECK(gpu::find_lane(largest, static_cast<uint32_t>(largest.blocks - 1), 0, 0).unit == INT32_MAX - 7);
  CHECK(!gpu::make_grid(int64_t{INT32_MAX} + 1, 1).launchable());
  CHECK(!gpu::make_grid(1 << 20, int64_t{1} << 20).launchable());
}

bool is_tiled(const Layout& layout, gpu::Direction direction = gpu::Direction::kForward) {
  const std::vector<int32_t> table = make_table(layout);
  return gpu::is_tiled(Plan(table.data()), direction);
}

// 24 x 24 patches: 4 x 4 tiles of 6 x 6 with pairs on two frames of three.
Layout paper_layout() {
  Layout layout{
      3,
      576,
      0,
      {{24, kMax, {{0, 1}, {1, 2}}, every(24), boxes(12, 2)}, {24, kMean, every(3), boxes(4, 6), boxes(4, 6)}}};
  count_tokens(layout);
  return layout;
}

void test_what_nests() {
  CHECK(is_tiled(paper_layout()));
  const auto tiled = [](const auto& change) {
    Layout layout = paper_layout();
    change(layout, layout.pathways[0], layout.pathways[1]);
    count_tokens(layout);
    return is_tiled(layout);
  };
  using Path = PathwaySpec;
  CHECK(tiled([](Layout& l, Path&, Path&) { std::swap(l.pathways[0], l.pathways[1]); }));
  CHECK(tiled([](Layout& l, Path&, Path&) { l.order = kByFrame; }));
  CHECK(tiled([](Layout&, Path& fine, Path& coarse) { fine.room = 1, coarse.room = 2; }));
  CHECK(tiled([](Layout&, Path& fine, Path&) { fine.reduce = kMean; }));
  CHECK(tiled([](Layout&, Path& fine, Path&) { fine.frames = {{1, 2}, {1, 2}, {2, 3}}; }));
  CHECK(tiled([](Layout&, Path& fine, Path&) { fine.rows = boxes(12, 2); }));
  CHECK(tiled([](Layout&, Path& fine, Path&) { fine.cols = every(24); }));
  CHECK(tiled([](Layout&, Path&, Path& coarse) { coarse.rows = boxes(2, 12); }));
  CHECK(tiled([](Layout&, Path&, Path& coarse) { coarse.cols = boxes(6, 4); }));

  CHECK(!tiled([](Layout&, Path&, Path& coarse) { coarse.reduce = kMax; }));
  CHECK(!tiled([](Layout&, Path&, Path& coarse) { coarse.cols = boxes(3, 8); }));         // no kernel of that width
  CHECK(!tiled([](Layout&, Path& fine, Path&) { fine.cols = boxes(8, 3); }));             // no kernel for those boxes
  CHECK(!tiled([](Layout&, Path& fine, Path&) { fine.cols.pop_back(); }));                // a part of a tile
  CHECK(!tiled([](Layout&, Path& fine, Path&) { fine.cols.back() = {21, 23}; }));         // across each other
  CHECK(!tiled([](Layout&, Path&, Path& coarse) { coarse.cols[1] = {5, 12}; }));          // overlapping tiles
  CHECK(!tiled([](Layout&, Path& fine, Path&) { fine.rows = boxes(8, 3); }));             // across the tiles
  CHECK(!tiled([](Layout&, Path&, Path& coarse) { coarse.frames = {{0, 1}, {1, 2}}; }));  // a frame without tiles
  CHECK(!tiled([](Layout&, Path&, Path& coarse) { coarse.frames = {{0, 3}}; }));          // over time
  CHECK(!tiled([](Layout&, Path&, Path& coarse) { coarse.frames.push_back({2, 3}); }));   // twice
  CHECK(!tiled([](Layout& l, Path& fine, Path&) { l.pathways.push_back(fine); }));        // a third pathway
  CHECK(!tiled([](Layout&, Path& fine, Path&) {                                           // on a flattened grid
    fine.width = 576;
    fine.rows = every(1);
    fine.cols = boxes(288, 2);
  }));
  CHECK(!tiled([](Layout&, Path& fine, Path&) { fine.reduce = kLinear; }));
  CHECK(!tiled([](Layout& l, Path& fine, Path& coarse) {  // after a class token
    ++l.patches;
    fine.first_patch = coarse.first_patch = 1;
  }));
  CHECK(!tiled([](Layout& l, Path& fine, Path& coarse) {  // grids of other heights
    l.patches += 24;
    fine.height = 24;
    coarse.height = 25;
  }));

  // A backward writes every patch: one beside the tiles is not theirs.
  Layout margin = paper_layout();
  CHECK(is_tiled(margin, gpu::Direction::kBackward));
  margin.patches += 24;
  CHECK(is_tiled(margin) && !is_tiled(margin, gpu::Direction::kBackward));
}

// Corrupted tables that pass the check stay inside every buffer, on either path.
void test_corrupted_tables(gpu::Direction direction) {
  Random random(4);
  int tiles = 0;
  for (int i = 0; i < 20000; ++i) {
    const Layout layout = i % 2 ? nested_layout(random, random_tile_size(random)) : random_layout(random);
    std::vector<int32_t> table = make_table(layout);
    int32_t& number = table[random.in(0, static_cast<int32_t>(table.size()) - 1)];
    number = random.in(0, 1) ? number + random.in(-2, 2) : random.in(-2, 70);
    if (!wrong_with(table, layout).empty()) {
      continue;
    }
    const int64_t patches = int64_t{layout.frames} * layout.patches;
    const Guarded features(patches * 16), grad(int64_t{layout.tokens} * 16);
    Guarded out((direction == gpu::Direction::kForward ? layout.tokens : patches) * 16);
    const gpu::Tensors tensors{features.data(), int64_t{layout.patches} * 4, 4, grad.data(), out.data(), 4, 4};
    const gpu::Choice choice = run({direction, Plan(table.data()), table.data(), tensors, Dtype::kFloat32});
    tiles += choice.path == gpu::Path::kTile;
    CHECK(out.guards_untouched());
  }
  CHECK(tiles > 100);
}

}  // namespace

int main() {
  test_grids();
  test_what_nests();
  for (const gpu::Direction direction : {gpu::Direction::kForward, gpu::Direction::kBackward}) {
    test_writes(direction);
    test_values(direction);
    test_corrupted_tables(direction);
  }
}
