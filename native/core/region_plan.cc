#include "region_plan.h"

#include <algorithm>
#include <limits>
#include <map>
#include <tuple>

namespace paring {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
int floor_div(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

struct Axis { int out, before; };   // extent of the output; zeros before the image
Axis axis(int in, int kernel, int stride, int dilation, bool same, int before, int after) {
  int reach = (kernel - 1) * dilation + 1;
  if (!same) return {in + before + after < reach ? 0 : (in + before + after - reach) / stride + 1, before};
  int out = (in + stride - 1) / stride, zeros = std::max((out - 1) * stride + reach - in, 0);
  return {out, zeros / 2};
}

class Planner {
 public:
  Planner(const std::vector<RegionOp>& ops, int values, int width, PlanePlan* plan, std::string* message)
      : ops_(ops), width_(width), plan_(*plan), message_(*message) {
    plan_ = PlanePlan();
    plan_.values.resize(size_t(values));
  }

  bool run(const std::vector<int>& inputs, const std::vector<int>& outputs, const std::vector<Shape>& shapes) {
    for (size_t i = 0; i < inputs.size(); i++) {
      PlaneStep s; s.kind = PlaneStep::in; s.y = inputs[i]; s.port = int(i);
      value(s.y) = shaped(shapes[i].h, shapes[i].w, shapes[i].c);
      plan_.steps.push_back(s);
    }
    find_folded(outputs);
    for (size_t i = 0; i < ops_.size(); i++)
      if (!lower(int(i))) return false;
    for (size_t i = 0; i < outputs.size(); i++) {
      PlaneStep s; s.kind = PlaneStep::out; s.x = outputs[i]; s.port = int(i);
      // Right behind who makes it, while it is in the cache.
      size_t at = 0;
      for (size_t k = 0; k < plan_.steps.size(); k++) if (plan_.steps[k].y == s.x) at = k + 1;
      plan_.steps.insert(plan_.steps.begin() + ptrdiff_t(at), s);
    }
    drop_unread();
    fold_additions();
    resolve();
    return lay_out();
  }

 private:
  PlaneValue& value(int i) { return plan_.values[size_t(i)]; }
  static PlaneValue shaped(int h, int w, int c) { PlaneValue v; v.h = h; v.w = w; v.c = c; return v; }
  bool fail(int op, const std::string& why) { message_ = "operator " + std::to_string(op) + " of the region: " + why; return false; }

  // A PAD that only convolutions without padding of their own read is geometry: they begin that much earlier.
  void find_folded(const std::vector<int>& outputs) {
    for (const RegionOp& p : ops_) {
      if (p.kind != RegionOp::Kind::pad || std::count(outputs.begin(), outputs.end(), p.y)) continue;
      bool all = true;
      for (const RegionOp& r : ops_)
        if (r.x == p.y || r.x2 == p.y) all = all && (r.kind == RegionOp::Kind::conv || r.kind == RegionOp::Kind::depthwise) && !r.conv.same;
      if (all) folded_[p.y] = &p;
    }
  }

  bool lower(int index) {
    const RegionOp& op = ops_[size_t(index)];
    if (op.kind == RegionOp::Kind::pad) return folded_.count(op.y) ? fold(op) : lower_pad(op);
    if (op.kind == RegionOp::Kind::add) {
      const PlaneValue a = value(op.x), b = value(op.x2);
      if (a.h != b.h || a.w != b.w || a.c != b.c) return fail(index, "expected operands of one shape");
      PlaneStep s; s.kind = PlaneStep::add; s.x = op.x; s.x2 = op.x2; s.y = op.y; s.low = op.low; s.high = op.high;
      value(op.y) = shaped(a.h, a.w, a.c);
      plan_.steps.push_back(s);
      return true;
    }
    return lower_conv(index);
  }

  bool fold(const RegionOp& op) {   // its value has a shape for the readers' arithmetic, but no step
    const PlaneValue x = value(op.x);
    value(op.y) = shaped(x.h + op.before_h + op.after_h, x.w + op.before_w + op.after_w, x.c);
    return true;
  }

  bool lower_pad(const RegionOp& op) {
    fold(op);
    PlaneStep s; s.kind = PlaneStep::sample; s.x = op.x; s.y = op.y; s.origin = {{-op.before_h, -op.before_w}};
    plan_.steps.push_back(s);
    return true;
  }

  bool lower_conv(int index) {
    const RegionOp& op = ops_[size_t(index)];
    const paring_conv& c = op.conv;
    int x = op.x, before_h = 0, before_w = 0, after_h = 0, after_w = 0;
    auto pad = folded_.find(x);
    if (pad != folded_.end()) {
      const RegionOp& p = *pad->second;
      x = p.x; before_h = p.before_h; before_w = p.before_w; after_h = p.after_h; after_w = p.after_w;
    }
    const PlaneValue in = value(x);
    if (in.c != c.inputs) return fail(index, "expected " + std::to_string(c.inputs) + " input channels, got " + std::to_string(in.c));
    Axis h = axis(in.h, c.kernel_h, c.stride_h, c.dilation_h, c.same, before_h, after_h);
    Axis w = axis(in.w, c.kernel_w, c.stride_w, c.dilation_w, c.same, before_w, after_w);
    if (h.out <= 0 || w.out <= 0) return fail(index, "expected an output with elements");

    PlaneStep s; s.kind = op.kind == RegionOp::Kind::conv ? PlaneStep::conv : PlaneStep::depthwise;
    s.x = x; s.y = op.y; s.op = index; s.low = c.low; s.high = c.high;
    PlaneStep sampled; sampled.kind = PlaneStep::sample; sampled.x = x; sampled.stride_h = c.stride_h; sampled.stride_w = c.stride_w;
    int rows = h.out, columns = w.out;
    for (int ky = 0; ky < c.kernel_h; ky++)
      for (int kx = 0; kx < c.kernel_w; kx++) {
        int dy = ky * c.dilation_h - h.before, dx = kx * c.dilation_w - w.before;
        PlaneTap t = {0, floor_div(dy, c.stride_h), floor_div(dx, c.stride_w)};
        std::pair<int, int> origin(dy - t.dy * c.stride_h, dx - t.dx * c.stride_w);
        auto found = std::find(sampled.origin.begin(), sampled.origin.end(), origin);
        t.plane = int(found - sampled.origin.begin());
        if (found == sampled.origin.end()) sampled.origin.push_back(origin);
        rows = std::max(rows, h.out + t.dy); columns = std::max(columns, w.out + t.dx);
        s.taps.push_back(t);
      }
    if (s.kind == PlaneStep::depthwise && (c.stride_h > 1 || c.stride_w > 1)) {
      s.stride_h = c.stride_h; s.stride_w = c.stride_w;
      for (PlaneTap& t : s.taps) {
        const auto& origin = sampled.origin[size_t(t.plane)];
        t = {0, t.dy * c.stride_h + origin.first, t.dx * c.stride_w + origin.second};
      }
    } else if (c.stride_h > 1 || c.stride_w > 1) {   // a stride is a plane for each remainder, and then stride 1
      s.planes = sampled.planes = int(sampled.origin.size());
      s.x = sampled.y = int(plan_.values.size());
      plan_.values.push_back(shaped(rows, columns, in.c * s.planes));
      plan_.steps.push_back(sampled);
    }
    value(op.y) = shaped(h.out, w.out, c.outputs);
    plan_.steps.push_back(s);
    return true;
  }

  void drop_unread() {
    for (bool again = true; again;) {
      again = false;
      for (size_t i = 0; i < plan_.steps.size() && !again; i++) {
        const PlaneStep& s = plan_.steps[i];
        if (s.kind == PlaneStep::out) continue;
        bool read = std::any_of(plan_.steps.begin(), plan_.steps.end(), [&](const PlaneStep& r) { return r.x == s.y || r.x2 == s.y; });
        if (!read) { plan_.steps.erase(plan_.steps.begin() + ptrdiff_t(i)); again = true; }
      }
    }
  }

  int readers(int v) const {
    int n = 0;
    for (const PlaneStep& s : plan_.steps) n += (s.x == v) + (s.x2 == v);
    return n;
  }

  // A convolution whose result is only added to something begins its sums with that: one way through memory less.
  void fold_additions() {
    for (size_t i = 0; i < plan_.steps.size(); i++) {
      PlaneStep& conv = plan_.steps[i];
      if (conv.kind != PlaneStep::conv || conv.low != -infinity || conv.high != infinity || readers(conv.y) != 1) continue;
      for (size_t k = i + 1; k < plan_.steps.size(); k++) {
        const PlaneStep add = plan_.steps[k];
        if (add.kind != PlaneStep::add || (add.x != conv.y && add.x2 != conv.y)) continue;
        const int other = add.x == conv.y ? add.x2 : add.x;
        bool made = std::any_of(plan_.steps.begin(), plan_.steps.begin() + ptrdiff_t(i), [&](const PlaneStep& s) { return s.y == other; });
        if (!made) break;
        conv.x2 = other; conv.y = add.y; conv.low = add.low; conv.high = add.high;
        plan_.steps.erase(plan_.steps.begin() + ptrdiff_t(k));
        break;
      }
    }
  }

  int root(int i) { while (parent_[size_t(i)] != i) i = parent_[size_t(i)]; return i; }
  void join(int a, int b) { parent_[size_t(root(a))] = root(b); }

  void resolve() {
    for (size_t i = 0; i < plan_.values.size(); i++) parent_.push_back(int(i));
    for (const PlaneStep& s : plan_.steps) {
      if (s.kind != PlaneStep::conv && s.kind != PlaneStep::depthwise && s.kind != PlaneStep::add) continue;
      if (!s.strided()) join(s.x, s.y);
      if (s.x2 >= 0) join(s.x2, s.y);
    }
    std::map<int, int> number;
    for (const PlaneStep& s : plan_.steps)
      for (int v : {s.x, s.x2, s.y}) {
        if (v < 0) continue;
        auto at = number.emplace(root(v), int(number.size())).first;
        value(v).resolution = at->second;
      }
    plan_.resolutions.resize(number.size());
  }

  bool lay_out() {
    for (PlaneValue& v : plan_.values)
      if (v.resolution >= 0) { int& p = plan_.resolutions[size_t(v.resolution)].pitch; p = std::max(p, v.w); }
    for (const PlaneStep& s : plan_.steps) {
      if (s.kind == PlaneStep::sample) value(s.x).planes = true;
      if (s.pointwise()) continue;
      PlaneValue &x = value(s.x), &y = value(s.y);
      x.planes = x.halo = true;
      int& pitch = plan_.resolutions[size_t(x.resolution)].pitch;
      for (const PlaneTap& t : s.taps) pitch = std::max({pitch, x.w - std::min(t.dx, 0), (y.w - 1) * s.stride_w + 1 + t.dx});
    }
    for (PlaneValue& v : plan_.values) {
      if (v.resolution < 0) continue;
      PlaneResolution& r = plan_.resolutions[size_t(v.resolution)];
      v.vectors = int(round_up(size_t(v.h) * size_t(r.pitch), size_t(width_)) / size_t(width_));
      r.vectors = std::max(r.vectors, v.vectors);
      v.table = table(v, r.pitch);
    }
    std::vector<int64_t> zeros(plan_.values.size(), 0), read(plan_.values.size(), 0);   // ends, from a channel's first pixel
    for (const PlaneStep& s : plan_.steps) {
      if (s.kind != PlaneStep::conv && s.kind != PlaneStep::depthwise) continue;
      PlaneValue &x = value(s.x), &y = value(s.y);
      const int pitch = plan_.resolutions[size_t(x.resolution)].pitch;
      for (const PlaneTap& t : s.taps) {
        int64_t offset = int64_t(t.dy) * pitch + t.dx;
        x.lead = std::max(x.lead, round_up(size_t(std::max<int64_t>(-offset, 0)), 16));
        const int64_t last = int64_t(y.h - 1) * s.stride_h * pitch + int64_t(y.w - 1) * s.stride_w + 1 + offset;
        zeros[size_t(s.x)] = std::max(zeros[size_t(s.x)], last);
        // Vectors reach behind the last pixel: of the plane, or with a stride of its row.
        read[size_t(s.x)] = std::max(read[size_t(s.x)], s.strided() ? last + 2 * int64_t(width_) * s.stride_w : int64_t(y.vectors) * width_ + offset);
      }
    }
    for (size_t i = 0; i < plan_.values.size(); i++) {
      PlaneValue& v = plan_.values[i];
      if (v.resolution < 0 || !v.planes) continue;
      v.stride = std::max(round_up(size_t(v.vectors) * size_t(width_), 16) + v.lead, round_up(size_t(std::max<int64_t>(zeros[i], 0)), 16));
      if (v.stride / 16 % 2 == 0) v.stride += 16;   // an odd number of cache lines spreads planes over the sets
      v.behind = size_t(std::max<int64_t>(read[i] - int64_t(v.stride), 0));
    }
    return true;
  }

  size_t table(const PlaneValue& v, int pitch) {
    auto at = tables_.emplace(std::make_tuple(v.h, v.w, pitch), plan_.pixels.size());
    if (at.second) {
      std::vector<int32_t> t(size_t(v.vectors) * size_t(width_), -1);
      for (int y = 0; y < v.h; y++)
        for (int x = 0; x < v.w; x++) t[size_t(y) * size_t(pitch) + size_t(x)] = y * v.w + x;
      plan_.pixels.push_back(std::move(t));
    }
    return at.first->second;
  }

  const std::vector<RegionOp>& ops_;
  int width_;
  PlanePlan& plan_;
  std::string& message_;
  std::map<int, const RegionOp*> folded_;
  std::vector<int> parent_;
  std::map<std::tuple<int, int, int>, size_t> tables_;
};

}  // namespace

bool PlaneStep::pointwise() const {
  return kind != sample && !strided() && std::all_of(taps.begin(), taps.end(), [](const PlaneTap& t) { return t.dy == 0 && t.dx == 0; });
}

bool plan_region(const std::vector<RegionOp>& ops, int values, const std::vector<int>& inputs, const std::vector<int>& outputs,
                 const std::vector<Shape>& shapes, int width, PlanePlan* plan, std::string* message) {
  return Planner(ops, values, width, plan, message).run(inputs, outputs, shapes);
}

}  // namespace paring
