// The kernels, by block and thread: each lane finds its unit and its channels, and does its share.
#pragma once

#include "backward.h"
#include "forward.h"

namespace sfllava::gpu {

// Calls body(unit, column) in a lane that has both.
template <class T, int N, class Body>
SFLLAVA_HOST_DEVICE void with_lane(const Launch& launch, uint32_t block, uint32_t x, uint32_t y, const Body& body) {
  const Lane lane = find_lane(launch.grid, block, x, y);
  if (lane.unit < launch.units && lane.vector < launch.vectors) {
    body(lane.unit, Column<T, N>(launch.tensors, lane.vector));
  }
}

template <Direction kDirection, class T, class Shape>
SFLLAVA_HOST_DEVICE void run_tile_lane(const Launch& launch, uint32_t block, uint32_t x, uint32_t y) {
  with_lane<T, kPackBytes / sizeof(T)>(launch, block, x, y, [&](int32_t unit, const auto& column) {
    const Tile tile = find_tile(launch.nest, unit);
    if constexpr (kDirection == Direction::kForward) {
      pool_tile<Shape>(launch, tile, column);
    } else {
      spread_tile<Shape>(launch, tile, column);
    }
  });
}

template <Direction kDirection, class T, int N>
SFLLAVA_HOST_DEVICE void run_box_lane(const Launch& launch, uint32_t block, uint32_t x, uint32_t y) {
  with_lane<T, N>(launch, block, x, y, [&](int32_t unit, const auto& column) {
    if constexpr (kDirection == Direction::kForward) {
      pool_share(launch, unit, column);
    } else {
      spread_patch(launch, unit, column);
    }
  });
}

}  // namespace sfllava::gpu
