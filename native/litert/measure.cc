#include "measure.h"

#include <ctime>

#include "text.h"

namespace paring {
namespace litert {
namespace {

constexpr int runs = 3;   // at most, after one that fills the caches

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Values that no kernel could find easy: of both signs, none tiny.
std::vector<float> floats(int64_t n) {
  std::vector<float> v(static_cast<size_t>(n));
  uint32_t state = 1;
  for (float& f : v) {
    state = state * 1664525u + 1013904223u;
    f = float(state >> 8) / float(1 << 23) - 1.0f + 1e-3f;
  }
  return v;
}

}  // namespace

template <class Run> double Stopwatch::best(double expected, Run run) {
  if (2 * expected > left_) return 0;
  double least = 0, start = now(), before = start;
  for (int i = 0; i <= runs && (i < 2 || before - start < left_); i++) {
    run();
    double after = now(), took = after - before;
    if (i > 0 && (least == 0 || took < least)) least = took;
    before = after;
  }
  left_ -= before - start;
  return least;
}

double Stopwatch::product(const Product& p, const Geometry& g, double expected) {
  const paring_conv& c = p.op().conv;
  paring_layer_info info = p.info();
  // Layers of a network often repeat one shape.
  std::string like = text("%s %d %d %d %d %d %d %d %d %lld", info.kernel, c.outputs, c.kernel_h, c.kernel_w, c.inputs, c.stride_h, g.n, g.h, g.w,
                          static_cast<long long>(info.stored * 20 / (int64_t(c.outputs) * c.inputs * c.kernel_h * c.kernel_w)));
  if (!seen_.insert(like).second) return 0;
  int64_t matrices = p.op().matrices();
  std::vector<float> x = floats(matrices * g.n * g.h * g.w * c.inputs), y(static_cast<size_t>(elements_of(g.y)));
  return best(expected, [&] { p.run(x.data(), y.data()); });
}

double Stopwatch::island(const Island& island, const std::vector<std::vector<int>>& inputs, const std::vector<std::vector<int>>& outputs, double expected) {
  std::vector<std::vector<float>> values;
  std::vector<const void*> in;
  std::vector<void*> out;
  values.reserve(inputs.size() + outputs.size());
  for (const auto& d : inputs) {
    values.push_back(floats(elements_of(d)));
    in.push_back(values.back().data());
  }
  for (const auto& d : outputs) {
    values.emplace_back(static_cast<size_t>(elements_of(d)));
    out.push_back(values.back().data());
  }
  return best(expected, [&] { island.run(in.data(), out.data()); });
}

}  // namespace litert
}  // namespace paring
