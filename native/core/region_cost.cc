#include "region_cost.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <vector>

#include "clock.h"

namespace paring {
namespace {

PlaneRates measure(const PlaneKernels& k) {
  constexpr int channels = 32, outputs = channels, rounds = 4;   // the blocks of a group read every channel some times
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const int vectors = k.block_vectors, lines = k.line_vectors, pixels = vectors * k.width;
  const size_t stride = size_t(std::max(vectors, lines)) * size_t(k.width);
  std::vector<float> memory(2 * channels * stride + 64), rows(size_t(pixels) * channels), weights(size_t(channels) * rounds * outputs * 4), bias(outputs);
  float* const x = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / sizeof(float);   // as planes lie
  float* const y = x + channels * stride;
  std::vector<int32_t> offsets, pixel;
  std::vector<PlaneGroup> groups;
  for (int o = 0; o < outputs; o++) {
    for (int i = 0; i < channels * rounds; i++) offsets.push_back(int32_t((i * 7 + o) % channels * stride * 4));
    groups.push_back({o, int32_t(offsets.size())});
  }
  for (int i = 0; i < pixels; i++) pixel.push_back(i);
  PlaneConv c = {};
  c.offsets = offsets.data(); c.values = weights.data(); c.groups = groups.data(); c.passes = 1; c.group_count = outputs;
  c.bias = bias.data(); c.low = -infinity; c.high = infinity; c.x = x; c.y = y; c.y_stride = stride;
  const double lone = least_time([&] { k.conv1(c, lines); }) / lines;
  for (int o = 0; o < outputs; o += 4) groups[size_t(o / 4)] = {o, groups[size_t(o / 4)].end};
  c.group_count = outputs / 4;
  const double block = least_time([&] { k.conv4(c, vectors); });
  for (auto& g : groups) g.end = 0;
  const double end = least_time([&] { k.conv4(c, vectors); }) / (outputs * vectors);
  PlaneDepthwise d = {};
  d.x = x; d.x_stride = stride; d.y = y; d.y_stride = stride; d.offsets = offsets.data(); d.weights = weights.data(); d.bias = bias.data();
  d.taps = 9; d.last = channels; d.low = -infinity; d.high = infinity;
  int32_t around[9];
  for (int t = 0; t < 9; t++) around[t] = t % 3 * 4;
  d.offsets = around;
  const double tap = least_time([&] { k.depthwise(d, vectors); }) / (9 * channels * vectors);
  PlaneAdd a = {x, x, stride, stride, y, stride, nullptr, 0, channels, -infinity, infinity};
  const double add = least_time([&] { k.add(a, vectors); }) / (channels * vectors);
  const double convert = least_time([&] { k.to_planes(rows.data(), pixel.data(), channels, 0, channels, x, stride, vectors); }) / (channels * vectors);
  const double blocks = double(channels) * rounds;
  return {std::max(block - end * outputs * vectors, block / 2) / (blocks * outputs / 4 * vectors),
          std::max(lone - end * outputs, lone / 2) / (blocks * outputs), end, tap, add, convert};
}

}  // namespace

const PlaneRates& plane_rates(const PlaneKernels& k) {
  static std::mutex mutex;
  static std::map<const PlaneKernels*, PlaneRates> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto at = known.find(&k);
  if (at == known.end()) at = known.emplace(&k, measure(k)).first;
  return at->second;
}

}  // namespace paring
