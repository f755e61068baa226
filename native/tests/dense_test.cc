// Products with dense weights against the plain loop, on memory that ends where the product does: meant for sanitizers, under
// every instruction set that this machine has. More shapes, against NumPy: tests/test_dense.py.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu.h"
#include "dense.h"

namespace {

std::mt19937 engine{11};
int drawn(int least, int most) { return std::uniform_int_distribution<int>(least, most)(engine); }
float real() { return std::normal_distribution<float>()(engine); }
float float_of(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
uint32_t bits_of(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }
uint16_t rounded(float f) { return uint16_t((bits_of(f) + 0x7fff + (bits_of(f) >> 16 & 1)) >> 16); }

// Everything a product reads, each in a heap block of its own.
struct Case {
  paring_product p = {};
  paring_product_conv c = {};
  bool conv = false;
  std::vector<float> x, scale, y;
  std::vector<uint16_t> x16, y16, blocks;
  std::vector<int8_t> w;
  std::vector<double> wanted, norm;

  double x_at(int64_t i) const { return p.x_bf16 || p.round ? float_of(uint32_t(rounded(x[size_t(i)])) << 16) : x[size_t(i)]; }
  // Input k of row m; rows of a convolution are patches.
  double x_at(int64_t m, int64_t k) const {
    if (!conv) return x_at(m * p.x_row + k);
    int64_t tap = k / c.inputs, line = m / c.out_w % c.out_h * c.stride_h - c.pad_top + tap / c.kernel_w * c.dilation_h;
    int64_t column = m % c.out_w * c.stride_w - c.pad_left + tap % c.kernel_w * c.dilation_w;
    if (line < 0 || line >= c.h || column < 0 || column >= c.w) return 0;
    return x_at(((m / c.out_w / c.out_h * c.h + line) * c.w + column) * c.inputs + k % c.inputs);
  }
  double w_at(int64_t k, int64_t n) const {
    if (p.bits == 8) return w[size_t(p.transposed ? n * p.k + k : k * p.n + n)];
    int both = w[size_t(k / 2 * p.n + n)], code = k & 1 ? both >> 4 : int8_t(uint8_t(both) << 4) >> 4;
    // The scales are 1 and 2.
    return code * (p.block ? blocks[size_t(k / p.block * p.n + n)] == 0x3c00 ? 1 : 2 : 1);
  }

  void draw() {
    p.n = drawn(0, 3) ? drawn(1, 70) : drawn(0, 600);
    if (conv) {
      c.n = drawn(1, 2), c.h = drawn(1, 7), c.w = drawn(1, 7), c.inputs = drawn(1, 20), c.kernel_h = drawn(1, 3), c.kernel_w = drawn(1, 3);
      c.stride_h = drawn(1, 2), c.stride_w = drawn(1, 2), c.dilation_h = drawn(1, 2), c.dilation_w = drawn(1, 2);
      c.pad_top = drawn(0, 2), c.pad_left = drawn(0, 2), c.out_h = drawn(1, 5), c.out_w = drawn(1, 5);
      p.m = int64_t(c.n) * c.out_h * c.out_w, p.k = int64_t(c.kernel_h) * c.kernel_w * c.inputs;
      x.resize(size_t(c.n) * size_t(c.h) * size_t(c.w) * size_t(c.inputs));
    } else {
      p.m = drawn(0, 1) ? 1 : drawn(0, 40), p.k = drawn(0, 3) ? drawn(0, 80) : drawn(0, 600), p.x_row = p.k + drawn(0, 2);
      x.resize(size_t(p.m * p.x_row));
    }
    p.x_bf16 = drawn(0, 1), p.y_bf16 = drawn(0, 1), p.round = drawn(0, 1), p.bits = drawn(0, 1) ? 8 : 4;
    p.transposed = p.bits == 8 && !conv && drawn(0, 1), p.block = p.bits == 4 ? drawn(0, 1) ? 16 * drawn(0, 4) : drawn(0, 9) : 0, p.y_row = p.n + drawn(0, 2);
    for (float& v : x) v = real();
    for (float v : x) x16.push_back(rounded(v));
    w.resize(size_t((p.bits == 4 ? (p.k + 1) / 2 : p.k) * p.n));
    for (int8_t& v : w) v = int8_t(drawn(-128, 127));
    if (p.block) blocks.resize(size_t((p.k + p.block - 1) / p.block * p.n));
    for (uint16_t& v : blocks) v = drawn(0, 1) ? 0x3c00 : 0x4000;
    scale.resize(size_t(p.n));
    for (float& v : scale) v = real();
    y.resize(size_t(p.m ? (p.m - 1) * p.y_row + p.n : 0)), y16.resize(y.size());
    p.x = p.x_bf16 ? static_cast<const void*>(x16.data()) : x.data(), p.w = w.data(), p.scale = drawn(0, 1) ? scale.data() : nullptr;
    p.block_scale = p.block ? blocks.data() : nullptr, p.y = p.y_bf16 ? static_cast<void*>(y16.data()) : y.data();
    for (int64_t m = 0; m < p.m; m++)
      for (int64_t n = 0; n < p.n; n++) {
        double sum = 0, most = 0, s = p.scale ? scale[size_t(n)] : 1;
        for (int64_t k = 0; k < p.k; k++) sum += x_at(m, k) * w_at(k, n), most += std::fabs(x_at(m, k) * w_at(k, n));
        wanted.push_back(sum * s), norm.push_back(most * std::fabs(s));
      }
    c.p = p;
  }

  bool run(int threads) {
    if (conv ? paring_product_conv_run(&c, threads) : paring_product_run(&p, threads)) return false;
    for (int64_t m = 0, i = 0; m < p.m; m++)
      for (int64_t n = 0; n < p.n; n++, i++) {
        size_t at = size_t(m * p.y_row + n);
        double found = p.y_bf16 ? float_of(uint32_t(y16[at]) << 16) : y[at], difference = std::fabs(found - wanted[size_t(i)]);
        if (!(difference <= 3e-6 * norm[size_t(i)] + (p.y_bf16 ? std::fabs(wanted[size_t(i)]) / 256 : 0))) {
          std::fprintf(stderr, "%s %s: m %d k %d n %d bits %d block %d transposed %d round %d: [%d][%d] is %g, not %g\n", paring_isa(), conv ? "conv" : "product",
                       int(p.m), int(p.k), int(p.n), p.bits, int(p.block), p.transposed, p.round, int(m), int(n), found, wanted[size_t(i)]);
          return false;
        }
      }
    return true;
  }
};

}  // namespace

int main() {
  int failures = 0;
  for (int i = 0; i < 400; i++) {
    Case one;
    one.conv = i % 3 == 0;
    one.draw();
    for (int isa = 0; isa < paring::isa_count; isa++)
      if (paring::set_isa(paring::Isa(isa))) failures += !one.run(drawn(1, 3));
  }
  // Several callers at once, each with threads of the one pool.
  std::vector<Case> many(8);
  std::vector<int> wrong(many.size());
  for (Case& one : many) one.draw();
  std::vector<std::thread> callers;
  for (size_t i = 0; i < many.size(); i++)
    callers.emplace_back([&, i] { for (int r = 0; r < 20; r++) wrong[i] += !many[i].run(2); });
  for (std::thread& t : callers) t.join();
  for (int w : wrong) failures += w;
  if (failures) std::fprintf(stderr, "%d failures\n", failures);
  return failures ? 1 : 0;
}
