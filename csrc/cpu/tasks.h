// How the plan becomes tasks: one per group of items and band of the item that leads it.
#pragma once

#include "bands.h"

namespace sfllava::cpu {

// Room for count_sums(channels) floats; grows with the largest call of the thread.
float* thread_sums(int64_t channels);

// The item whose bands the rest of a group follows: on the largest grid (no class token), with the fewest rows.
inline int32_t find_lead(const Plan& plan, int32_t group) {
  const auto path = [&](int32_t i) { return plan.pathway(plan.item(i).pathway); };
  const auto patches = [&](int32_t i) { return int64_t{path(i).height} * path(i).width; };
  int32_t best = plan.group_begin(group);
  for (int32_t i = best + 1; i < plan.group_begin(group + 1); ++i) {
    const int64_t more = patches(i) - patches(best);
    if (more > 0 || (more == 0 && path(i).rows < path(best).rows)) best = i;
  }
  return best;
}

inline int32_t most_bands(const Plan& plan) {
  int32_t most = 0;
  for (int32_t i = 0; i < plan.pathways(); ++i) most = plan.pathway(i).rows > most ? plan.pathway(i).rows : most;
  return (most + kBandRows - 1) / kBandRows;
}

inline bool same_grid(const Pathway& a, const Pathway& b) {
  return a.first_patch == b.first_patch && a.height == b.height && a.width == b.width;
}

// Whether `coarse` is a mean over boxes that tile the grid in whole pairs, and `fine` pools just those pairs.
inline bool pairs_nest(const Pathway& coarse, const Item& item, const Pathway& fine) {
  if (coarse.reduce != kMean || item.frame_end - item.frame_begin != 1) return false;
  if (fine.reduce == kLinear || !same_grid(coarse, fine)) return false;
  if (fine.rows != fine.height || fine.cols * 2 != fine.width) return false;
  for (int32_t r = 0; r < fine.rows; ++r) {
    if (fine.row[r].start != r || fine.row[r].size() != 1) return false;
  }
  for (int32_t c = 0; c < fine.cols; ++c) {
    if (fine.col[c].start != 2 * c || fine.col[c].size() != 2) return false;
  }
  int32_t row = 0, col = 0;
  for (int32_t r = 0; r < coarse.rows; row = coarse.row[r++].stop) {
    if (coarse.row[r].start != row || coarse.row[r].size() != coarse.row[0].size()) return false;
  }
  for (int32_t c = 0; c < coarse.cols; col = coarse.col[c++].stop) {
    if (coarse.col[c].start != col || coarse.col[c].size() % 2 != 0) return false;
  }
  return row == coarse.height && col == coarse.width;
}

inline int64_t first_patch(const Pathway& path, int32_t row_bin) { return path.patch(path.row[row_bin].start, 0); }

// The first row bin that begins at or after a patch.
inline int32_t first_row_bin(const Pathway& path, int64_t patch) {
  int32_t r = 0;
  while (r < path.rows && first_patch(path, r) < patch) ++r;
  return r;
}

template <class Line>
void run_band(const Pooling& p, int32_t group, int32_t band, const Bands<Line>& bands) {
  const Plan& plan = p.plan;
  const int32_t lead = find_lead(plan, group);
  const Item lead_item = plan.item(lead);
  const Pathway coarse = plan.pathway(lead_item.pathway);
  if (band * kBandRows >= coarse.rows) return;
  const int32_t last = (band + 1) * kBandRows;
  const Band whole{coarse, lead_item, band * kBandRows, last < coarse.rows ? last : coarse.rows};
  const int32_t begin = plan.group_begin(group), end = plan.group_begin(group + 1);
  if (end - begin == 2) {
    const Item item = plan.item(lead == begin ? begin + 1 : begin);
    const Pathway fine = plan.pathway(item.pathway);
    if (pairs_nest(coarse, lead_item, fine)) return bands.pool_with_pairs(whole, fine, item);
  }
  bands.pool(whole);
  // The other pathways' row bins go with the band that their first patch lies in, while it is in the cache.
  const int64_t from = band == 0 ? 0 : first_patch(coarse, whole.begin);
  const int64_t to = last < coarse.rows ? first_patch(coarse, last) : plan.patches();
  for (int32_t i = begin; i < end; ++i) {
    if (i == lead) continue;
    const Item item = plan.item(i);
    const Pathway path = plan.pathway(item.pathway);
    const int32_t first = first_row_bin(path, from);
    bands.pool({path, item, first, first_row_bin(path, to)});
  }
}

template <class V, class T>
void run_tasks_of(const Pooling& p, int64_t begin, int64_t end) {
  const Bands<Line<V, T>> bands(p, thread_sums(p.channels));
  const int32_t per_group = most_bands(p.plan);
  for (int64_t task = begin; task < end; ++task) {
    run_band(p, static_cast<int32_t>(task / per_group), static_cast<int32_t>(task % per_group), bands);
  }
}

template <class V>
void run_tasks_with(const Pooling& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::kFloat32) return run_tasks_of<V, float>(p, begin, end);
  if (p.dtype == Dtype::kBFloat16) return run_tasks_of<V, BFloat16>(p, begin, end);
  run_tasks_of<V, Float16>(p, begin, end);
}

}  // namespace sfllava::cpu
