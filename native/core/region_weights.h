// Sparse weights of a convolution on planes: packed once, bound to the geometry of an input shape.
#pragma once
#include <cstdint>
#include <vector>

#include "paring.h"
#include "planes.h"

namespace paring {

// Where a tap reads: which sampled plane of its channel, and how far from the output's pixel there.
struct PlaneTap { int plane, dy, dx; };

// Blocks of `rows` outputs x 1 (input, tap), group by group of `rows` outputs. Outputs are padded to whole groups with zeros.
struct SparseWeights {
  int rows = 0, outputs = 0, inputs = 0, taps = 0;
  std::vector<int32_t> ends;        // [groups], in blocks
  std::vector<int32_t> index;       // input * taps + tap, ascending inside a group
  std::vector<float> values;        // [blocks][rows]
  std::vector<float> bias;
  int64_t nonzeros = 0;
  int64_t blocks() const { return int64_t(index.size()); }
};

// Blocks of four outputs where the zeros come in such blocks, else single weights.
SparseWeights pack_sparse(const paring_conv&);

// A part of the groups, for one task. All its passes lie one behind the other.
struct PlanePanel { size_t block, group; int group_count; };

struct BoundWeights {
  std::vector<int32_t> offsets;
  std::vector<float> values;
  std::vector<PlaneGroup> groups;   // ends count from the panel's first block
  std::vector<PlanePanel> panels;
  std::vector<int32_t> sources, source_ends;   // of copies, see PlaneConv
  size_t copy_stride = 0;
  int passes = 1;
  size_t bytes() const { return offsets.size() * 4 + values.size() * 4 + groups.size() * sizeof(PlaneGroup); }
};

// `planes`: sampled planes of one input channel, each `stride` floats; `pitch`: floats from row to row. False where an
// offset does not fit its 32 bits. `copy_stride`: where it is not 0, taps are first copied side by side, so many floats apart.
bool bind_weights(const SparseWeights&, const std::vector<PlaneTap>& taps, int planes, int pitch, size_t stride, int passes, int panels,
                  size_t copy_stride, BoundWeights*);

}  // namespace paring
