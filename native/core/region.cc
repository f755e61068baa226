#include "region.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cost.h"
#include "cpu.h"
#include "planes.h"
#include "pool.h"
#include "region_cost.h"
#include "region_plan.h"
#include "region_weights.h"

namespace paring {

const PlaneKernels& plane_kernels() {
  switch (isa_in_force()) {
#ifdef PARING_HAVE_avx512vnni
    case Isa::avx512vnni: return planes_avx512vnni;
#endif
#ifdef PARING_HAVE_avx512
    case Isa::avx512: return planes_avx512;
#endif
#ifdef PARING_HAVE_avx2vnni
    case Isa::avx2vnni: return planes_avx2vnni;
#endif
#ifdef PARING_HAVE_avx2
    case Isa::avx2: return planes_avx2;
#endif
    default: return planes_portable;
  }
}

namespace {

// Large memory begins at a huge page: 256 planes lie in as many small pages, more than the nearest table of pages holds.
struct Free { void operator()(void* p) const { std::free(p); } };
using Memory = std::unique_ptr<float, Free>;
Memory allocate(size_t floats) {
  constexpr size_t huge = size_t(2) << 20;
  size_t bytes = floats * sizeof(float), page = bytes >= huge / 2 ? huge : 64;
  bytes = (bytes + page - 1) / page * page;
  Memory m(static_cast<float*>(std::aligned_alloc(page, bytes)));
  if (!m) return m;
#if defined(MADV_HUGEPAGE)
  if (page == huge) madvise(m.get(), bytes, MADV_HUGEPAGE);
#endif
  std::memset(m.get(), 0, bytes);
  return m;
}

// Where a value lies: in a buffer that all see, or, where its whole life passes inside one tile, in the task's own memory.
struct Place {
  bool own = false;
  int buffer = -1;
  size_t at = 0;            // own: floats
  int made = -1, last = -1; // stages
};
struct Buffer { std::tuple<int, int, int, size_t, size_t> key; size_t floats; int busy_until; size_t at; };

// Steps that run one behind the other on a tile before the next tile; or one step, split into panels of channels.
struct Stage { std::vector<int> steps; int resolution = 0, tiles = 1, panels = 1; size_t own = 0, bytes = 0; };

struct Depthwise { std::vector<float> weights, bias; };   // [channels][taps]

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
  PlanePlan plan_;
  std::vector<BoundWeights> bound_;         // by step
  std::vector<std::vector<int32_t>> offsets_;   // depthwise, by step
  std::vector<std::vector<std::vector<PlaneRow>>> rows_;   // sample and strided depthwise, by step, tile and plane
  std::vector<std::vector<float>> masks_;   // by table
  std::vector<Stage> stages_;
  std::vector<Place> places_;               // by value
  std::vector<Buffer> buffers_;
  Memory memory_;
  size_t own_at_ = 0, own_floats_ = 0, copy_floats_ = 0;   // of a task: its values behind its copies
};

void PlaneRegion::cut_tiles() {
  std::vector<int> most(plan_.resolutions.size(), 0);
  for (const PlaneStep& s : plan_.steps) {
    if (s.kind != PlaneStep::conv) continue;
    int& m = most[size_t(resolution_of(s))];
    m = std::max(m, sparse.at(s.op).rows == 4 ? kernels_->block_vectors : kernels_->line_vectors);
  }
  for (size_t i = 0; i < most.size(); i++) {
    PlaneResolution& r = plan_.resolutions[i];
    int m = most[i] ? most[i] : 8;
    r.tiles = (r.vectors + m - 1) / m;
    if (threads_ > 1 && r.tiles % threads_ && r.tiles < 8 * threads_) {
      int even = (r.tiles + threads_ - 1) / threads_ * threads_;
      if (r.vectors / even >= (m + 1) / 2) r.tiles = even;
    }
    r.tile_vectors = (r.vectors + r.tiles - 1) / r.tiles;
  }
}

// How many parts the input channels are read in, so that the tile's pixels of one part stay in the nearest cache.
bool PlaneRegion::copies(const PlaneStep& s, const SparseWeights& w) {
  return w.rows == 1 && !s.pointwise() && w.blocks() > 12 * int64_t(w.inputs) * w.taps;
}
int PlaneRegion::passes(const PlaneStep& s, int rows, bool copy) {
  const PlaneValue& x = value(s.x);
  const PlaneResolution& r = resolution(x.resolution);
  int most = rows == 4 ? kernels_->block_vectors : kernels_->line_vectors;
  most = std::min(most, r.tile_vectors);
  int y0 = 0, y1 = 0, x0 = 0, x1 = 0;
  for (const PlaneTap& t : s.taps) { y0 = std::min(y0, t.dy); y1 = std::max(y1, t.dy); x0 = std::min(x0, t.dx); x1 = std::max(x1, t.dx); }
  int64_t pixels = int64_t(most) * kernels_->width, row = pixels + (x1 - x0) + (x1 > x0 ? 8 : 0);
  int64_t floats = std::min(row * (y1 - y0 + 1), row + int64_t(y1 - y0) * r.pitch) * s.planes;
  if (copy) floats = pixels * int64_t(s.taps.size());
  // Blocks of four use what they load four times, so the second cache is near enough; a pass more costs all sums' way.
  int64_t budget = int64_t(caches().l1) / 4 * (rows == 4 ? 6 : copy || kernels_->width < 16 ? 2 : 3) / 2;
  int64_t fit = std::max<int64_t>(budget / floats, 1), inputs = sparse.at(s.op).inputs;
  return int((inputs + fit - 1) / fit);
}

bool PlaneRegion::bind(std::string* message) {
  bound_.assign(plan_.steps.size(), BoundWeights());
  offsets_.assign(plan_.steps.size(), {});
  copy_floats_ = 0;
  rows_.assign(plan_.steps.size(), {});
  for (size_t i = 0; i < plan_.steps.size(); i++) {
    const PlaneStep& s = plan_.steps[i];
    if (s.kind == PlaneStep::sample || s.strided())
      for (int tile = 0; tile < resolution(resolution_of(s)).tiles; tile++)
        for (int k = 0; k < s.planes; k++) rows_[i].push_back(cut_rows(s, tile, k));
    if (s.kind != PlaneStep::conv && s.kind != PlaneStep::depthwise) continue;
    const PlaneValue& x = value(s.x);
    const PlaneResolution& r = resolution(x.resolution);
    size_t stride = x.planes ? x.stride : size_t(r.tile_vectors) * size_t(kernels_->width);
    bool fits = true;
    if (s.kind == PlaneStep::conv) {
      const SparseWeights& w = sparse.at(s.op);
      int panels = r.tiles >= threads_ ? 1 : std::min(int(w.ends.size()), (2 * threads_ + r.tiles - 1) / r.tiles);
      const bool copy = copies(s, w);
      const int vectors = std::min(r.tile_vectors, kernels_->line_vectors);
      fits = bind_weights(w, s.taps, s.planes, r.pitch, stride, passes(s, w.rows, copy), panels, copy ? size_t(vectors) * size_t(kernels_->width) : 0, &bound_[i]);
      const BoundWeights& b = bound_[i];
      for (size_t k = 0; k < b.source_ends.size(); k++)
        copy_floats_ = std::max(copy_floats_, size_t(b.source_ends[k] - (k ? b.source_ends[k - 1] : 0)) * b.copy_stride);
    } else {
      for (const PlaneTap& t : s.taps) {
        int64_t offset = (t.plane * int64_t(stride) + int64_t(t.dy) * r.pitch + t.dx) * 4;
        fits = fits && offset == int32_t(offset);
        offsets_[i].push_back(int32_t(offset));
      }
    }
    if (!fits) { *message = "operator " + std::to_string(s.op) + " of the region: expected planes within 2 GB, got more"; return false; }
  }
  return true;
}

void PlaneRegion::make_stages() {
  stages_.clear();
  for (size_t i = 0; i < plan_.steps.size(); i++) {
    const PlaneStep& s = plan_.steps[i];
    const PlaneResolution& r = resolution(resolution_of(s));
    const bool tiled = r.tiles >= threads_;
    Stage* last = stages_.empty() ? nullptr : &stages_.back();
    bool joins = last && tiled && last->panels == 1 && last->resolution == resolution_of(s);
    // What a stage has made is there for its own tile only; its weights must stay in the cache from tile to tile.
    if (joins)
      for (int k : last->steps) {
        int made = plan_.steps[size_t(k)].y;
        if (made >= 0 && made == s.x && !s.pointwise()) joins = false;
      }
    if (joins && last->bytes + bound_[i].bytes() > caches().l2 / 4 * 3 && bound_[i].bytes()) joins = false;
    if (!joins) {
      stages_.emplace_back();
      last = &stages_.back();
      last->resolution = resolution_of(s);
      last->tiles = r.tiles;
      if (!tiled) last->panels = s.kind == PlaneStep::conv ? int(bound_[i].panels.size()) : (2 * threads_ + r.tiles - 1) / r.tiles;
    }
    last->steps.push_back(int(i));
    last->bytes += bound_[i].bytes();
  }
}

bool PlaneRegion::place(std::string* message) {
  places_.assign(plan_.values.size(), Place());
  buffers_.clear();
  for (size_t k = 0; k < stages_.size(); k++)
    for (int i : stages_[k].steps) {
      const PlaneStep& s = plan_.steps[size_t(i)];
      if (s.y >= 0) places_[size_t(s.y)].made = int(k);
      for (int v : {s.x, s.x2, s.y}) if (v >= 0) places_[size_t(v)].last = int(k);
    }
  own_floats_ = 0;
  for (size_t k = 0; k < stages_.size(); k++) {
    Stage& stage = stages_[k];
    const size_t pixels = size_t(resolution(stage.resolution).tile_vectors) * size_t(kernels_->width);
    struct Own { size_t at, end; size_t until; };
    std::vector<Own> own;
    for (size_t i = 0; i < stage.steps.size(); i++) {
      const int y = plan_.steps[size_t(stage.steps[i])].y;
      if (y < 0) continue;
      PlaneValue& v = value(y);
      Place& p = places_[size_t(y)];
      if (stage.panels == 1 && p.last == int(k) && !v.planes) {
        size_t until = i, at = 0, floats = pixels * channels(v);
        for (size_t j = i; j < stage.steps.size(); j++) {
          const PlaneStep& r = plan_.steps[size_t(stage.steps[j])];
          if (r.x == y || r.x2 == y) until = j;
        }
        for (bool moved = true; moved;) {   // the lowest gap among those alive
          moved = false;
          for (const Own& o : own) if (o.until >= i && at < o.end && o.at < at + floats) { at = o.end; moved = true; }
        }
        own.push_back({at, at + floats, until});
        p.own = true; p.at = at;
        own_floats_ = std::max(own_floats_, at + floats);
        continue;
      }
      // Where surroundings are zeros, only a value of the very same geometry may follow in the buffer.
      auto key = v.halo ? std::make_tuple(v.resolution, v.h, v.w, v.stride, v.lead) : std::make_tuple(-1, 0, 0, size_t(0), size_t(0));
      size_t floats = v.planes ? v.lead + channels(v) * v.stride + v.behind : pixels * channels(v) * size_t(stage.tiles);
      Buffer* best = nullptr;
      auto worse = [&](const Buffer& a, const Buffer& b) {   // the least growth, then the least waste
        size_t ga = a.floats < floats ? floats - a.floats : 0, gb = b.floats < floats ? floats - b.floats : 0;
        return ga != gb ? ga > gb : a.floats > b.floats;
      };
      for (Buffer& b : buffers_)
        if (b.key == key && b.busy_until < int(k) && (!best || worse(*best, b))) best = &b;
      if (!best) { buffers_.push_back({key, 0, -1, 0}); best = &buffers_.back(); }
      best->floats = std::max(best->floats, floats);
      best->busy_until = p.last;
      p.buffer = int(best - buffers_.data());
    }
  }
  size_t total = 0;
  for (Buffer& b : buffers_) { b.at = total; total += (b.floats + 63) / 64 * 64 + 64; }   // an over-read of the last vector
  own_at_ = total;
  copy_floats_ = (copy_floats_ + 15) / 16 * 16;
  own_floats_ = (copy_floats_ + own_floats_ + 63) / 64 * 64 + 64;
  memory_ = allocate(total + own_floats_ * size_t(threads_));
  if (!memory_) *message = "planes of the region: expected " + std::to_string(total * 4) + " bytes of memory, got none";
  return bool(memory_);
}

bool PlaneRegion::prepare(const std::vector<Shape>& shapes, int threads, std::vector<Shape>* out, std::string* message) {
  images_ = 0;
  memory_.reset();
  if (shapes.size() != inputs.size() || shapes.empty()) { *message = "expected " + std::to_string(inputs.size()) + " input shapes"; return false; }
  for (const Shape& s : shapes)
    if (s.n != shapes[0].n || s.n < 1 || s.h < 1 || s.w < 1 || s.c < 1) { *message = "expected inputs with elements and one batch size"; return false; }
  kernels_ = &plane_kernels();
  threads_ = std::max(threads, 1);
  if (!plan_region(ops, values, inputs, outputs, shapes, kernels_->width, &plan_, message)) return false;
  cut_tiles();
  if (!bind(message)) return false;
  make_stages();
  if (!place(message)) return false;
  masks_.clear();
  for (const auto& table : plan_.pixels) {
    std::vector<float> mask;
    for (int32_t p : table) { uint32_t bits = p < 0 ? 0 : ~0u; float f; std::memcpy(&f, &bits, 4); mask.push_back(f); }
    masks_.push_back(std::move(mask));
  }
  images_ = shapes[0].n;
  out->clear();
  for (int o : outputs) out->push_back({images_, value(o).h, value(o).w, value(o).c});
  return true;
}

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

// The rows of a tile of y, for plane k of what is sampled.
std::vector<PlaneRow> PlaneRegion::cut_rows(const PlaneStep& s, int tile, int k) {
  const PlaneValue &x = value(s.x), &y = value(s.y);
  const PlaneResolution &rx = resolution(x.resolution), &ry = resolution(y.resolution);
  const bool sampled = s.kind == PlaneStep::sample;   // else zeros lie around x, where taps find them
  const int oy = sampled ? s.origin[size_t(k)].first : 0, ox = sampled ? s.origin[size_t(k)].second : 0;
  const int low = ox >= 0 ? 0 : (-ox + s.stride_w - 1) / s.stride_w;   // columns of y that lie inside x
  const int high = !sampled ? y.w : x.w - ox <= 0 ? 0 : std::min((x.w - ox + s.stride_w - 1) / s.stride_w, y.w);
  const int begin = first(y.resolution, tile) * kernels_->width, end = std::min(first(y.resolution, tile + 1), y.vectors) * kernels_->width;
  std::vector<PlaneRow> rows;
  for (int p = begin; p < end;) {
    const int row = p / ry.pitch, column = p % ry.pitch, next = std::min(end, (row + 1) * ry.pitch), source = row * s.stride_h + oy;
    int a = std::min(std::max(low - column, 0), next - p), b = std::min(high - column, next - p);
    if (row >= y.h || (sampled && (source < 0 || source >= x.h)) || a >= b) b = a;
    rows.push_back({source * rx.pitch + (column + a) * s.stride_w + ox, p - begin, a, b - a, next - p - b});
    p = next;
  }
  return rows;
}

void PlaneRegion::run_step(const PlaneStep& s, const Stage& stage, int index, int tile, int panel, int slot, const void* const* in, void* const* out) {
  const PlaneValue& v = value(s.y >= 0 ? s.y : s.x);
  const int start = first(v.resolution, tile), vectors = std::min(first(v.resolution, tile + 1), v.vectors) - start;
  if (vectors <= 0) return;
  const size_t begin = size_t(start) * size_t(kernels_->width);
  const float* mask = v.halo ? masks_[v.table].data() + begin : nullptr;
  const int unit = s.kind == PlaneStep::in || s.kind == PlaneStep::out ? 16 : 1, channels = s.kind == PlaneStep::sample ? v.c / s.planes : v.c, units = (channels + unit - 1) / unit;
  const int c0 = int(int64_t(units) * panel / stage.panels) * unit, c1 = std::min(channels, int(int64_t(units) * (panel + 1) / stage.panels) * unit);
  size_t x_stride = 0, x2_stride = 0, y_stride = 0;
  // With a stride the rows say where in x they begin.
  float *x = s.x >= 0 ? at(s.x, s.kind == PlaneStep::sample || s.strided() ? 0 : tile, slot, &x_stride) : nullptr, *x2 = s.x2 >= 0 ? at(s.x2, tile, slot, &x2_stride) : nullptr;
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
  const int tasks = stage.tiles * stage.panels, workers = std::min(threads_, tasks);
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
  auto far = [&](int i) { return i >= 0 && !places_[size_t(i)].own ? double(plan_.values[size_t(i)].c) * plan_.values[size_t(i)].h * plan_.values[size_t(i)].w * 4 / way : 0; };
  switch (s.kind) {
    case PlaneStep::in:
    case PlaneStep::out: return all * rate.convert + double(v.h) * v.w * v.c * 4 / way + (s.kind == PlaneStep::in ? far(s.y) : far(s.x));
    case PlaneStep::add: return all * rate.add + far(s.x) + far(s.x2) + far(s.y);
    case PlaneStep::depthwise: return all * double(s.taps.size()) * rate.tap * (s.strided() ? 2.5 : 1.5) + far(s.x) + far(s.y);
    case PlaneStep::sample: return all * rate.add * 2 + far(s.x) + far(s.y);
    case PlaneStep::conv: {
      const SparseWeights& w = sparse.at(s.op);
      const BoundWeights& b = bound_[index];
      // What the nearest cache does not hold is waited for in part, lines that straddle two take longer: seen with chains.
      const double straddling = s.pointwise() || b.copy_stride ? 1 : kernels_->width < 16 ? 1.2 : 1.02;
      double compute = double(w.blocks()) * vectors * (w.rows == 4 ? rate.block * 1.04 * straddling : rate.lone * 1.12) + all * rate.end * (1 + 0.6 * (b.passes - 1));
      compute += double(b.sources.size()) * vectors * rate.add;
      const double stream = b.bytes() > caches().l2 / 2 ? double(b.bytes()) * r.tiles / way : 0;
      return std::max(compute, stream) + (far(s.y) + far(s.x2)) * 0.5;
    }
  }
  return 0;
}

double PlaneRegion::estimate() const {
  double sum = 0;
  for (const Stage& stage : stages_) {
    double seconds = 0;
    for (int k : stage.steps) seconds += step_seconds(size_t(k));
    const int tasks = stage.tiles * stage.panels, workers = std::min(threads_, tasks);
    const int turns = (tasks + workers - 1) / workers;   // the last turn may leave some without work
    sum += workers > 1 ? seconds * turns / tasks / 0.95 + 3e-6 : seconds;
  }
  return sum * images_;
}

}  // namespace

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
