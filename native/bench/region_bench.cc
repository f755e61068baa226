// Times chains of four convolutions 28 x 28 x 256 as one region, conversions included, with caches evicted between runs.
// region_bench [kernel size] [rows of a block] [threads] [image size] [channels]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <vector>

#include "cpu.h"
#include "region.h"

using namespace paring;

static double now(clockid_t clock) { timespec t; clock_gettime(clock, &t); return double(t.tv_sec) + double(t.tv_nsec) * 1e-9; }

int main(int argc, char** argv) {
  auto arg = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
  const int kernel = arg(1, 1), rows = arg(2, 4), threads = arg(3, 1), size = arg(4, 28), channels = arg(5, 256), layers = 4;
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<char> evict(size_t(32) << 20);
  std::printf("%s, %d x %d, blocks of %d, %d threads, %d x %d x %d\n", isa_name(isa_in_force()), kernel, kernel, rows, threads, size, size, channels);
  for (double zeros : {0.7, 0.8, 0.9}) {
    const int taps = kernel * kernel;
    std::vector<std::vector<float>> weights;
    std::vector<float> bias(static_cast<size_t>(channels), 0.1f);
    std::vector<RegionOp> ops;
    double nonzeros = 0;
    for (int l = 0; l < layers; l++) {
      std::vector<float> w(size_t(channels) * taps * channels);
      for (int o = 0; o < channels; o += rows)
        for (int i = 0; i < taps * channels; i++)
          if (uniform(random) * 0.5 + 0.5 >= zeros)
            for (int q = 0; q < rows && o + q < channels; q++) { w[size_t(o + q) * taps * channels + i] = uniform(random) * 0.1f; nonzeros++; }
      weights.push_back(std::move(w));
    }
    for (int l = 0; l < layers; l++) {
      RegionOp op = {};
      op.kind = RegionOp::Kind::conv; op.x = l; op.x2 = -1; op.y = l + 1;
      op.conv = {PARING_F32, channels, kernel, kernel, channels, 1, 1, 1, 1, 1, weights[size_t(l)].data(), bias.data(), nullptr, 0, 0, 0, 0, 0, 0, HUGE_VALF};
      ops.push_back(op);
    }
    std::string message;
    Region* r = Region::create(ops, {0}, {layers}, &message);
    std::vector<Shape> shapes;
    if (!r || !r->prepare({{1, size, size, channels}}, threads, &shapes, &message)) { std::printf("%s\n", message.c_str()); return 1; }
    std::vector<float> x(size_t(size) * size * channels), y(x.size());
    for (float& v : x) v = uniform(random);
    const void* in[] = {x.data()};
    void* out[] = {y.data()};
    std::vector<double> times;
    const clockid_t clock = threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
    for (double end = now(CLOCK_MONOTONIC) + 1.0; now(CLOCK_MONOTONIC) < end || times.size() < 15;) {
      for (size_t i = 0; i < evict.size(); i += 64) evict[i]++;
      double start = now(clock);
      r->run(in, out);
      times.push_back(now(clock) - start);
    }
    std::sort(times.begin(), times.end());
    const double median = times[times.size() / 2], flops = 2 * nonzeros * size * size;
    std::printf("%2.0f %%: %7.0f us [%.0f .. %.0f], %5.1f GF/s on nonzeros; estimate %.0f us\n", zeros * 100, median * 1e6, times[times.size() / 10] * 1e6,
                times[times.size() * 9 / 10] * 1e6, flops / median * 1e-9, r->estimate() * 1e6);
    delete r;
  }
}
