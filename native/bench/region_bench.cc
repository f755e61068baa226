// Times regions, conversions included, with caches evicted between runs; made-up weights.
//   region_bench chain [kernel size] [rows of a block] [threads] [image size] [channels]    four convolutions
//   region_bench mobilenet|resnet [rows of a block] [threads]     the bodies of MobileNetV1 and ResNet-50 at 224 x 224
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <random>
#include <vector>

#include "cpu.h"
#include "region.h"

using namespace paring;

namespace {

double now(clockid_t clock) { timespec t; clock_gettime(clock, &t); return double(t.tv_sec) + double(t.tv_nsec) * 1e-9; }

struct Net {
  std::vector<RegionOp> ops;
  std::vector<std::unique_ptr<std::vector<float>>> constants;
  std::mt19937 random{1};
  int values = 1, size = 0, channels = 0;   // of the last value
  double zeros = 0, flops = 0;
  int rows = 1;

  float uniform() { return std::uniform_real_distribution<float>(-1, 1)(random); }
  float* constant(size_t n) { constants.push_back(std::make_unique<std::vector<float>>(n)); return constants.back()->data(); }
  RegionOp& op(RegionOp::Kind kind, int x, int x2) {
    RegionOp o = {};
    o.kind = kind; o.x = x; o.x2 = x2; o.y = values++; o.low = 0; o.high = HUGE_VALF;
    ops.push_back(o);
    return ops.back();
  }
  int conv(int x, int outputs, int kernel, int stride, int inputs, float low = 0) {
    const int taps = kernel * kernel;
    size = (size + stride - 1) / stride;
    float *w = constant(size_t(outputs) * taps * inputs), *b = constant(size_t(outputs));
    for (int o = 0; o < outputs; o += rows)
      for (int i = 0; i < taps * inputs; i++)
        if (uniform() * 0.5 + 0.5 >= zeros)
          for (int q = 0; q < rows && o + q < outputs; q++) { w[size_t(o + q) * taps * inputs + i] = uniform() * 0.1f; flops += 2.0 * size * size; }
    RegionOp& r = op(RegionOp::Kind::conv, x, -1);
    r.conv = {PARING_F32, outputs, kernel, kernel, inputs, stride, stride, 1, 1, 1, w, b, nullptr, 0, 0, 0, 0, 0, low, HUGE_VALF};
    channels = outputs;
    return r.y;
  }
  int depthwise(int x, int stride) {
    float *w = constant(9 * size_t(channels)), *b = constant(size_t(channels));
    for (int i = 0; i < 9 * channels; i++) w[i] = uniform();
    size = (size + stride - 1) / stride;
    RegionOp& r = op(RegionOp::Kind::depthwise, x, -1);
    r.conv = {PARING_F32, channels, 3, 3, channels, stride, stride, 1, 1, 1, w, b, nullptr, 0, 0, 0, 0, 0, 0, 6};
    return r.y;
  }
};

void build(Net& net, const char* kind, Shape* input, int kernel, int size, int channels) {
  int y = 0;
  if (!std::strcmp(kind, "chain")) {
    *input = {1, size, size, channels};
    net.size = size;
    for (int i = 0; i < 4; i++) y = net.conv(y, channels, kernel, 1, channels);
  } else if (!std::strcmp(kind, "mobilenet")) {   // behind the first convolution
    *input = {1, 112, 112, 32};
    net.size = 112; net.channels = 32;
    const int outputs[] = {64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024}, strides[] = {1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1};
    for (int i = 0; i < 13; i++) {
      int inputs = net.channels;
      y = net.depthwise(y, strides[i]);
      y = net.conv(y, outputs[i], 1, 1, inputs);
    }
  } else {                                  // ResNet-50 behind its pooling
    *input = {1, 56, 56, 64};
    net.size = 56; net.channels = 64;
    const int blocks[] = {3, 4, 6, 3};
    for (int s = 0, inner = 64; s < 4; s++, inner *= 2)
      for (int b = 0; b < blocks[s]; b++) {
        const int stride = b == 0 && s > 0 ? 2 : 1, inputs = net.channels, x = y, before = net.size;
        int a = net.conv(x, inner, 1, stride, inputs);
        a = net.conv(a, inner, 3, 1, inner);
        a = net.conv(a, 4 * inner, 1, 1, inner, -HUGE_VALF);
        int side = x;
        if (b == 0) { net.size = before; side = net.conv(x, 4 * inner, 1, stride, inputs, -HUGE_VALF); }
        y = net.op(RegionOp::Kind::add, a, side).y;
      }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const char* kind = argc > 1 ? argv[1] : "chain";
  const int from = std::strcmp(kind, "chain") ? 1 : 2;
  auto arg = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
  const int kernel = from == 2 ? arg(2, 1) : 0, rows = arg(from + 1, 4), threads = arg(from + 2, 1), size = arg(from + 3, 28), channels = arg(from + 4, 256);
  const char* megabytes = std::getenv("EVICT");
  std::vector<char> evict(size_t(megabytes ? std::atoi(megabytes) : 32) << 20);
  std::printf("%s, %s", isa_name(isa_in_force()), kind);
  if (from == 2) std::printf(" %d x %d, %d x %d x %d", kernel, kernel, size, size, channels);
  std::printf(", blocks of %d, %d threads\n", rows, threads);
  for (double zeros : {0.7, 0.8, 0.9}) {
    Net net;
    net.zeros = zeros; net.rows = rows;
    Shape input;
    build(net, kind, &input, kernel, size, channels);
    std::string message;
    std::unique_ptr<Region> r(Region::create(net.ops, {0}, {net.values - 1}, &message));
    std::vector<Shape> shapes;
    if (!r || !r->prepare({input}, threads, &shapes, &message)) { std::printf("%s\n", message.c_str()); return 1; }
    std::vector<float> x(size_t(input.h) * input.w * input.c), y(size_t(shapes[0].h) * shapes[0].w * shapes[0].c);
    for (float& v : x) v = net.uniform();
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
    const double median = times[times.size() / 2];
    std::printf("%2.0f %%: %7.0f us [%.0f .. %.0f], %5.1f GF/s on nonzeros; estimate %.0f us\n", zeros * 100, median * 1e6, times[times.size() / 10] * 1e6,
                times[times.size() * 9 / 10] * 1e6, net.flops / median * 1e-9, r->estimate() * 1e6);
  }
}
