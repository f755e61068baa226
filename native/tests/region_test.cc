// Regions against a plain loop over images, under every instruction set that runs here. Returns nonzero on a difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu.h"
#include "region.h"

using namespace paring;

namespace {

std::mt19937 generator(7);
int dice(int from, int to) { return std::uniform_int_distribution<int>(from, to)(generator); }
float noise() { return std::uniform_real_distribution<float>(-1, 1)(generator); }
constexpr float inf = std::numeric_limits<float>::infinity();

struct Image {
  Shape s = {0, 0, 0, 0};
  std::vector<float> data;
  explicit Image(Shape shape = {0, 0, 0, 0}) : s(shape), data(size_t(shape.n) * shape.h * shape.w * shape.c) {}
  float& at(int n, int y, int x, int c) { return data[((size_t(n) * s.h + y) * s.w + x) * s.c + c]; }
};

// A region under construction, with the weights that its operators point to.
struct Net {
  std::vector<RegionOp> ops;
  std::vector<std::unique_ptr<std::vector<float>>> constants;
  std::map<int, int> channels;      // of the values
  int next = 0;

  int input(int c) { channels[next] = c; return next++; }
  RegionOp& op(RegionOp::Kind kind, int x, int x2, int c) {
    RegionOp o = {};
    o.kind = kind; o.x = x; o.x2 = x2; o.y = next; o.low = -inf; o.high = inf;
    channels[next++] = c;
    ops.push_back(o);
    return ops.back();
  }
  float* constant(size_t n) { constants.push_back(std::make_unique<std::vector<float>>(n)); return constants.back()->data(); }

  // rows: zeros come in blocks of so many outputs; density: share of weights that are not zero.
  int conv(int x, int outputs, int kh, int kw, int sh, int sw, int dh, int dw, bool same, double density, int rows, float low = -inf, float high = inf) {
    const int c = channels[x], taps = kh * kw;
    float *w = constant(size_t(outputs) * taps * c), *b = constant(size_t(outputs));
    for (int o = 0; o < outputs; o += rows)
      for (int i = 0; i < taps * c; i++)
        if (noise() * 0.5 + 0.5 <= density && density > 0) for (int q = o; q < std::min(o + rows, outputs); q++) w[size_t(q) * taps * c + i] = noise();
    for (int o = 0; o < outputs; o++) b[o] = noise();
    RegionOp& r = op(RegionOp::Kind::conv, x, -1, outputs);
    r.conv = {PARING_F32, outputs, kh, kw, c, sh, sw, dh, dw, same, w, dice(0, 3) ? b : nullptr, nullptr, 0, 0, 0, 0, 0, low, high};
    return r.y;
  }
  int depthwise(int x, int kh, int kw, int sh, int sw, int dh, int dw, bool same, float low = -inf, float high = inf) {
    const int c = channels[x];
    float *w = constant(size_t(kh) * kw * c), *b = constant(size_t(c));
    for (int i = 0; i < kh * kw * c; i++) w[i] = noise();
    for (int i = 0; i < c; i++) b[i] = noise();
    RegionOp& r = op(RegionOp::Kind::depthwise, x, -1, c);
    r.conv = {PARING_F32, c, kh, kw, c, sh, sw, dh, dw, same, w, b, nullptr, 0, 0, 0, 0, 0, low, high};
    return r.y;
  }
  int add(int a, int b, float low = -inf, float high = inf) {
    RegionOp& r = op(RegionOp::Kind::add, a, b, channels[a]);
    r.low = low; r.high = high;
    return r.y;
  }
  int pad(int x, int top, int bottom, int left, int right) {
    RegionOp& r = op(RegionOp::Kind::pad, x, -1, channels[x]);
    r.before_h = top; r.after_h = bottom; r.before_w = left; r.after_w = right;
    return r.y;
  }
};

Image reference(const RegionOp& op, Image& x, Image* x2) {
  if (op.kind == RegionOp::Kind::add) {
    Image y(x.s);
    for (size_t i = 0; i < y.data.size(); i++) y.data[i] = std::min(std::max(x.data[i] + x2->data[i], op.low), op.high);
    return y;
  }
  if (op.kind == RegionOp::Kind::pad) {
    Image y({x.s.n, x.s.h + op.before_h + op.after_h, x.s.w + op.before_w + op.after_w, x.s.c});
    for (int n = 0; n < x.s.n; n++)
      for (int i = 0; i < x.s.h; i++)
        for (int j = 0; j < x.s.w; j++)
          for (int c = 0; c < x.s.c; c++) y.at(n, i + op.before_h, j + op.before_w, c) = x.at(n, i, j, c);
    return y;
  }
  const paring_conv& k = op.conv;
  auto axis = [&](int in, int kernel, int stride, int dilation, int* before) {
    int reach = (kernel - 1) * dilation + 1;
    *before = 0;
    if (!k.same) return (in - reach) / stride + 1;
    int out = (in + stride - 1) / stride;
    *before = std::max((out - 1) * stride + reach - in, 0) / 2;
    return out;
  };
  int top, left, h = axis(x.s.h, k.kernel_h, k.stride_h, k.dilation_h, &top), w = axis(x.s.w, k.kernel_w, k.stride_w, k.dilation_w, &left);
  Image y({x.s.n, h, w, k.outputs});
  auto *weights = static_cast<const float*>(k.weights), *bias = static_cast<const float*>(k.bias);
  for (int n = 0; n < x.s.n; n++)
    for (int i = 0; i < h; i++)
      for (int j = 0; j < w; j++)
        for (int o = 0; o < k.outputs; o++) {
          double sum = bias ? bias[o] : 0;
          for (int a = 0; a < k.kernel_h; a++)
            for (int b = 0; b < k.kernel_w; b++) {
              int r = i * k.stride_h + a * k.dilation_h - top, q = j * k.stride_w + b * k.dilation_w - left;
              if (r < 0 || q < 0 || r >= x.s.h || q >= x.s.w) continue;
              if (op.kind == RegionOp::Kind::depthwise) { sum += double(x.at(n, r, q, o)) * weights[(size_t(a) * k.kernel_w + b) * k.outputs + o]; continue; }
              const float* f = weights + ((size_t(o) * k.kernel_h + a) * k.kernel_w + b) * k.inputs;
              for (int c = 0; c < k.inputs; c++) sum += double(x.at(n, r, q, c)) * f[c];
            }
          y.at(n, i, j, o) = std::min(std::max(float(sum), k.low), k.high);
        }
  return y;
}

int failures = 0, runs = 0;

// Runs under one set and several thread counts on one region that is prepared anew for each shape.
void check(const std::string& name, Net& net, const std::vector<int>& inputs, const std::vector<int>& outputs, const std::vector<std::vector<Shape>>& shapes) {
  std::string message;
  std::unique_ptr<Region> region(Region::create(net.ops, inputs, outputs, &message));
  if (!region) { std::printf("FAILED %s: %s\n", name.c_str(), message.c_str()); failures++; return; }
  for (const auto& at : shapes) {
    std::map<int, Image> values;
    for (size_t i = 0; i < inputs.size(); i++) {
      Image x(at[i]);
      for (float& v : x.data) v = noise();
      values[inputs[i]] = x;
    }
    for (const RegionOp& op : net.ops) values[op.y] = reference(op, values[op.x], op.x2 >= 0 ? &values[op.x2] : nullptr);
    for (int set = 0; set < isa_count; set++) {
      if (!set_isa(Isa(set))) continue;
      for (int threads : {1, 2, 5}) {
        std::vector<Shape> shape;
        if (!region->prepare(at, threads, &shape, &message)) { std::printf("FAILED %s: %s\n", name.c_str(), message.c_str()); failures++; return; }
        if (!(region->estimate() > 0 && region->estimate() < 1)) { std::printf("FAILED %s: estimate %g\n", name.c_str(), region->estimate()); failures++; }
        std::vector<const void*> in;
        std::vector<std::vector<float>> result;
        for (int v : inputs) in.push_back(values[v].data.data());
        for (const Shape& s : shape) result.emplace_back(size_t(s.n) * s.h * s.w * s.c, NAN);
        std::vector<void*> out;
        for (auto& r : result) out.push_back(r.data());
        for (int again = 0; again < 2; again++) {   // the second run meets what the first one left in the planes
          region->run(in.data(), out.data());
          runs++;
          for (size_t k = 0; k < outputs.size(); k++) {
            const Image& y = values[outputs[k]];
            const Shape& s = shape[k];
            float most = 0, worst = 0;
            bool same = s.n == y.s.n && s.h == y.s.h && s.w == y.s.w && s.c == y.s.c;
            for (size_t i = 0; same && i < y.data.size(); i++) {
              most = std::max(most, std::fabs(y.data[i]));
              float d = std::fabs(y.data[i] - result[k][i]);
              if (!(d <= worst)) worst = d;
              if (d != d) worst = inf;
            }
            if (!same || !(worst <= 1e-5f * std::max(most, 1e-3f))) {
              std::printf("FAILED %s: %s, %d threads, output %zu, %d x %d x %d x %d: worst %g of %g\n", name.c_str(), isa_name(Isa(set)), threads, k, s.n, s.h, s.w, s.c, worst, most);
              failures++;
            }
          }
        }
      }
    }
  }
}

Shape any_shape(int c, int least = 1) { return {dice(0, 4) ? 1 : 2, dice(least, 40), dice(least, 40), c}; }

void single_operators() {
  for (double density : {0.0, 0.05, 0.3, 1.0})
    for (int rows : {1, 4})
      for (int k : {1, 2, 3, 5})
        for (int stride : {1, 2, 3})
          for (int dilation : {1, 2})
            for (bool same : {false, true}) {
              Net net;
              int c = dice(1, 70), x = net.input(c), least = same ? 1 : (k - 1) * dilation + 1;
              net.conv(x, dice(1, 70), k, k, stride, stride, dilation, dilation, same, density, rows, dice(0, 1) ? 0 : -inf, dice(0, 1) ? 6 : inf);
              check("conv " + std::to_string(k) + " stride " + std::to_string(stride) + " dilation " + std::to_string(dilation) + " rows " + std::to_string(rows), net, {x}, {1},
                    {{any_shape(c, least)}, {any_shape(c, least)}});
            }
  for (int k : {1, 2, 3, 5, 7})
    for (int stride : {1, 2, 3})
      for (int dilation : {1, 2})
        for (bool same : {false, true}) {
          Net net;
          int c = dice(1, 70), x = net.input(c), least = same ? 1 : (k - 1) * dilation + 1;
          net.depthwise(x, k, k, stride, stride, dilation, dilation, same, dice(0, 1) ? 0 : -inf, dice(0, 1) ? 1 : inf);
          check("depthwise " + std::to_string(k) + " stride " + std::to_string(stride), net, {x}, {1}, {{any_shape(c, least)}, {any_shape(c, least)}});
        }
  {
    Net net;
    int c = 23, a = net.input(c), b = net.input(c);
    net.add(a, b, 0, 0.5f);
    check("add", net, {a, b}, {2}, {{{1, 7, 9, c}, {1, 7, 9, c}}, {{2, 1, 40, c}, {2, 1, 40, c}}});
  }
  {
    Net net;
    int c = 19, a = net.input(c), y = net.pad(a, 1, 2, 3, 0);
    check("pad", net, {a}, {y}, {{{1, 7, 9, c}}, {{2, 1, 40, c}}});
  }
  {
    Net net;                                // unequal kernels, strides and dilations
    int c = 9, x = net.input(c);
    int y = net.conv(x, 10, 1, 5, 1, 2, 1, 3, true, 0.4, 1);
    y = net.conv(y, 13, 4, 2, 3, 1, 1, 2, true, 0.4, 4);
    y = net.depthwise(y, 3, 5, 1, 2, 2, 1, true);
    check("unequal", net, {x}, {y}, {{{1, 30, 37, c}}, {{2, 12, 5, c}}});
  }
}

void wide() {                               // more input channels than a pass takes
  for (int rows : {1, 4})
    for (int k : {1, 3}) {
      Net net;
      int c = k == 1 ? 401 : 150, x = net.input(c);
      int y = net.conv(x, 9, k, k, 1, 1, 1, 1, true, 0.2, rows, 0);
      y = net.conv(y, 401, 1, 1, 1, 1, 1, 1, true, 0.4, rows);
      y = net.conv(y, 7, 1, 1, 1, 1, 1, 1, true, 0.2, rows);
      check("wide " + std::to_string(k) + " rows " + std::to_string(rows), net, {x}, {y}, {{{1, 13, 11, c}}});
    }
}

void regions() {
  {
    Net net;                                // MobileNet: alternating, with strides
    int x = net.input(3), y = net.conv(x, 12, 3, 3, 2, 2, 1, 1, true, 1, 1, 0, 6);
    for (int i = 0; i < 5; i++) {
      y = net.depthwise(y, 3, 3, i % 2 + 1, i % 2 + 1, 1, 1, true, 0, 6);
      y = net.conv(y, 14 + 9 * i, 1, 1, 1, 1, 1, 1, true, 0.3, i % 2 ? 4 : 1, 0, 6);
    }
    check("mobile", net, {x}, {y}, {{{1, 40, 40, 3}}, {{2, 33, 17, 3}}, {{1, 1, 1, 3}}});
  }
  {
    Net net;                                // ResNet: padding that folds, branches, a projection, one output in the middle
    int x = net.input(16), y = x, middle = 0;
    for (int i = 0; i < 4; i++) {
      int stride = i == 2 ? 2 : 1, c = i < 2 ? 16 : 24;
      int a = net.conv(y, 8, 1, 1, 1, 1, 1, 1, false, 0.4, 4, 0);
      a = net.pad(a, 1, 1, 1, 1);
      a = net.conv(a, 8, 3, 3, stride, stride, 1, 1, false, 0.3, i % 2 ? 1 : 4, 0);
      a = net.conv(a, c, 1, 1, 1, 1, 1, 1, false, 0.4, 1);
      int b = c == net.channels[y] ? y : net.conv(y, c, 1, 1, stride, stride, 1, 1, false, 0.5, 4);
      y = net.add(a, b, 0);
      if (i == 1) middle = y;
    }
    check("residual", net, {x}, {y, middle}, {{{1, 28, 28, 16}}, {{2, 9, 15, 16}}, {{1, 3, 2, 16}}});
  }
  {
    Net net;                                // the same padding folded for two readers; then one that cannot fold; lopsided ones
    int x = net.input(10), p = net.pad(x, 0, 1, 0, 1);
    int a = net.depthwise(p, 3, 3, 2, 2, 1, 1, false), b = net.conv(p, 10, 3, 3, 2, 2, 1, 1, false, 0.5, 1);
    int s = net.add(a, b), q = net.pad(s, 2, 0, 3, 1);
    int c = net.conv(q, 8, 3, 3, 1, 1, 1, 1, true, 0.3, 4), d = net.conv(q, 8, 1, 1, 1, 1, 1, 1, false, 0.3, 4);
    int t = net.add(c, d), wide = net.pad(t, 4, 4, 4, 4), e = net.conv(wide, 5, 3, 3, 1, 1, 1, 1, false, 0.5, 1), f = net.conv(wide, 5, 1, 1, 1, 1, 1, 1, false, 0.5, 1);
    check("paddings", net, {x}, {e, f, s}, {{{1, 12, 15, 10}}, {{2, 2, 3, 10}}, {{1, 37, 40, 10}}});
  }
  {
    Net net;                                // sizes shrink without padding; a buffer's surroundings must be zero again
    int x = net.input(7), y = x;
    for (int i = 0; i < 6; i++) y = net.conv(y, 7 + i, 3, 3, 1, 1, 1, 1, i % 2 == 0 && i > 1, 0.5, i % 2 ? 1 : 4, 0);
    check("shrinking", net, {x}, {y}, {{{1, 23, 19, 7}}, {{2, 11, 12, 7}}});
  }
  {
    Net net;                                // an input that is an output, an input that nobody reads, a value that nobody reads
    int x = net.input(6), z = net.input(5), y = net.conv(x, 6, 1, 1, 1, 1, 1, 1, true, 0.5, 1);
    net.conv(x, 4, 3, 3, 1, 1, 1, 1, true, 0.5, 1);
    int sum = net.add(y, x);
    check("idle", net, {x, z}, {x, sum, sum}, {{{1, 5, 6, 6}, {1, 3, 3, 5}}});
  }
  for (int i = 0; i < 40; i++) {            // any graph
    Net net;
    std::vector<int> same = {net.input(dice(1, 20))};
    int x = same[0], steps = dice(2, 9);
    for (int s = 0; s < steps; s++) {
      int from = same[size_t(dice(0, int(same.size()) - 1))], c = net.channels[from], y = 0;
      switch (dice(0, 4)) {
        case 0: y = net.conv(from, dice(1, 30), 1, 1, 1, 1, 1, 1, dice(0, 1), 0.3, 4, 0); break;
        case 1: y = net.conv(from, dice(1, 30), 3, 3, 1, 1, dice(1, 2), dice(1, 2), true, 0.3, dice(0, 1) ? 4 : 1, 0); break;
        case 2: y = net.depthwise(from, dice(1, 5), dice(1, 5), 1, 1, 1, 1, true, 0, 6); break;
        case 3: y = net.conv(net.pad(from, 1, 1, 2, 2), c, 3, 5, 1, 1, 1, 1, false, 0.2, 1); break;
        default: {
          int other = same[size_t(dice(0, int(same.size()) - 1))];
          y = net.channels[other] == c ? net.add(from, other, -1, 1) : net.conv(from, c, 1, 1, 1, 1, 1, 1, true, 0.5, 1);
        }
      }
      same.push_back(y);
    }
    std::vector<int> outputs = {same.back()};
    if (dice(0, 1)) outputs.push_back(same[size_t(dice(0, int(same.size()) - 1))]);
    int c = net.channels[x];
    check("graph " + std::to_string(i), net, {x}, outputs, {{any_shape(c)}, {any_shape(c)}});
  }
}

void refusals() {
  std::string message;
  std::vector<Shape> shapes;
  Net net;
  int x = net.input(4), y = net.conv(x, 4, 5, 5, 1, 1, 1, 1, false, 0.5, 1);
  std::unique_ptr<Region> r(Region::create(net.ops, {x}, {y}, &message));
  auto expect = [&](bool right, const char* what) { if (!right) { std::printf("FAILED: %s (%s)\n", what, message.c_str()); failures++; } };
  expect(r && !r->prepare({{1, 4, 9, 4}}, 1, &shapes, &message) && message.find("elements") != std::string::npos, "an output without elements is refused");
  expect(r && !r->prepare({{1, 9, 9, 3}}, 1, &shapes, &message) && message.find("channels") != std::string::npos, "a wrong number of channels is refused");
  expect(!Region::create(net.ops, {y}, {x}, &message), "values made after they are read are refused");
  net.ops[0].conv.type = PARING_S8;
  expect(!Region::create(net.ops, {x}, {y}, &message), "int8 is refused");
}

}  // namespace

int main() {
  single_operators();
  wide();
  regions();
  refusals();
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures != 0;
}
