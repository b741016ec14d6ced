// The check of a plan's table, which may come from anywhere.
#pragma once

#include <cstdint>
#include <string>

namespace sfllava {

// Empty if every index in the table stays inside the table, the features and the output; else what is wrong.
std::string check_plan(const int32_t* table, int64_t size, int64_t frames, int64_t patches, int64_t tokens);

}  // namespace sfllava
