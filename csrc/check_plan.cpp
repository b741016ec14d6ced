#include "sfllava/plan.h"

namespace sfllava {
namespace {

// Whether so many bins lie within [0, limit), and hold something unless they need not.
bool inside(const Bin* bin, int32_t count, int32_t limit, bool may_be_empty = false) {
  for (int32_t i = 0; i < count; ++i) {
    const int64_t size = int64_t{bin[i].stop} - bin[i].start;
    if (bin[i].start < 0 || bin[i].stop > limit || size < (may_be_empty ? 0 : 1)) return false;
  }
  return true;
}

const char* check_pathway(const Plan& plan, int32_t index, int64_t bins) {
  const int32_t* p = plan.table() + kHeader + index * kPathway;
  if (p[0] <= 0 || plan.patches() % p[0] || (p[1] != kMax && p[1] != kMean)) return "a pathway is malformed";
  const int32_t height = plan.patches() / p[0], width = p[0];
  const auto counted = [&](int32_t first, int32_t count) { return first >= 0 && int64_t{first} + count <= bins; };
  const bool fits = p[2] > 0 && p[4] > 0 && counted(p[3], p[2]) && counted(p[5], p[4]) && counted(p[6], height) &&
                    counted(p[7], width);
  if (!fits) return "a pathway is malformed";
  const Pathway path = plan.pathway(index);
  if (!inside(path.col, path.cols, width)) return "a column bin leaves the grid";
  if (!inside(path.row, path.rows, height)) return "a row bin leaves the grid";
  const bool covers = inside(path.row_cover, height, path.rows, true) && inside(path.col_cover, width, path.cols, true);
  return covers ? nullptr : "a cover leaves the bins";
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

const char* check_frame(const Plan& plan, int32_t frame) {
  const int32_t begin = plan.reader_begin(frame), end = plan.reader_begin(frame + 1);
  if (begin < 0 || begin > end || end > plan.readers()) return "a frame's readers are malformed";
  for (int32_t i = begin; i < end; ++i) {
    if (plan.reader(i) < 0 || plan.reader(i) >= plan.items()) return "a reader is no item";
  }
  return nullptr;
}

}  // namespace

const char* check_plan(const int32_t* table, int64_t size, int64_t frames, int64_t patches, int64_t tokens) {
  if (size < kHeader || table[0] != kPlanVersion) return "the table is of another version";
  if (table[1] != patches || table[2] != frames || table[3] != tokens) {
    return "the table is of another shape than the tensors";
  }
  const bool counted = table[4] >= 0 && table[5] >= 0 && table[6] >= 0 && table[7] >= 0;
  if (!counted || Plan::bins_at(table) > size || (size - Plan::bins_at(table)) % 2) return "the table is cut short";
  const Plan plan(table);
  const int64_t bins = (size - Plan::bins_at(table)) / 2;
  const char* wrong = nullptr;
  for (int32_t i = 0; i < plan.pathways() && !wrong; ++i) wrong = check_pathway(plan, i, bins);
  for (int32_t i = 0; i < plan.items() && !wrong; ++i) wrong = check_item(plan, plan.item(i));
  for (int32_t g = 0; g < plan.groups() && !wrong; ++g) wrong = check_group(plan, g);
  for (int32_t f = 0; f < plan.frames() && !wrong; ++f) wrong = check_frame(plan, f);
  return wrong;
}

}  // namespace sfllava
