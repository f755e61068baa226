#include "expect.h"

#include <algorithm>
#include <cmath>

namespace paring {
namespace litert {
namespace {

// XNNPACK's rates on one core of a 3 GHz x86-64 with AVX-512, of tensors that fit its caches (measured, 100 KB to 1.5 MB).
constexpr double bytes_per_second = 5.8e10;
constexpr double depthwise_flops = 4.0e10;
constexpr double pixel_lanes = 16;   // channels that cost as much as one
// Of our own on planes, unstructured weights.
constexpr double sparse_flops = 5.0e10;

double bytes(const Operator& op, const Geometry& g) {
  double x = 4 * double(g.n) * g.h * g.w * double(g.y.back()), y = 4 * double(elements_of(g.y));
  return x * (op.kind == Operator::Kind::add ? 2 : 1) + y;
}

double depthwise_seconds(const Operator& op, const Geometry& g) {
  double channels = std::ceil(double(g.y.back()) / pixel_lanes) * pixel_lanes;
  return 2 * double(elements_of(g.y)) / double(g.y.back()) * channels * op.conv.kernel_h * op.conv.kernel_w / depthwise_flops;
}

}  // namespace

double estimate_other(const Operator& op, const Geometry& g, int threads) {
  double seconds = bytes(op, g) / bytes_per_second;
  if (op.kind == Operator::Kind::depthwise) seconds = std::max(seconds, depthwise_seconds(op, g));
  return seconds / std::max(1, threads);
}

double estimate_in_planes(const Operator& op, int64_t nonzeros, const Geometry& g, int threads) {
  if (op.kind == Operator::Kind::pad) return 0;   // becomes zeros around the image
  if (op.kind == Operator::Kind::product)
    return 2 * double(nonzeros) * double(elements_of(g.y)) / double(g.y.back()) / sparse_flops / std::max(1, threads);
  return estimate_other(op, g, threads);
}

}  // namespace litert
}  // namespace paring
