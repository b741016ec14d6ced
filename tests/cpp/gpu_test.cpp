// The GPU kernels' own code, lane by lane on the CPU: every token is written once, and equals plain arithmetic bit for
// bit.
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

template <class T>
void run(const gpu::Choice& choice) {
  const gpu::Launch& launch = choice.launch;
  for_lanes(launch.grid, [&](uint32_t block, int32_t x, int32_t y) {
    if (choice.path == gpu::Path::kTile) {
      gpu::with_shape(launch.nest, [&](auto shape) { gpu::run_tile_lane<T, decltype(shape)>(launch, block, x, y); });
    } else if (choice.packed) {
      gpu::run_box_lane<T, gpu::kPackBytes / sizeof(T)>(launch, block, x, y);
    } else {
      gpu::run_box_lane<T, 1>(launch, block, x, y);
    }
  });
}

gpu::Choice run(const gpu::Pooling& pooling) {
  const gpu::Choice choice = gpu::choose(pooling);
  CHECK(choice.launch.grid.launchable());
  if (pooling.dtype == Dtype::kFloat32) run<float>(choice);
  if (pooling.dtype == Dtype::kBFloat16) run<BFloat16>(choice);
  if (pooling.dtype == Dtype::kFloat16) run<Float16>(choice);
  return choice;
}

std::vector<Bin> boxes(int32_t count, int32_t size) {
  std::vector<Bin> bins;
  for (int32_t i = 0; i < count; ++i) bins.push_back({i * size, (i + 1) * size});
  return bins;
}

void count_tokens(Layout& layout) {
  layout.tokens = 0;
  for (const PathwaySpec& path : layout.pathways) {
    layout.tokens += static_cast<int32_t>(path.frames.size() * path.rows.size() * path.cols.size());
  }
}

struct TileSize {
  int32_t height, width, box_height, box_width;
};

// Tiles on every frame and boxes that nest in them on some, perhaps on one frame several times; a margin stays unread.
Layout nested_layout(Random& random, const TileSize& size) {
  const int32_t rows = random.in(1, 3), cols = random.in(1, 3), frames = random.in(1, 5);
  const int32_t height = rows * size.height + random.in(0, 1), width = cols * size.width + random.in(0, 2);
  const PathwaySpec coarse{width, kMean, every(frames), boxes(rows, size.height), boxes(cols, size.width)};
  PathwaySpec fine{width,
                   size.box_height == 1 && size.box_width == 1 ? kMax : random.in(kMax, kMean),
                   {},
                   boxes(rows * (size.height / size.box_height), size.box_height),
                   boxes(cols * (size.width / size.box_width), size.box_width)};
  for (int32_t i = random.in(1, 7); i > 0; --i) {
    const int32_t frame = random.in(0, frames - 1);
    fine.frames.push_back({frame, frame + 1});
  }
  const bool first = random.in(0, 1);
  Layout layout{frames, height * width, 0, {first ? coarse : fine, first ? fine : coarse}};
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
  int64_t offset = 0;  // of features and tokens, from a multiple of 64 bytes
  std::vector<uint8_t> features;

  int64_t element() const { return size_of(dtype); }
  int64_t start() const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(features.data());
    return static_cast<int64_t>((at + 63) / 64 * 64 - at) + offset * element();
  }
  gpu::Pooling pooling(void* out) const {
    const gpu::Tensors tensors{features.data() + start(), frame_stride, patch_stride, out, token_stride, channels};
    return {{table.data()}, table.data(), tensors, dtype};
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

Call make_call(Random& random, const Layout& layout, Dtype dtype, bool aligned) {
  const int64_t pack = gpu::kPackBytes / size_of(dtype);
  constexpr int32_t kPacks[] = {1, 2, 31, 32, 33, 70}, kElements[] = {1, 7, 32, 33, 150};
  const int64_t channels = aligned ? kPacks[random.in(0, 5)] * pack : kElements[random.in(0, 4)];
  Call call{layout, make_table(layout), dtype, channels, 0, 0, 0, 0, {}};
  const int64_t step = aligned ? pack : 1;
  call.patch_stride = channels + random.in(0, 1) * step;
  call.frame_stride = call.patch_stride * (layout.patches + random.in(0, 1));
  call.token_stride = channels + random.in(0, 3) * step;
  if (!aligned) call.offset = random.in(0, 3);
  const int64_t reach = (layout.frames - 1) * call.frame_stride + (layout.patches - 1) * call.patch_stride + channels;
  call.features.resize(64 + (call.offset + reach) * call.element());
  // Nothing lies behind the last element, where the address sanitizer would not see a read past it.
  call.features.resize(call.start() + reach * call.element());
  const bool any = random.in(0, 1);
  for (int64_t i = 0; i < reach; ++i) {
    const uint32_t bits = random_element(random, dtype, any);
    std::memcpy(&call.features[call.start() + i * call.element()], &bits, call.element());
  }
  return call;
}

template <class T>
T element_at(const uint8_t* from, int64_t i) {
  T element;
  std::memcpy(&element, from + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return element;
}

// The contract in plain loops: a mean from 0 in (frame, row, column) order, the first of equals, NaN passed on.
template <class T>
float expected(const Call& call, const PathwaySpec& path, Bin t, Bin r, Bin c, int64_t d) {
  float sum = 0, most = 0;
  bool first = true;
  for (int32_t i = t.start; i < t.stop; ++i) {
    for (int32_t j = r.start; j < r.stop; ++j) {
      for (int32_t k = c.start; k < c.stop; ++k, first = false) {
        const int64_t at = i * call.frame_stride + (int64_t{j} * path.width + k) * call.patch_stride + d;
        const float x = widen(element_at<T>(call.features.data() + call.start(), at));
        sum += x;
        if (first || x > most || std::isnan(x)) most = x;
      }
    }
  }
  return path.reduce == kMax ? most : sum / t.size() / r.size() / c.size();
}

template <class T>
void compare(const Call& call, const void* out) {
  int64_t token = 0;
  for (const PathwaySpec& path : call.layout.pathways) {
    for (const Bin& t : path.frames) {
      for (const Bin& r : path.rows) {
        for (const Bin& c : path.cols) {
          for (int64_t d = 0; d < call.channels; ++d) {
            T want;
            narrow(expected<T>(call, path, t, r, c, d), want);
            const T got = element_at<T>(static_cast<const uint8_t*>(out), token * call.token_stride + d);
            const bool same = std::memcmp(&want, &got, sizeof(T)) == 0;
            CHECK(same || (std::isnan(widen(want)) && std::isnan(widen(got))));
          }
          ++token;
        }
      }
    }
  }
}

gpu::Path test_call(Random& random, const Layout& layout, Dtype dtype, bool aligned) {
  const Call call = make_call(random, layout, dtype, aligned);
  CHECK(!check_plan(call.table.data(), static_cast<int64_t>(call.table.size()), layout.frames, layout.patches,
                    layout.tokens));
  Guarded out((call.offset + (layout.tokens - 1) * call.token_stride + call.channels) * call.element());
  uint8_t* tokens = static_cast<uint8_t*>(out.data()) + call.offset * call.element();
  const gpu::Choice choice = run(call.pooling(tokens));
  CHECK(choice.packed || !aligned);
  if (dtype == Dtype::kFloat32) compare<float>(call, tokens);
  if (dtype == Dtype::kBFloat16) compare<BFloat16>(call, tokens);
  if (dtype == Dtype::kFloat16) compare<Float16>(call, tokens);
  CHECK(out.guards_untouched());
  return choice.path;
}

void test_values() {
  Random random(1);
  for (int i = 0; i < 60; ++i) {
    for (const Dtype dtype : kDtypes) {
      const Layout nested = nested_layout(random, random_tile_size(random));
      CHECK(test_call(random, nested, dtype, true) == gpu::Path::kTile);
      test_call(random, nested, dtype, false);
      test_call(random, random_layout(random), dtype, random.in(0, 1));
    }
  }
}

// A column that counts what is written where.
struct Counts {
  using T = float;
  static constexpr int N = gpu::kPackBytes / sizeof(T);

  const std::vector<T>& features;
  int64_t patches;
  std::vector<int>& writes;

  const T* patch(int64_t frame, int64_t patch) const { return features.data() + (frame * patches + patch) * N; }
  int64_t patch_stride() const { return N; }
  void write(int64_t token, const gpu::Pack<T, N>&) const { ++writes.at(token); }
};

void test_every_token_is_written_once(const Layout& layout) {
  const std::vector<int32_t> table = make_table(layout);
  alignas(16) static float anything[4];
  std::vector<float> features(int64_t{layout.frames} * layout.patches * Counts::N);
  std::vector<int> writes(layout.tokens);
  const Counts counts{features, layout.patches, writes};
  const gpu::Choice choice = gpu::choose({{table.data()},
                                          table.data(),
                                          {anything, 4, 4, anything, 4, Counts::N},
                                          Dtype::kFloat32});
  for (int32_t unit = 0; unit < choice.launch.units; ++unit) {
    if (choice.path == gpu::Path::kTile) {
      const gpu::Tile tile = gpu::find_tile(choice.launch.nest, unit);
      gpu::with_shape(choice.launch.nest,
                      [&](auto shape) { gpu::pool_tile<decltype(shape)>(choice.launch, tile, counts); });
    } else {
      gpu::pool_share(choice.launch, unit, counts);
    }
  }
  CHECK(std::all_of(writes.begin(), writes.end(), [](int count) { return count == 1; }));
}

void test_writes() {
  Random random(2);
  for (int i = 0; i < 2000; ++i) {
    test_every_token_is_written_once(nested_layout(random, random_tile_size(random)));
    test_every_token_is_written_once(random_layout(random));
  }
}

void test_grids() {
  Random random(3);
  for (int i = 0; i < 300; ++i) {
    const int64_t units = random.in(1, 40), vectors = random.in(1, 600);
    const gpu::Grid grid = gpu::make_grid(units, vectors);
    CHECK(grid.across % gpu::kWarp == 0 && grid.across * grid.down <= gpu::kWarp * gpu::kBlockWarps);
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

bool is_tiled(const Layout& layout) {
  const std::vector<int32_t> table = make_table(layout);
  return gpu::is_tiled({table.data()});
}

// 24 x 24 patches: 4 x 4 tiles of 6 x 6 with pairs on two frames of three.
Layout paper_layout() {
  Layout layout{3, 576, 0, {{24, kMax, {{0, 1}, {1, 2}}, every(24), boxes(12, 2)},
                            {24, kMean, every(3), boxes(4, 6), boxes(4, 6)}}};
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
  CHECK(tiled([](Layout&, Path& fine, Path&) { fine.reduce = kMean; }));
  CHECK(tiled([](Layout&, Path& fine, Path&) { fine.frames = {{1, 2}, {1, 2}, {2, 3}}; }));
  CHECK(tiled([](Layout&, Path& fine, Path&) { fine.rows = boxes(12, 2); }));
  CHECK(tiled([](Layout&, Path& fine, Path&) { fine.cols = every(24); }));
  CHECK(tiled([](Layout&, Path&, Path& coarse) { coarse.rows = boxes(2, 12); }));
  CHECK(tiled([](Layout&, Path&, Path& coarse) { coarse.cols = boxes(6, 4); }));

  CHECK(!tiled([](Layout&, Path&, Path& coarse) { coarse.reduce = kMax; }));
  CHECK(!tiled([](Layout&, Path&, Path& coarse) { coarse.cols = boxes(3, 8); }));        // no kernel of that width
  CHECK(!tiled([](Layout&, Path& fine, Path&) { fine.cols = boxes(8, 3); }));            // no kernel for those boxes
  CHECK(!tiled([](Layout&, Path& fine, Path&) { fine.cols.pop_back(); }));               // a part of a tile
  CHECK(!tiled([](Layout&, Path& fine, Path&) { fine.cols.back() = {21, 23}; }));        // across each other
  CHECK(!tiled([](Layout&, Path&, Path& coarse) { coarse.cols[1] = {5, 12}; }));         // overlapping tiles
  CHECK(!tiled([](Layout&, Path& fine, Path&) { fine.rows = boxes(8, 3); }));            // across the tiles
  CHECK(!tiled([](Layout&, Path&, Path& coarse) { coarse.frames = {{0, 1}, {1, 2}}; }));  // a frame without tiles
  CHECK(!tiled([](Layout&, Path&, Path& coarse) { coarse.frames = {{0, 3}}; }));         // over time
  CHECK(!tiled([](Layout&, Path&, Path& coarse) { coarse.frames.push_back({2, 3}); }));  // twice
  CHECK(!tiled([](Layout& l, Path& fine, Path&) { l.pathways.push_back(fine); }));       // a third pathway
  CHECK(!tiled([](Layout&, Path& fine, Path&) {                                          // on a flattened grid
    fine.width = 576;
    fine.rows = every(1);
    fine.cols = boxes(288, 2);
  }));
}

// Corrupted tables that pass the check stay inside every buffer, on either path.
void test_corrupted_tables() {
  Random random(4);
  int tiles = 0;
  for (int i = 0; i < 20000; ++i) {
    const Layout layout = nested_layout(random, random_tile_size(random));
    std::vector<int32_t> table = make_table(layout);
    int32_t& number = table[random.in(0, static_cast<int32_t>(table.size()) - 1)];
    number = random.in(0, 1) ? number + random.in(-2, 2) : random.in(-2, 70);
    if (check_plan(table.data(), static_cast<int64_t>(table.size()), layout.frames, layout.patches, layout.tokens)) {
      continue;
    }
    const Guarded features(int64_t{layout.frames} * layout.patches * 16);
    Guarded out(int64_t{layout.tokens} * 16);
    const gpu::Tensors tensors{features.data(), int64_t{layout.patches} * 4, 4, out.data(), 4, 4};
    tiles += run({{table.data()}, table.data(), tensors, Dtype::kFloat32}).path == gpu::Path::kTile;
    CHECK(out.guards_untouched());
  }
  CHECK(tiles > 100);
}

}  // namespace

int main() {
  test_grids();
  test_what_nests();
  test_writes();
  test_values();
  test_corrupted_tables();
}
