// From the operators of a region and the shapes of its inputs to steps on planes: which values share a pitch, how wide the
// zeros around them must be, where pixels are sampled. Pure geometry: no weights, no memory.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "region.h"
#include "region_weights.h"

namespace paring {

// Pixels of a channel lie row by row, `pitch` apart; the gap behind a row is also the gap before the next one. What is read
// around an image are zeros: in the gaps, in `lead` before every channel, in the lead of the next channel behind it.
struct PlaneValue {
  int h = 0, w = 0, c = 0;
  int resolution = -1;     // values of one resolution share pitch and tiles
  bool planes = false;     // whole planes, for somebody reads other pixels than its own; else tiles of all channels, one by one
  bool halo = false;       // planes whose surroundings are read, too
  size_t lead = 0, stride = 0, behind = 0;   // floats; planes only. `behind`: read after the last channel
  int vectors = 0;         // that cover the rows
  size_t table = 0;        // of pixels
};

struct PlaneResolution { int pitch = 0, vectors = 0, tiles = 0, tile_vectors = 0; };

struct PlaneStep {
  enum Kind { in, out, sample, conv, depthwise, add } kind;
  int x = -1, x2 = -1, y = -1;      // x2: the other operand of an addition; of conv, what the result is added to
  int port = -1;                    // in, out: which input or output of the region
  int op = -1;                      // conv, depthwise
  std::vector<PlaneTap> taps;       // conv, depthwise
  int planes = 1;                   // conv, depthwise: sampled planes of each channel of x; sample: of y
  int stride_h = 1, stride_w = 1;   // sample: plane k of y is x[r * stride_h + origin[k].first][q * stride_w + origin[k].second];
                                    // depthwise: taps count pixels of x, of which x and y share the resolution only with stride 1
  std::vector<std::pair<int, int>> origin;
  float low = 0, high = 0;
  bool strided() const { return stride_h > 1 || stride_w > 1; }
  bool pointwise() const;           // reads of a pixel's tile nothing but that tile
};

struct PlanePlan {
  std::vector<PlaneValue> values;   // the region's, then those between sampling and convolution
  std::vector<PlaneStep> steps;
  std::vector<PlaneResolution> resolutions;
  std::vector<std::vector<int32_t>> pixels;   // tables: for each pixel of a plane its place in the image, -1 in gaps
};

// `ops` use value numbers 0 .. values - 1, each made before it is read. `width`: pixels in a vector.
bool plan_region(const std::vector<RegionOp>& ops, int values, const std::vector<int>& inputs, const std::vector<int>& outputs,
                 const std::vector<Shape>& shapes, int width, PlanePlan* plan, std::string* message);

}  // namespace paring
