// A region at work: what region.cc runs and region_prepare.cc lays out.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "planes.h"
#include "region.h"
#include "region_plan.h"
#include "region_weights.h"

namespace paring {

struct Free { void operator()(void* p) const { std::free(p); } };
using Planes = std::unique_ptr<float, Free>;

// Where a value of the region lies: in a buffer that all see, or, where its whole life passes inside one tile, in the task's own memory.
struct Place {
  bool own = false;
  int buffer = -1;
  size_t at = 0;            // own: floats
  int made = -1, last = -1; // stages
};
// `key`: the geometry whose surroundings are zeros in it, if any.
struct Buffer { std::tuple<int, int, int, size_t, size_t> key; size_t floats; int busy_until; size_t at; };

// Steps that run one behind the other on a tile before the next tile; or one step, split into panels of channels.
struct Stage { std::vector<int> steps; int resolution = 0, tiles = 1, panels = 1; size_t bytes = 0; };   // bytes of weights

struct Depthwise { std::vector<float> weights, bias; };   // [channels][taps]

class PlaneRegion final : public Region {
 public:
  std::vector<RegionOp> ops;
  std::vector<int> inputs, outputs;
  int values = 0;
  std::map<int, SparseWeights> sparse;      // by operator
  std::map<int, Depthwise> depthwise;

  bool prepare(const std::vector<Shape>& shapes, int threads, std::vector<Shape>* out, std::string* message) override;
  void run(const void* const* in, void* const* out) override;
  double estimate() const override;
  double alone() const;                 // seconds of one run in one thread

 private:
  PlaneValue& value(int i) { return plan_.values[size_t(i)]; }
  PlaneResolution& resolution(int i) { return plan_.resolutions[size_t(i)]; }
  int resolution_of(const PlaneStep& s) { return value(s.y >= 0 ? s.y : s.x).resolution; }
  int first(int resolution, int tile) const {
    const PlaneResolution& r = plan_.resolutions[size_t(resolution)];
    return tile * (r.vectors / r.tiles) + std::min(tile, r.vectors % r.tiles);
  }
  size_t channels(const PlaneValue& v) const { return (size_t(v.c) + 3) / 4 * 4; }   // blocks of four write whole
  void cut_tiles();
  bool bind(std::string* message);
  void make_stages();
  bool place(std::string* message);
  bool copies(const PlaneStep& s, const SparseWeights& w);
  double step_seconds(size_t index) const;
  int passes(const PlaneStep& s, int rows, bool copy);
  float* at(int v, int tile, int slot, size_t* stride);
  void run_stage(const Stage& stage, const void* const* in, void* const* out);
  void run_step(const PlaneStep& s, const Stage& stage, int index, int tile, int panel, int slot, const void* const* in, void* const* out);
  std::vector<PlaneRow> cut_rows(const PlaneStep& s, int tile, int k);

  const PlaneKernels* kernels_ = nullptr;
  int threads_ = 1, images_ = 0;
  bool lone_ = false;                    // too little work to wake other threads for
  PlanePlan plan_;
  std::vector<BoundWeights> bound_;         // by step
  std::vector<std::vector<int32_t>> offsets_;   // depthwise, by step
  std::vector<std::vector<std::vector<PlaneRow>>> rows_;   // sample and strided depthwise, by step, tile and plane
  std::vector<std::vector<float>> masks_;   // by table
  std::vector<Stage> stages_;
  std::vector<Place> places_;               // by value
  std::vector<Buffer> buffers_;
  Planes memory_;
  size_t own_at_ = 0, own_floats_ = 0, copy_floats_ = 0;   // of a task: its values behind its copies
};

}  // namespace paring
