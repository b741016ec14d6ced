// The kernels, by block and thread: each lane finds its unit and its channels, and does its share.
#pragma once

#include "backward.h"
#include "forward.h"

namespace sfllava::gpu {

// Calls body(unit, column) in a lane that has both.
template <class Column, class Body>
SFLLAVA_HOST_DEVICE void with_lane(const Launch& launch, uint32_t block, uint32_t x, uint32_t y, const Body& body) {
  const Lane lane = find_lane(launch.grid, block, x, y);
  if (lane.unit < launch.units && lane.vector < launch.vectors) {
    body(lane.unit, Column(launch.tensors, lane.vector));
  }
}

template <Direction kDirection, class Shape, class Column>
SFLLAVA_HOST_DEVICE void run_tile_unit(const Launch& launch, int32_t unit, const Column& column) {
  const int32_t strips = launch.nest.height / Shape::kBoxHeight;
  const int32_t parts = kDirection == Direction::kBackward && kTuning<kDirection>.by_strip ? strips : 1;
  Tile tile = find_tile(launch.nest, unit / parts);
  if constexpr (kTuning<kDirection>.slow_first) tile.frame = nth_frame(launch.nest, tile.frame);
  if constexpr (kDirection == Direction::kForward) {
    pool_tile<Shape>(launch, tile, column);
  } else {
    const int32_t row = unit % parts;
    spread_strips<Shape>(launch, tile, column, row, row + strips / parts);
  }
}

template <Direction kDirection, class T, class Shape>
SFLLAVA_HOST_DEVICE void run_tile_lane(const Launch& launch, uint32_t block, uint32_t x, uint32_t y) {
  using Column = Column<T, kPackBytes / sizeof(T), kTuning<kDirection>.load, kTuning<kDirection>.store>;
  with_lane<Column>(launch, block, x, y, [&](int32_t unit, const Column& column) {
    run_tile_unit<kDirection, Shape>(launch, unit, column);
  });
}

template <Direction kDirection, class T, int N>
SFLLAVA_HOST_DEVICE void run_box_lane(const Launch& launch, uint32_t block, uint32_t x, uint32_t y) {
  with_lane<Column<T, N>>(launch, block, x, y, [&](int32_t unit, const auto& column) {
    if constexpr (kDirection == Direction::kForward) {
      pool_share(launch, unit, column);
    } else {
      spread_patch(launch, unit, column);
    }
  });
}

}  // namespace sfllava::gpu
