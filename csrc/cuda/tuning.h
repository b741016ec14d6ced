// How the tile kernels are tuned, by direction. `python -m bench tune` times the alternatives on a GPU, each compiled
// with SFLLAVA_TUNING, and `make gpu-pick` writes the fastest here.
#pragma once

namespace sfllava::gpu {

enum Load { kLoad, kLoadNoAllocate, kLoadStreaming };
enum Store { kStore, kStoreStreaming };

struct Tuning {
  int warps;   // of a block
  int blocks;  // that a multiprocessor must have registers for; 0 leaves it to ptxas
  Load load;   // hints of loads and stores
  Store store;
  bool slow_first;  // frames with fine tokens come first, if the layout spreads them evenly
  bool by_strip;    // backward: a strip of a tile is a unit of its own
};

#ifdef SFLLAVA_TUNING
inline constexpr Tuning kForwardTuning = SFLLAVA_TUNING, kBackwardTuning = SFLLAVA_TUNING;
#else
inline constexpr Tuning kForwardTuning{4, 0, kLoad, kStore, false, false};
inline constexpr Tuning kBackwardTuning{4, 5, kLoad, kStore, false, false};
#endif

}  // namespace sfllava::gpu
