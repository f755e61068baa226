#include "cost.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "clock.h"
#include "layer.h"

namespace paring {
namespace {

int widest(const Kernel& k) {
  int n = k.pixels;
  while (n > 1 && !k.tiles[0][0][n - 1]) n--;
  return n;
}

Rates measure(const Kernel& k) {
  constexpr int groups = 4, inputs = 48;
  int R = k.outputs, pixels = widest(k), step = inputs * k.unit;
  int blocks = inputs * std::max(1, 8 / R);      // narrow groups have more of them, and an end that costs as much
  int element = k.type == PARING_F32 ? 4 : 1;
  std::vector<uint32_t> start, none(groups + 1, 0);
  for (int g = 0; g <= groups; g++) start.push_back(uint32_t(g * blocks));
  std::vector<uint16_t> entry;
  for (int g = 0; g < groups; g++) for (int i = 0; i < blocks; i++) entry.push_back(uint16_t(i % inputs));
  Memory value(size_t(groups) * blocks * R * k.inputs * element + 64), x(size_t(pixels) * step + 64), y(size_t(pixels) * groups * R * 4 + 64);
  std::memset(value.get(), 0, value.bytes());
  std::memset(x.get(), 0, x.bytes());
  std::vector<int32_t> bias(groups * R, 0), sum(groups * R, 0), zero(pixels, 0);
  std::vector<float> scale(groups * R, 0.5f), inverse(pixels, 1.f);
  Packed p = {};
  p.outputs = groups * R;
  p.groups = groups;
  p.passes = 1;
  p.value = value.get();
  p.bias = bias.data();
  p.scale = scale.data();
  p.sum = sum.data();
  p.low = -1;
  p.high = 1;
  p.least = -128;
  p.greatest = 127;
  p.small = 1;
  Tile t = {};
  t.x = x.get();
  t.step = step;
  t.y = y.get();
  t.y_step = ptrdiff_t(groups) * R * (k.type == PARING_S8 ? 1 : 4);
  t.w = &p;
  t.entry = entry.data();
  t.last = groups;
  t.inverse = inverse.data();
  t.zero = zero.data();
  p.start = none.data();
  double ends = least_time([&] { k.tiles[0][0][pixels - 1](t); });
  p.start = start.data();
  double full = least_time([&] { k.tiles[0][0][pixels - 1](t); }), alone = least_time([&] { k.tiles[0][0][0](t); });
  Rates r;
  r.end = ends / (groups * pixels);
  r.block = std::max(full - ends, full * 0.1) / (groups * blocks * pixels);
  r.alone = std::max(r.block, std::max(alone - r.end * groups, alone * 0.1) / (groups * blocks));
  return r;
}

// Time that computing takes with weights of `bytes` that every tile reads, beside activations that come and go.
double total(double compute, double bytes, double tiles, double activations, int threads, double tasks, double wake) {
  double workers = std::max(1.0, std::min(double(threads), tasks)), share = workers > 1 ? workers * 0.92 : 1;
  const Bandwidth& b = bandwidth();
  double speed = bytes > double(caches().l3) / 6 ? b.memory : b.cache;   // other layers want a place in the cache, too
  double passes = bytes > double(caches().l2) * 0.7 ? tiles : 1;
  // Sums hide most of the weights' way and the other way round; activations partly, since the next tile is prefetched.
  double fetch = bytes * passes / speed;
  double work = std::max(compute, fetch) + 0.35 * std::min(compute, fetch);
  return work / share + 0.4 * activations / b.cache / share + 3e-7 + (workers > 1 ? wake : 0);
}

double activation_bytes(const paring_conv& c, double pixels) {
  double in = double(c.inputs) * c.stride_h * c.stride_w, out = c.outputs;
  bool area = c.kernel_h * c.kernel_w > 1;          // a padded copy is made and read
  return pixels * (in * (c.type == PARING_S8 ? 1 : 4) * (area ? 2 : 1) + out * (c.type == PARING_S8 ? 1 : 4));
}

// The rates of a kernel, with what other measurements on a busy machine say of it: a block of 8 outputs loads as many
// activations as one of 16 for half the products.
Rates known_rates(const Kernel& k) {
  Rates r = rates(k);
  if (k.outputs == 1) return r;
  for (int i = 0; const Kernel* row = kernel_of(k.isa, i); i++)
    if (row->type == k.type && row->outputs == 16) {
      double least = rates(*row).block * (k.outputs == 16 ? 1 : k.outputs == 8 ? 0.65 : 0.45);
      r.block = std::max(r.block, least);
      r.alone = std::max(r.alone, least);
    }
  return r;
}

double seconds(const Kernel& k, const paring_conv& c, double blocks, double pixels, int threads) {
  if (threads > 1) {      // as paring_plan_new does
    double alone = seconds(k, c, blocks, pixels, 1);
    if (alone < worth_threads) return alone;
  }
  const Rates r = known_rates(k);
  double groups = (c.outputs + k.outputs - 1) / k.outputs, tile = std::min(pixels, double(widest(k))), tiles = pixels / tile;
  // The measurement has everything in the first cache, in order; taps lie apart. Seen beside whole layers.
  double far = c.kernel_h * c.kernel_w > 1 ? 1.25 : 1.1;
  double compute = tiles * (blocks * std::max(r.alone, tile * r.block * far) + groups * tile * r.end);
  double bytes = blocks * (k.outputs * k.inputs * (c.type == PARING_F32 ? 4 : 1) + (c.kernel_h * c.kernel_w > 1 ? 4 : 2));
  double quantizing = c.type == PARING_F32 ? 0 : pixels * c.inputs * (c.type == PARING_QD8 ? 1.5e-10 : 2e-11);
  return total(compute + quantizing, bytes, tiles, activation_bytes(c, pixels), threads, tiles * groups / 2, wake_seconds);
}

}  // namespace

const Rates& rates(const Kernel& k) {
  static std::mutex mutex;
  static std::map<const Kernel*, Rates> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto at = known.find(&k);
  if (at == known.end()) at = known.emplace(&k, measure(k)).first;
  return at->second;
}

const Bandwidth& bandwidth() {
  static const Bandwidth b = [] {
    // More than the second-level cache, less than the third.
    size_t bytes = std::min<size_t>(std::max<size_t>(6 * caches().l2, size_t(4) << 20), size_t(8) << 20);
    Memory m(bytes);
    std::memset(m.get(), 1, bytes);
    volatile uint64_t sink = 0;
    auto read = [&](size_t count) {
      double start = now();
      uint64_t sums[8] = {};
      const uint64_t* p = reinterpret_cast<const uint64_t*>(m.get());
      for (size_t i = 0; i + 8 <= count / 8; i += 8) for (int j = 0; j < 8; j++) sums[j] += p[i + j];
      sink = sink + sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
      return double(count) / std::max(now() - start, 1e-9);
    };
    double cache = 0, memory = 0;
    for (int i = 0; i < 4; i++) cache = std::max(cache, read(bytes));
#if defined(__x86_64__)
    size_t part = size_t(1) << 20;
    for (int i = 0; i < 2; i++) {
      for (size_t at = 0; at < part; at += 64) __builtin_ia32_clflush(m.get() + at);
      __builtin_ia32_mfence();
      memory = std::max(memory, read(part));
    }
#endif
    // Of a stream beside arithmetic, seen with dense layers; a virtual machine may tell strange things of either.
    cache *= 0.7;
    return Bandwidth{cache, memory > 0 && memory < cache ? memory : cache / 4};
  }();
  return b;
}

Choice choose(const paring_conv& c, const char* name, int64_t positions) {
  const Kernel* best = nullptr;
  int64_t found = 0;
  double least = 0;
  for (int i = 0; const Kernel* row = kernel_of(isa_in_force(), i); i++) {
    const Kernel& k = *row;
    if (k.type != c.type) continue;
    if (name) {
      if (!std::strcmp(k.name, name)) return {&k, count_blocks(c, k.outputs, k.inputs), ""};
      continue;
    }
    int64_t blocks = count_blocks(c, k.outputs, k.inputs);
    double t = seconds(k, c, double(blocks), double(std::max<int64_t>(1, positions)), 1);
    if (!best || t < least) { best = &k; found = blocks; least = t; }
  }
  return {best, found, name ? std::string("no kernel ") + name + " for this type, shape and instruction set" : "no kernel for this type"};
}

}  // namespace paring

using namespace paring;

extern "C" {

double paring_estimate(const paring_layer* l, int32_t n, int32_t h, int32_t w, int32_t threads) {
  int32_t out_h, out_w;
  paring_output_shape(&l->conv, h, w, &out_h, &out_w);
  const Kernel& k = *l->kernel;
  return seconds(k, l->conv, double(l->info.stored) / (k.outputs * k.inputs), double(n) * out_h * out_w, threads);
}

// XNNPACK runs dense layers at the peak of the dot products, and reads all weights; measured beside it: float32 at the rate
// of our own full tile, int8 8 % below.
double paring_estimate_dense(const paring_conv* c, int32_t n, int32_t h, int32_t w, int32_t threads) {
  int32_t out_h, out_w;
  paring_output_shape(c, h, w, &out_h, &out_w);
  double pixels = double(n) * out_h * out_w, weights = double(c->outputs) * c->kernel_h * c->kernel_w * c->inputs;
  int wanted = 16;
  const Kernel* k = nullptr;
  for (int isa = isa_count - 1; isa >= 0 && !k; isa--)      // the library uses what the processor has, whatever is in force here
    if (isa_available(Isa(isa)))
      for (int i = 0; const Kernel* row = kernel_of(Isa(isa), i); i++)
        if (row->type == c->type && row->outputs == wanted) k = row;
  const Rates& r = rates(*k);
  double each = k->outputs * k->inputs, tile = std::min(pixels, 12.0), groups = double(c->outputs) / k->outputs;
  double compute = pixels / tile * (weights / each * std::max(r.alone, tile * r.block) + groups * tile * r.end) * (c->type == PARING_F32 ? 1 : 1.08);
  return total(compute, weights * (c->type == PARING_F32 ? 4 : 1), pixels / tile, activation_bytes(*c, pixels), threads, pixels / tile * groups / 2, 0);   // it wakes its threads once for many layers
}

}  // extern "C"
