#include "expect.h"

#include <algorithm>

namespace paring {
namespace litert {
namespace {

// Rates of one core of the machines this was measured on (3 GHz, caches as large as the tensors of one layer).
constexpr double bytes_per_second = 2.0e10;
constexpr double depthwise_flops = 2.5e10;
constexpr double sparse_flops = 5.0e10;

double bytes(const Operator& op, const Geometry& g) {
  double x = 4 * double(g.n) * g.h * g.w * double(g.y.back()), y = 4 * double(elements_of(g.y));
  return x * (op.kind == Operator::Kind::add ? 2 : 1) + y;
}

double depthwise_seconds(const Operator& op, const Geometry& g) {
  return 2 * double(elements_of(g.y)) * op.conv.kernel_h * op.conv.kernel_w / depthwise_flops;
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
