#include "cost.h"
#include "plane_region.h"

#include <algorithm>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu.h"

namespace paring {
namespace {

// Large memory begins at a huge page: 256 planes lie in as many small pages, more than the nearest table of pages holds.
Planes allocate(size_t floats) {
  constexpr size_t huge = size_t(2) << 20;
  size_t bytes = floats * sizeof(float), page = bytes >= huge / 2 ? huge : 64;
  bytes = (bytes + page - 1) / page * page;
  Planes m(static_cast<float*>(std::aligned_alloc(page, bytes)));
  if (!m) return m;
#if defined(MADV_HUGEPAGE)
  if (page == huge) madvise(m.get(), bytes, MADV_HUGEPAGE);
#endif
  std::memset(m.get(), 0, bytes);
  return m;
}

}  // namespace

// A tile is what the kernels hold in registers at a time; for several threads there are as many for each.
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
    if (threads_ > 1) {
      // A thread may join late: eight tiles for each leave little to wait for, as long as they are not too narrow to compute.
      int narrow = r.vectors / ((m + 1) / 2), even = std::min(std::max(r.tiles, 8 * threads_), narrow) / threads_ * threads_;
      r.tiles = std::max(r.tiles, even);
    }
    r.tile_vectors = (r.vectors + r.tiles - 1) / r.tiles;
  }
}

// Whether taps are copied side by side first: each copy must serve some outputs.
bool PlaneRegion::copies(const PlaneStep& s, const SparseWeights& w) {
  return w.rows == 1 && !s.pointwise() && w.blocks() > 12 * int64_t(w.inputs) * w.taps;
}

// How many parts the input channels are read in, so that the tile's pixels of one part stay in the nearest cache.
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
      const size_t copy_stride = copy ? size_t(vectors) * size_t(kernels_->width) : 0;
      fits = bind_weights(w, s.taps, s.planes, r.pitch, stride, passes(s, w.rows, copy), panels, copy_stride, &bound_[i]);
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

// Groups steps that run tile by tile, so that what passes between them stays in a near cache; where there are fewer tiles
// than threads, a step is a stage of its own, split into panels.
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
  lone_ = alone() < worth_threads;
  out->clear();
  for (int o : outputs) out->push_back({images_, value(o).h, value(o).w, value(o).c});
  return true;
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
}  // namespace paring
