#include "launch.h"
#include "shapes.h"

namespace sfllava::gpu {
namespace {

bool on_one_grid(const Pathway& a, const Pathway& b) {
  return a.first_patch == 0 && b.first_patch == 0 && a.height == b.height && a.width == b.width;
}

bool shapes_nest(const Plan& plan, int32_t coarse, int32_t fine, Nest* nest) {
  const Pathway c = plan.pathway(coarse), f = plan.pathway(fine);
  *nest = {coarse,
           fine,
           f.reduce,
           c.width,
           c.pitch,
           f.pitch,
           c.rows,
           c.cols,
           equal_size(c.row, c.rows),
           equal_size(c.col, c.cols),
           equal_size(f.row, f.rows),
           equal_size(f.col, f.cols),
           0,
           0};
  if (c.reduce != kMean || f.reduce == kLinear || !on_one_grid(c, f)) return false;
  if (!nest->height || !nest->width || !nest->box_height || !nest->box_width) return false;
  if (nest->height % nest->box_height || nest->width % nest->box_width) return false;
  // The last bins end inside the grid: no product overflows.
  return f.rows * nest->box_height == c.rows * nest->height && f.cols * nest->box_width == c.cols * nest->width;
}

bool items_nest(const Plan& plan, const Nest& nest) {
  if (plan.groups() != plan.frames()) return false;
  for (int32_t g = 0; g < plan.groups(); ++g) {
    const FrameItems items = find_items(plan, nest, g);
    const Item coarse = plan.item(items.coarse);
    if (coarse.pathway != nest.coarse || coarse.frame_begin != g || coarse.frame_end != g + 1) return false;
    for (int32_t i = items.fine_begin; i < items.fine_end; ++i) {
      if (plan.item(i).pathway != nest.fine) return false;
    }
    for (int32_t i = plan.group_begin(g) + 1; i < plan.group_begin(g + 1); ++i) {
      if (plan.first_token(i) < plan.first_token(i - 1)) return false;
    }
  }
  return true;
}

// A stride matters only if there is a second element.
bool steps_by_packs(int64_t size, int64_t stride, int64_t pack) { return size <= 1 || stride % pack == 0; }

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPackBytes == 0; }

// Whether every vector of channels begins at a multiple of `pack` elements.
bool is_packed(const Pooling& p, int64_t pack) {
  const Tensors& t = p.tensors;
  return t.channels % pack == 0 && is_aligned(t.features) && is_aligned(t.grad) && is_aligned(t.out) &&
         steps_by_packs(p.plan.frames(), t.frame_stride, pack) &&
         steps_by_packs(p.plan.patches(), t.patch_stride, pack) &&
         steps_by_packs(p.plan.tokens(), t.token_stride, pack);
}

// Frames with fine tokens come first if the layout spreads them evenly, as SlowFast-LLaVA does: their tiles take
// longest, and a launch ends with its last tile.
void put_fine_first(const Plan& plan, Nest* nest) {
  const auto has_fine = [&](uint32_t frame) {
    const FrameItems items = find_items(plan, *nest, static_cast<int32_t>(frame));
    return items.fine_begin < items.fine_end;
  };
  const uint32_t frames = static_cast<uint32_t>(plan.frames());
  if (frames > UINT16_MAX) return;  // products of two have 32 bits
  uint32_t count = 0;
  for (uint32_t frame = 0; frame < frames; ++frame) count += has_fine(frame);
  for (uint32_t i = 0; i < count; ++i) {
    if (!has_fine(i * frames / count)) return;
  }
  if (count < frames) nest->first_frames = count, nest->frames = frames;
}

bool find_tiles(const Plan& plan, Direction direction, Nest* nest) {
  if (!find_nest(plan, nest) || !has_shape(*nest)) return false;
  return direction == Direction::kForward || nest->covers(plan.patches());
}

}  // namespace

bool find_nest(const Plan& plan, Nest* nest) {
  if (plan.pathways() != 2 || plan.groups() == 0) return false;
  return (shapes_nest(plan, 0, 1, nest) && items_nest(plan, *nest)) ||
         (shapes_nest(plan, 1, 0, nest) && items_nest(plan, *nest));
}

bool is_tiled(const Plan& plan, Direction direction) {
  Nest nest;
  return find_tiles(plan, direction, &nest);
}

Choice choose(const Pooling& p) {
  const int64_t pack = kPackBytes / (p.dtype == Dtype::kFloat32 ? 4 : 2);
  const bool packed = is_packed(p, pack);
  const int64_t vectors = p.tensors.channels / (packed ? pack : 1);
  const Tuning tuned = p.direction == Direction::kForward ? kForwardTuning : kBackwardTuning;
  Launch launch{p.plan.in(p.table), p.tensors, {}, 0, vectors, 0, {}};
  const bool tiled = packed && find_tiles(p.plan, p.direction, &launch.nest);
  int64_t units = int64_t{p.plan.frames()} * (tiled ? launch.nest.tiles() : p.plan.patches());
  if (tiled) {
    if (tuned.slow_first) put_fine_first(p.plan, &launch.nest);
    if (tuned.by_strip && p.direction == Direction::kBackward) units *= launch.nest.height / launch.nest.box_height;
  } else if (p.direction == Direction::kForward) {
    launch.shares = count_shares(p.plan, vectors);
    units = int64_t{p.plan.groups()} * launch.shares;
  }
  launch.grid = make_grid(units, vectors, tiled ? tuned.warps : kBlockWarps);
  launch.units = static_cast<int32_t>(units);
  return {p.direction, tiled ? Path::kTile : Path::kBox, packed, launch};
}

}  // namespace sfllava::gpu
