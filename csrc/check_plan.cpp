#include "sfllava/plan.h"

namespace sfllava {
namespace {

bool inside(const Bin* bin, int32_t count, int32_t limit) {
  for (int32_t i = 0; i < count; ++i) {
    if (bin[i].start < 0 || bin[i].start >= bin[i].stop || bin[i].stop > limit) return false;
  }
  return true;
}

const char* check_pathway(const Plan& plan, int32_t index, int64_t bins) {
  const int32_t* p = plan.table + kHeader + index * kPathway;
  const bool counted = p[2] > 0 && p[4] > 0 && p[3] >= 0 && p[5] >= 0 && int64_t{p[3]} + p[2] <= bins &&
                       int64_t{p[5]} + p[4] <= bins;
  if (!counted || p[0] <= 0 || (p[1] != kMax && p[1] != kMean)) return "a pathway is malformed";
  const Pathway path = plan.pathway(index);
  if (!inside(path.col, path.cols, path.width)) return "a column bin leaves the grid";
  if (!inside(path.row, path.rows, plan.patches() / path.width)) return "a row bin leaves the grid";
  return nullptr;
}

const char* check_item(const Plan& plan, const Item& item) {
  if (item.pathway < 0 || item.pathway >= plan.pathways()) return "an item names no pathway";
  const Bin frames{item.frame_begin, item.frame_end};
  if (!inside(&frames, 1, plan.frames())) return "an item leaves the frames";
  const Pathway path = plan.pathway(item.pathway);
  const int64_t end = item.first_token + int64_t{path.rows} * path.cols;
  return item.first_token < 0 || end > plan.tokens() ? "an item leaves the tokens" : nullptr;
}

const char* check_group(const Plan& plan, int32_t g) {
  const int32_t begin = plan.group_begin(g), end = plan.group_begin(g + 1);
  if (begin < 0 || begin >= end || end > plan.items()) return "a group is malformed";
  const Item first = plan.item(begin);
  for (int32_t i = begin + 1; i < end; ++i) {
    const Item item = plan.item(i);
    if (item.frame_begin != first.frame_begin || item.frame_end != first.frame_end) return "a group mixes frames";
  }
  return nullptr;
}

}  // namespace

const char* check_plan(const int32_t* table, int64_t size, int64_t frames, int64_t patches, int64_t tokens) {
  if (size < kHeader || table[0] != kPlanVersion) return "the table is of another version";
  const Plan plan{table};
  if (plan.patches() != patches || plan.frames() != frames || plan.tokens() != tokens) {
    return "the table is of another shape than the tensors";
  }
  const bool counted = plan.pathways() >= 0 && plan.groups() >= 0 && plan.items() >= 0;
  if (!counted || plan.bins_at() > size || (size - plan.bins_at()) % 2 != 0) return "the table is cut short";
  const int64_t bins = (size - plan.bins_at()) / 2;
  const char* wrong = nullptr;
  for (int32_t i = 0; i < plan.pathways() && !wrong; ++i) wrong = check_pathway(plan, i, bins);
  for (int32_t i = 0; i < plan.items() && !wrong; ++i) wrong = check_item(plan, plan.item(i));
  for (int32_t g = 0; g < plan.groups() && !wrong; ++g) wrong = check_group(plan, g);
  return wrong;
}

}  // namespace sfllava
