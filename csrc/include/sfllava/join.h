// Messages out of words and numbers.
#pragma once

#include <string>
#include <type_traits>

namespace sfllava {

inline void append(std::string& line, const char* words) { line += words; }
inline void append(std::string& line, const std::string& words) { line += words; }
template <class Number, class = std::enable_if_t<std::is_integral_v<Number>>>
void append(std::string& line, Number number) {
  line += std::to_string(number);
}

template <class... Parts>
std::string join(const Parts&... parts) {
  std::string line;
  (append(line, parts), ...);
  return line;
}

}  // namespace sfllava
