#include "region_weights.h"

#include <algorithm>

namespace paring {
namespace {

// What a multiply-add of a lone weight costs against one inside a block of four: its load is used once.
constexpr double lone_cost = 1.4;

bool any(const paring_conv& c, int taps, int first, int rows, int input, int tap, float* w) {
  const float* weights = static_cast<const float*>(c.weights);
  bool found = false;
  for (int q = 0; q < rows; q++) {
    int o = first + q;
    w[q] = o < c.outputs ? weights[(size_t(o) * taps + tap) * c.inputs + input] : 0.0f;
    found |= w[q] != 0;
  }
  return found;
}

}  // namespace

SparseWeights pack_sparse(const paring_conv& c) {
  SparseWeights s;
  s.outputs = c.outputs; s.inputs = c.inputs; s.taps = c.kernel_h * c.kernel_w;
  float w[4];
  int64_t blocks = 0;
  for (int o = 0; o < c.outputs; o += 4)
    for (int i = 0; i < c.inputs; i++)
      for (int t = 0; t < s.taps; t++) {
        blocks += any(c, s.taps, o, 4, i, t, w);
        for (float v : w) s.nonzeros += v != 0;
      }
  s.rows = double(blocks) * 4 <= double(s.nonzeros) * lone_cost ? 4 : 1;
  for (int o = 0; o < c.outputs; o += s.rows) {
    for (int i = 0; i < c.inputs; i++)
      for (int t = 0; t < s.taps; t++) {
        if (!any(c, s.taps, o, s.rows, i, t, w)) continue;
        s.index.push_back(i * s.taps + t);
        s.values.insert(s.values.end(), w, w + s.rows);
      }
    s.ends.push_back(int32_t(s.index.size()));
  }
  s.bias.assign(s.ends.size() * size_t(s.rows), 0.0f);
  if (c.bias) std::copy_n(static_cast<const float*>(c.bias), c.outputs, s.bias.begin());
  return s;
}

bool bind_weights(const SparseWeights& s, const std::vector<PlaneTap>& taps, int planes, int pitch, size_t stride, int passes, int panels,
                  size_t copy_stride, BoundWeights* out) {
  BoundWeights& b = *out;
  b = BoundWeights();
  b.passes = passes;
  b.offsets.reserve(s.index.size());
  b.values.reserve(s.values.size());
  const int groups = int(s.ends.size());
  std::vector<int64_t> of_tap(taps.size());
  for (size_t t = 0; t < taps.size(); t++) of_tap[t] = int64_t(taps[t].plane) * int64_t(stride) + int64_t(taps[t].dy) * pitch + taps[t].dx;
  auto offset = [&](int32_t index) { return (int64_t(index / s.taps) * planes * int64_t(stride) + of_tap[size_t(index % s.taps)]) * 4; };
  auto begin = [&](int pass) { return int32_t(int64_t(s.inputs) * pass / passes * s.taps); };
  b.copy_stride = copy_stride;
  if (copy_stride)
    for (int pass = 0; pass < passes; pass++) {
      for (int32_t i = begin(pass); i < begin(pass + 1); i++) {
        if (offset(i) != int32_t(offset(i))) return false;
        b.sources.push_back(int32_t(offset(i)));
      }
      b.source_ends.push_back(int32_t(b.sources.size()));
    }
  struct Piece { int group; int32_t first, last; };
  std::vector<Piece> pieces;
  int from = 0;
  for (int p = 0; p < panels; p++) {
    // Panels hold about as many blocks each; a group counts for some blocks because of its stores.
    int to = from;
    const double share = double(s.blocks() + 4 * int64_t(groups)) * (p + 1) / panels;
    while (to < groups && (p == panels - 1 || double(s.ends[size_t(to)]) + 4.0 * (to + 1) <= share)) to++;
    if (to == from) continue;
    PlanePanel panel = {b.offsets.size(), b.groups.size(), to - from};
    for (int pass = 0; pass < passes; pass++) {
      const int32_t start = begin(pass), limit = begin(pass + 1);
      pieces.clear();
      for (int g = from; g < to; g++) {
        auto a = s.index.begin() + (g ? s.ends[size_t(g) - 1] : 0), z = s.index.begin() + s.ends[size_t(g)];
        pieces.push_back({g, int32_t(std::lower_bound(a, z, start) - s.index.begin()), int32_t(std::lower_bound(a, z, limit) - s.index.begin())});
      }
      // By length, so that the processor foresees the end of nearly every loop.
      std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& x, const Piece& y) { return x.last - x.first < y.last - y.first; });
      for (const Piece& piece : pieces) {
        for (int32_t k = piece.first; k < piece.last; k++) {
          int32_t i = s.index[size_t(k)];
          int64_t bytes = copy_stride ? int64_t(i - start) * int64_t(copy_stride) * 4 : offset(i);
          if (bytes != int32_t(bytes)) return false;
          b.offsets.push_back(int32_t(bytes));
        }
        b.values.insert(b.values.end(), s.values.begin() + int64_t(piece.first) * s.rows, s.values.begin() + int64_t(piece.last) * s.rows);
        b.groups.push_back({piece.group * s.rows, int32_t(b.offsets.size() - panel.block)});
      }
    }
    b.panels.push_back(panel);
    from = to;
  }
  return true;
}

}  // namespace paring
