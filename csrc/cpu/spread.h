// The backward, once for every instruction set and dtype.
//
// A patch adds up the shares of all tokens whose boxes contain it, in the order of the tokens, in float32 from zero,
// which makes it equal to the reference bit for bit. A box has one share for all of its patches: a mean's gradient
// divided, or a maximum's gradient and the number of the patch that it came from. The share is computed once, and kept
// in the cache while the patches of a band of a frame are written one after the other.
#pragma once

#include <algorithm>

#include "backward.h"
#include "line.h"
#include "scratch.h"
#include "sfllava/linear.h"

namespace sfllava::cpu {

constexpr int32_t kBands = 4;             // of a frame
constexpr int64_t kKeptFloats = 1 << 18;  // of all boxes; in use at a time are about half of these 1 MB

template <class Line>
class Spread {
  using T = typename Line::T;

 public:
  explicit Spread(const Backward& b)
      : b_(b),
        plan_(b.plan),
        grad_(static_cast<const T*>(b.grad)),
        in_(static_cast<const T*>(b.features)),
        out_(static_cast<T*>(b.out)) {
    for (int32_t i = 0; i < plan_.items(); ++i) {
      const Item item = plan_.item(i);
      several_frames_ = several_frames_ || item.frame_end - item.frame_begin > 1;
    }
    for (int32_t f = 0; f < plan_.frames(); ++f) {
      readers_ = std::max(readers_, plan_.reader_begin(f + 1) - plan_.reader_begin(f));
    }
    for (int32_t i = 0; i < plan_.pathways(); ++i) measure(plan_.pathway(i));
    boxes_ = int64_t{readers_} * rows_ * cols_;
    const int64_t fit = std::max<int64_t>(1, kKeptFloats / (2 * boxes_ + 2) / Line::kSize);
    const int64_t lines = count_lines(b.channels);
    blocks_ = (lines + fit - 1) / fit;
    block_ = (lines + blocks_ - 1) / blocks_ * Line::kSize;
    pitch_ = block_ + 32;  // else powers of two of channels would share one set of the cache
    const int64_t keys = (boxes_ * 2 + 15) / 16 * 16;
    float* floats = thread_floats(keys + (2 * boxes_ + 2) * pitch_);
    keys_ = reinterpret_cast<int32_t*>(floats);
    shares_ = floats + keys;
    winners_ = shares_ + boxes_ * pitch_;
    sums_ = winners_ + boxes_ * pitch_;
    best_ = sums_ + pitch_;
  }

  // Tasks are numbered so that boxes of several frames stay in use from frame to frame, and others from band to band.
  void run(int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      // One band of several frames, or one frame: as much as shares what is kept.
      const int64_t stop = several_frames_ ? std::min(end, (at / plan_.frames() + 1) * plan_.frames()) : at + 1;
      for (begin_ = 0; begin_ < b_.channels; begin_ += block_) {
        end_ = std::min(begin_ + block_, b_.channels);
        std::fill(keys_, keys_ + 2 * boxes_, -1);
        for (int64_t task = at; task < stop; ++task) {
          if (several_frames_) {
            spread_band(static_cast<int32_t>(task % plan_.frames()), static_cast<int32_t>(task / plan_.frames()));
          } else {
            spread_band(static_cast<int32_t>(task / kBands), static_cast<int32_t>(task % kBands));
          }
        }
      }
      at = stop;
    }
  }

 private:
  static constexpr int kMost = 4;         // shares added in one pass
  static constexpr int kMostPatches = 8;  // written in one pass

  // A term of a patch's sum: the share of a box, perhaps times a weight, or only in the channels that the element won.
  struct Term {
    enum Kind { kWhole, kWeighted, kWon } kind;
    const float *share, *winner;
    float weight;
    int32_t element;
  };
  struct Terms {
    Term term[kMost];
    int count = 0;
    bool first = true;  // nothing is in the sums yet
    T* to = nullptr;
    int patches = 0;  // one after the other, with these terms

    bool operator==(const Terms& other) const {
      bool same = first && other.first && count == other.count;
      for (int i = 0; same && i < count; ++i) {
        const Term &a = term[i], &b = other.term[i];
        same = a.kind == Term::kWhole && b.kind == Term::kWhole && a.share == b.share;
      }
      return same;
    }
  };

  static int64_t count_lines(int64_t channels) { return (channels + Line::kSize - 1) / Line::kSize; }

  int32_t first_of_band(int32_t band) const { return static_cast<int32_t>(int64_t{plan_.patches()} * band / kBands); }

  // How many rows of boxes are in use at once: those that hold a patch, or all of a band.
  void measure(const Pathway& path) {
    cols_ = std::max(cols_, path.cols);
    for (int32_t row = 0; row < path.height; ++row) rows_ = std::max(rows_, path.row_cover[row].size());
    if (!several_frames_) return;
    for (int32_t band = 0; band < kBands; ++band) {
      const int32_t begin = std::max(0, first_of_band(band) - path.first_patch) / path.width;
      const int32_t last = std::min(path.height - 1, (first_of_band(band + 1) - path.first_patch) / path.width);
      if (begin <= last) rows_ = std::max(rows_, path.row_cover[last].stop - path.row_cover[begin].start);
    }
  }

  // Patches with the same terms, such as those of a row of a mean's box, are written together.
  void spread_band(int32_t frame, int32_t band) {
    Terms waiting;
    for (int32_t patch = first_of_band(band); patch < first_of_band(band + 1); ++patch) {
      const Terms terms = collect(frame, patch, waiting);
      if (waiting.patches > 0 && waiting.patches < kMostPatches && terms == waiting) {
        ++waiting.patches;
        continue;
      }
      write(waiting);
      waiting = terms;
      waiting.to = out_ + (int64_t{frame} * plan_.patches() + patch) * b_.channels;
      waiting.patches = 1;
    }
    write(waiting);
  }

  // The last terms of a patch; earlier ones are added to the sums. Writes the waiting patches before anything that they
  // need is changed.
  Terms collect(int32_t frame, int32_t patch, Terms& waiting) {
    Terms terms;
    const int32_t readers = plan_.reader_begin(frame);
    for (int32_t reader = readers; reader < plan_.reader_begin(frame + 1); ++reader) {
      const int32_t index = plan_.reader(reader);
      const Item item = plan_.item(index);
      const Pathway path = plan_.pathway(item.pathway);
      const int32_t on_grid = patch - path.first_patch;
      if (on_grid < 0 || on_grid >= int64_t{path.height} * path.width) continue;
      const int32_t row = on_grid / path.width, col = on_grid % path.width;
      const Bin rows = path.row_cover[row], cols = path.col_cover[col];
      for (int32_t r = rows.start; r < rows.stop; ++r) {
        for (int32_t c = cols.start; c < cols.stop; ++c) {
          if (terms.count == kMost) {
            write(waiting);
            add(terms, false);
            terms.count = 0;
            terms.first = false;
          }
          const int64_t box = (int64_t{reader - readers} * rows_ + r % rows_) * cols_ + c;
          if (keys_[2 * box] != index || keys_[2 * box + 1] != r) {
            write(waiting);
            prepare(item, path, r, c, box);
            keys_[2 * box] = index;
            keys_[2 * box + 1] = r;
          }
          terms.term[terms.count++] = term(item, path, r, c, box, frame, row, col);
        }
      }
    }
    return terms;
  }

  void write(Terms& terms) const {
    if (terms.patches > 0) add(terms, true);
    terms.patches = 0;
  }

  static int64_t count_elements(const Item& item, const Pathway& path, int32_t r, int32_t c) {
    return int64_t{item.frame_end - item.frame_begin} * path.row[r].size() * path.col[c].size();
  }

  Term term(const Item& item, const Pathway& path, int32_t r, int32_t c, int64_t box, int32_t frame, int32_t row,
            int32_t col) const {
    Term term{Term::kWhole, shares_ + box * pitch_, winners_ + box * pitch_, 1.0f, 0};
    const Bin rows = path.row[r], cols = path.col[c];
    row -= rows.start;
    col -= cols.start;
    if (path.reduce == kLinear) {
      term.kind = Term::kWeighted;
      term.weight = LinearBox(path, r, c).weight(row, col);
    } else if (path.reduce == kMax && count_elements(item, path, r, c) > 1) {
      term.kind = Term::kWon;
      term.element = ((frame - item.frame_begin) * rows.size() + row) * cols.size() + col;
    }
    return term;
  }

  // Computes the share of a box.
  void prepare(const Item& item, const Pathway& path, int32_t r, int32_t c, int64_t box) const {
    const T* grad = grad_ + token_row(item, path, r, c) * b_.token_stride;
    float* share = shares_ + box * pitch_ - begin_;
    const float frames = path.reduce == kMax ? 1.0f : static_cast<float>(item.frame_end - item.frame_begin);
    const float rows = path.reduce == kMean ? static_cast<float>(path.row[r].size()) : 1.0f;
    const float cols = path.reduce == kMean ? static_cast<float>(path.col[c].size()) : 1.0f;
    for_lines([&](int64_t d, auto width) {
      Line line = Line::load(grad + d, width);
      for (const float size : {frames, rows, cols}) {
        if (size != 1.0f) line.divide(size);
      }
      line.store_sums(share + d);
    });
    if (path.reduce == kMax && count_elements(item, path, r, c) > 1) find_winner(item, path, r, c, box);
  }

  // Which element of a box the maximum came from, some elements at a time.
  void find_winner(const Item& item, const Pathway& path, int32_t r, int32_t c, int64_t box) const {
    const Bin rows = path.row[r], cols = path.col[c];
    float *winner = winners_ + box * pitch_ - begin_, *best = best_ - begin_;
    const T* from[kMost];
    int32_t element = 0;
    int count = 0;
    const auto take = [&] {
      for_lines([&, first = element - count](int64_t d, auto width) {
        const int begin = first == 0 ? 1 : 0;
        Line most = first == 0 ? Line::load(from[0] + d, width) : Line::load_sums(best + d);
        Line won = first == 0 ? Line::number(0) : Line::load_sums(winner + d);
        // The patches after these, of the next box or the rest of this one, into the second-level cache.
        for (int i = 0; i < count; ++i) __builtin_prefetch(from[i] + count * b_.patch_stride + d, 0, 2);
        for (int i = begin; i < count; ++i) {
          most.keep_larger(Line::load(from[i] + d, width), Line::number(first + i), won);
        }
        most.store_sums(best + d);
        won.store_sums(winner + d);
      });
      count = 0;
    };
    for (int32_t t = item.frame_begin; t < item.frame_end; ++t) {
      for (int32_t row = rows.start; row < rows.stop; ++row) {
        for (int32_t col = cols.start; col < cols.stop; ++col) {
          if (count == kMost) take();
          from[count++] = in_ + t * b_.frame_stride + path.patch(row, col) * b_.patch_stride;
          ++element;
        }
      }
    }
    take();
  }

  // Adds to the sums, which are zero at first; the last time they become patches.
  void add(const Terms& terms, bool last) const {
    float* sums = sums_ - begin_;
    for_lines([&](int64_t d, auto width) {
      Line acc = terms.first ? Line::template start<kMean>() : Line::load_sums(sums + d);
      for (int i = 0; i < terms.count; ++i) {
        const Term& term = terms.term[i];
        const Line share = Line::load_sums(term.share + (d - begin_));
        if (term.kind == Term::kWhole) {
          acc.template take<kMean>(share);
        } else if (term.kind == Term::kWeighted) {
          acc.take_weighted(share, term.weight);
        } else {
          acc.take_where(share, Line::load_sums(term.winner + (d - begin_)), Line::number(term.element));
        }
      }
      if (last) {
        acc.template store_all<kMean>(terms.to + d, b_.channels, terms.patches, width, b_.stream);
      } else {
        acc.store_sums(sums + d);
      }
    });
  }

  // Calls body(first channel, channels in this line) for the channels of a block.
  template <class Body>
  void for_lines(const Body& body) const {
    int64_t d = begin_;
    for (; d + Line::kSize <= end_; d += Line::kSize) body(d, Line::whole());
    if (d < end_) body(d, Line::part(static_cast<int>(end_ - d)));
  }

  const Backward& b_;
  const Plan& plan_;
  const T *grad_, *in_;
  T* out_;
  bool several_frames_ = false;
  int32_t readers_ = 0, rows_ = 1, cols_ = 1;  // boxes in use at once, at most
  int64_t boxes_, blocks_, block_, pitch_;
  int64_t begin_ = 0, end_ = 0;  // the channels of a block
  int32_t* keys_;                // the item and the row bin of every box that is kept
  float *shares_, *winners_, *sums_, *best_;
};

template <class V>
void spread_with(const Backward& b, int64_t begin, int64_t end) {
  with_element(b.dtype, [&](auto element) { Spread<Line<V, decltype(element)>>(b).run(begin, end); });
}

}  // namespace sfllava::cpu
