#include "region.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>

#include "cost.h"
#include "cpu.h"
#include "plane_region.h"
#include "pool.h"
#include "region_cost.h"

namespace paring {

const PlaneKernels& plane_kernels() {
  switch (isa_in_force()) {   // float32 gains nothing from VNNI
#ifdef PARING_HAVE_avx512
    case Isa::avx512vnni:
    case Isa::avx512: return planes_avx512;
#endif
#ifdef PARING_HAVE_avx2
    case Isa::avx2vnni:
    case Isa::avx2: return planes_avx2;
#endif
    default: return planes_portable;
  }
}

namespace {

Depthwise pack_depthwise(const paring_conv& c) {
  Depthwise d;
  const int taps = c.kernel_h * c.kernel_w;
  const float* w = static_cast<const float*>(c.weights);
  for (int i = 0; i < c.outputs; i++)
    for (int t = 0; t < taps; t++) d.weights.push_back(w[size_t(t) * c.outputs + i]);
  d.bias.assign(size_t(c.outputs), 0.0f);
  if (c.bias) std::copy_n(static_cast<const float*>(c.bias), c.outputs, d.bias.begin());
  return d;
}

}  // namespace

float* PlaneRegion::at(int v, int tile, int slot, size_t* stride) {
  const PlaneValue& a = value(v);
  const Place& p = places_[size_t(v)];
  const PlaneResolution& r = resolution(a.resolution);
  const size_t width = size_t(kernels_->width);
  if (a.planes) {
    *stride = a.stride;
    return memory_.get() + buffers_[size_t(p.buffer)].at + a.lead + size_t(first(a.resolution, tile)) * width;
  }
  *stride = size_t(r.tile_vectors) * width;
  if (p.own) return memory_.get() + own_at_ + own_floats_ * size_t(slot) + copy_floats_ + p.at;
  return memory_.get() + buffers_[size_t(p.buffer)].at + size_t(tile) * *stride * channels(a);
}

void PlaneRegion::run_step(const PlaneStep& s, const Stage& stage, int index, int tile, int panel, int slot, const void* const* in, void* const* out) {
  const PlaneValue& v = value(s.y >= 0 ? s.y : s.x);
  const int start = first(v.resolution, tile), vectors = std::min(first(v.resolution, tile + 1), v.vectors) - start;
  if (vectors <= 0) return;
  const size_t begin = size_t(start) * size_t(kernels_->width);
  const float* mask = v.halo ? masks_[v.table].data() + begin : nullptr;
  const bool converts = s.kind == PlaneStep::in || s.kind == PlaneStep::out, samples = s.kind == PlaneStep::sample;
  const int unit = converts ? 16 : 1, channels = samples ? v.c / s.planes : v.c, units = (channels + unit - 1) / unit;
  const int c0 = int(int64_t(units) * panel / stage.panels) * unit, c1 = std::min(channels, int(int64_t(units) * (panel + 1) / stage.panels) * unit);
  size_t x_stride = 0, x2_stride = 0, y_stride = 0;
  // With a stride the rows say where in x they begin.
  float* x = s.x >= 0 ? at(s.x, samples || s.strided() ? 0 : tile, slot, &x_stride) : nullptr;
  float* x2 = s.x2 >= 0 ? at(s.x2, tile, slot, &x2_stride) : nullptr;
  float* y = s.y >= 0 ? at(s.y, tile, slot, &y_stride) : nullptr;
  switch (s.kind) {
    case PlaneStep::in:
      kernels_->to_planes(static_cast<const float*>(in[s.port]), plan_.pixels[v.table].data() + begin, v.c, c0, c1, y, y_stride, vectors);
      break;
    case PlaneStep::out:
      kernels_->from_planes(x, x_stride, plan_.pixels[v.table].data() + begin, v.c, c0, c1, static_cast<float*>(out[s.port]), vectors);
      break;
    case PlaneStep::add:
      kernels_->add({x, x2, x_stride, x2_stride, y, y_stride, mask, c0, c1, s.low, s.high}, vectors);
      break;
    case PlaneStep::depthwise: {
      const Depthwise& d = depthwise.at(s.op);
      const std::vector<PlaneRow>* rows = s.strided() ? &rows_[size_t(index)][size_t(tile)] : nullptr;
      kernels_->depthwise({x, x_stride * size_t(s.planes), y, y_stride, offsets_[size_t(index)].data(), d.weights.data(), d.bias.data(), mask,
                           int(s.taps.size()), c0, c1, s.low, s.high, rows ? rows->data() : nullptr, rows ? int(rows->size()) : 0, s.stride_w}, vectors);
      break;
    }
    case PlaneStep::conv: {
      const SparseWeights& w = sparse.at(s.op);
      const BoundWeights& b = bound_[size_t(index)];
      const PlanePanel& p = b.panels[size_t(panel)];
      PlaneConv c = {b.offsets.data() + p.block, b.values.data() + p.block * size_t(w.rows), b.groups.data() + p.group, b.passes, p.group_count,
                     w.bias.data(), s.low, s.high, x, y, y_stride, mask, b.copy_stride ? b.sources.data() : nullptr, b.source_ends.data(),
                     memory_.get() + own_at_ + own_floats_ * size_t(slot), b.copy_stride, x2, x2_stride, !places_[size_t(s.y)].own};
      (w.rows == 4 ? kernels_->conv4 : kernels_->conv1)(c, vectors);
      break;
    }
    case PlaneStep::sample:
      for (int k = 0; k < s.planes; k++) {
        const auto& rows = rows_[size_t(index)][size_t(tile * s.planes + k)];
        kernels_->sample(x, x_stride, y + size_t(k) * y_stride, y_stride * size_t(s.planes), rows.data(), int(rows.size()), c0, c1, s.stride_w, vectors);
      }
      break;
  }
}

void PlaneRegion::run_stage(const Stage& stage, const void* const* in, void* const* out) {
  const int tasks = stage.tiles * stage.panels, workers = lone_ ? 1 : std::min(threads_, tasks);
  std::atomic<int> next(0);
  parallel_for(workers, workers, [&](int slot) {
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      for (int k : stage.steps)
        run_step(plan_.steps[size_t(k)], stage, k, i / stage.panels, i % stage.panels, slot, in, out);
  });
}

void PlaneRegion::run(const void* const* in, void* const* out) {
  std::vector<const void*> x(inputs.size());
  std::vector<void*> y(outputs.size());
  for (int n = 0; n < images_; n++) {
    for (size_t i = 0; i < x.size(); i++) {
      const PlaneValue& v = value(inputs[i]);
      x[i] = static_cast<const float*>(in[i]) + size_t(n) * size_t(v.h) * size_t(v.w) * size_t(v.c);
    }
    for (size_t i = 0; i < y.size(); i++) {
      const PlaneValue& v = value(outputs[i]);
      y[i] = static_cast<float*>(out[i]) + size_t(n) * size_t(v.h) * size_t(v.w) * size_t(v.c);
    }
    for (const Stage& s : stages_) run_stage(s, x.data(), y.data());
  }
}

// One step over one image, by one thread.
double PlaneRegion::step_seconds(size_t index) const {
  const PlaneStep& s = plan_.steps[index];
  const PlaneValue& v = plan_.values[size_t(s.y >= 0 ? s.y : s.x)];
  const PlaneResolution& r = plan_.resolutions[size_t(v.resolution)];
  const PlaneRates& rate = plane_rates(*kernels_);
  const double vectors = v.vectors, all = vectors * v.c, way = bandwidth().cache;
  auto bytes = [&](int i) { const PlaneValue& a = plan_.values[size_t(i)]; return double(a.h) * a.w * a.c * 4; };
  auto far = [&](int i) { return i >= 0 && !places_[size_t(i)].own ? bytes(i) / way : 0; };
  switch (s.kind) {
    case PlaneStep::in:
    case PlaneStep::out: return all * rate.convert + bytes(s.y >= 0 ? s.y : s.x) / way + far(s.x) + far(s.y);
    case PlaneStep::add: return all * rate.add + far(s.x) + far(s.x2) + far(s.y);
    case PlaneStep::depthwise: return all * double(s.taps.size()) * rate.tap * (s.strided() ? 2.5 : 1.5) + far(s.x) + far(s.y);
    case PlaneStep::sample: return all * rate.add * 2 + far(s.x) + far(s.y);
    case PlaneStep::conv: {
      const SparseWeights& w = sparse.at(s.op);
      const BoundWeights& b = bound_[index];
      // What the nearest cache does not hold is waited for in part, lines that straddle two take longer: seen with chains.
      const double straddling = s.pointwise() || b.copy_stride ? 1 : kernels_->width < 16 ? 1.2 : 1.02;
      const double sums = double(w.blocks()) * vectors * (w.rows == 4 ? rate.block * 1.04 * straddling : rate.lone * 1.12);
      const double ends = all * rate.end * (1 + 0.6 * (b.passes - 1)), copying = double(b.sources.size()) * vectors * rate.add;
      const double stream = b.bytes() > caches().l2 / 2 ? double(b.bytes()) * r.tiles / way : 0;
      return std::max(sums + ends + copying, stream) + double(b.bytes()) / way + far(s.y) + far(s.x2);   // weights come from afar once
    }
  }
  return 0;
}

double PlaneRegion::alone() const {
  double sum = 0;
  for (const Stage& stage : stages_) for (int k : stage.steps) sum += step_seconds(size_t(k));
  return sum * images_;
}

double PlaneRegion::estimate() const {
  const double one = alone();
  if (threads_ == 1 || lone_) return one;
  double sum = 0;
  for (const Stage& stage : stages_) {
    double seconds = 0;
    for (int k : stage.steps) seconds += step_seconds(size_t(k));
    const int tasks = stage.tiles * stage.panels, workers = std::min(threads_, tasks);
    const int turns = (tasks + workers - 1) / workers;   // the last turn may leave some without work
    sum += workers > 1 ? seconds * turns / tasks / 0.95 + 3e-6 : seconds;
  }
  return sum * images_ + wake_seconds;
}

Region* Region::create(const std::vector<RegionOp>& ops, const std::vector<int>& inputs, const std::vector<int>& outputs, std::string* message) {
  auto region = std::make_unique<PlaneRegion>();
  std::map<int, int> number;                // what was made so far
  auto fail = [&](size_t op, const std::string& why) { *message = "operator " + std::to_string(op) + " of the region: " + why; return nullptr; };
  for (int v : inputs) region->inputs.push_back(number.emplace(v, int(number.size())).first->second);
  for (size_t i = 0; i < ops.size(); i++) {
    RegionOp op = ops[i];
    auto x = number.find(op.x), x2 = number.find(op.x2);
    if (x == number.end() || (op.kind == RegionOp::Kind::add && x2 == number.end())) return fail(i, "expected values that were made before");
    op.x = x->second;
    op.x2 = op.kind == RegionOp::Kind::add ? x2->second : -1;
    auto y = number.emplace(op.y, int(number.size()));
    if (!y.second) return fail(i, "expected a value of its own to make");
    op.y = y.first->second;
    const paring_conv& c = op.conv;
    if (op.kind == RegionOp::Kind::conv || op.kind == RegionOp::Kind::depthwise) {
      if (c.type != PARING_F32) return fail(i, "expected float32");
      if (c.outputs < 1 || c.inputs < 1 || c.kernel_h < 1 || c.kernel_w < 1 || c.stride_h < 1 || c.stride_w < 1 || c.dilation_h < 1 || c.dilation_w < 1)
        return fail(i, "expected sizes from 1");
      if (op.kind == RegionOp::Kind::conv) region->sparse[int(i)] = pack_sparse(c);
      else if (c.inputs != c.outputs) return fail(i, "expected as many outputs as inputs");
      else region->depthwise[int(i)] = pack_depthwise(c);
      op.conv.weights = op.conv.bias = nullptr;
    }
    if (op.kind == RegionOp::Kind::pad && (op.before_h < 0 || op.after_h < 0 || op.before_w < 0 || op.after_w < 0)) return fail(i, "expected paddings from 0");
    region->ops.push_back(op);
  }
  for (int v : outputs) {
    auto at = number.find(v);
    if (at == number.end()) { *message = "output " + std::to_string(v) + " of the region: expected a value that is made"; return nullptr; }
    region->outputs.push_back(at->second);
  }
  region->values = int(number.size());
  return region.release();
}

}  // namespace paring
