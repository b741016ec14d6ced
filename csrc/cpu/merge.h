// Rows put back, for one instruction set.
#pragma once

#include <cstring>

#include "line.h"
#include "rows.h"

namespace sfllava::cpu {

// Calls body(at, line) for every line of `count` elements of T, the last one in part.
template <class T, class Body>
void for_lines(int64_t count, const Body& body) {
  constexpr int64_t kSize = kLineBytes / sizeof(T);
  int64_t at = 0;
  for (; at + kSize <= count; at += kSize) body(at, WholeLine{});
  if (at < count) body(at, PartLine{static_cast<int>(count - at)});
}

// Bits as they are, around the cache.
template <class V>
void stream_row(const char* from, char* to, int64_t bytes) {
  using Bits = Line<V, float>;  // a load and a store of these change no bit
  int64_t at = 0;
  for (; at + kLineBytes <= bytes; at += kLineBytes) {
    float line[Bits::kSize];  // rows of 16-bit elements may begin between two floats
    std::memcpy(line, from + at, kLineBytes);
    Bits::load(line, WholeLine{}).template store<kMax>(reinterpret_cast<float*>(to + at), WholeLine{}, true);
  }
  std::memcpy(to + at, from + at, bytes - at);
}

template <class V, class T>
void blend_row(const char* hidden, const char* row, float weight, char* out, int64_t bytes, bool stream) {
  const T *from = reinterpret_cast<const T*>(hidden), *towards = reinterpret_cast<const T*>(row);
  T* to = reinterpret_cast<T*>(out);
  for_lines<T>(bytes / static_cast<int64_t>(sizeof(T)), [&](int64_t at, auto part) {
    auto line = Line<V, T>::load(from + at, part);
    line.move_towards(Line<V, T>::load(towards + at, part), weight);
    line.template store<kMean>(to + at, part, stream);
  });
}

template <class V>
void blend_row(const Merge& m, const char* hidden, const char* row, float weight, char* out) {
  if (m.dtype == Dtype::kFloat32) return blend_row<V, float>(hidden, row, weight, out, m.bytes, m.stream);
  if (m.dtype == Dtype::kBFloat16) return blend_row<V, BFloat16>(hidden, row, weight, out, m.bytes, m.stream);
  blend_row<V, Float16>(hidden, row, weight, out, m.bytes, m.stream);
}

template <class V>
void move_row(const Merge& m, const char* from, char* to) {
  if (m.stream) return stream_row<V>(from, to, m.bytes);
  std::memcpy(to, from, m.bytes);
}

template <class V>
void put_row(const Merge& m, int64_t batch, int64_t row, int64_t place) {
  const char* from = m.rows.row(batch, place);
  char* to = m.out.row(batch, row);
  if (!m.weights) return move_row<V>(m, from, to);
  blend_row<V>(m, m.hidden.row(batch, row), from, m.weights[batch * m.index.count + place], to);
}

// The first place of the index whose row is not before `row`.
inline int64_t find_place(const Index& index, int64_t batch, int64_t row) {
  int64_t begin = 0, end = index.count;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (index.at(batch, middle) < row) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

template <class V>
void merge_with(const Merge& m, int64_t begin, int64_t end) {
  const int64_t each = tasks_of_each(m);
  int64_t place = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / each, at = task % each;
    if (m.in_place) {
      const int64_t row = m.index.at(batch, at);
      if (row >= 0 && row < m.hidden_rows) put_row<V>(m, batch, row, at);
      continue;
    }
    if (at == 0 || place < 0) place = find_place(m.index, batch, at);
    if (place < m.index.count && m.index.at(batch, place) == at) {
      put_row<V>(m, batch, at, place++);
    } else {
      move_row<V>(m, m.hidden.row(batch, at), m.out.row(batch, at));
    }
  }
}

}  // namespace sfllava::cpu
