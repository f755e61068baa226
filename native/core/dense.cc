#include "dense.h"

#include <cmath>
#include <cstring>

#include "pool.h"

namespace {

float from_bits(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
uint32_t to_bits(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }
uint16_t to_bfloat16(float f) {
  uint32_t b = to_bits(f);
  if ((b & 0x7fffffff) > 0x7f800000) return uint16_t(b >> 16 | 0x40);
  return uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
float from_half(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}
float x_at(const paring_product& p, int64_t i) {
  if (p.x_bf16) return from_bits(uint32_t(static_cast<const uint16_t*>(p.x)[i]) << 16);
  float x = static_cast<const float*>(p.x)[i];
  return p.round ? from_bits(uint32_t(to_bfloat16(x)) << 16) : x;
}
int w_at(const paring_product& p, int64_t k, int64_t n, int64_t depth) {
  if (p.bits == 8) return static_cast<const int8_t*>(p.w)[p.transposed ? n * depth + k : k * p.n + n];
  int both = static_cast<const int8_t*>(p.w)[k / 2 * p.n + n];
  return k & 1 ? both >> 4 : int8_t(both << 4) >> 4;
}
template <class Row> void plain(const paring_product& p, int64_t m, int64_t depth, int threads, Row x) {
  paring::parallel_for(threads, int(m), [&](int i) {
    for (int64_t n = 0; n < p.n; n++) {
      float sum = 0;
      for (int64_t k = 0; k < depth;) {
        float part = 0;
        int64_t from = k, end = p.block && k + p.block < depth ? k + p.block : depth;
        for (; k < end; k++) part += x(i, k) * float(w_at(p, k, n, depth));
        sum += p.block_scale ? part * from_half(p.block_scale[from / p.block * p.n + n]) : part;
      }
      sum *= p.scale ? p.scale[n] : 1;
      if (p.y_bf16) static_cast<uint16_t*>(p.y)[i * p.y_row + n] = to_bfloat16(sum);
      else static_cast<float*>(p.y)[i * p.y_row + n] = sum;
    }
  });
}

}  // namespace

int paring_product_run(const paring_product* p, int32_t threads) {
  plain(*p, p->m, p->k, threads, [p](int64_t m, int64_t k) { return x_at(*p, m * p->x_row + k); });
  return 0;
}

int paring_product_conv_run(const paring_product_conv* c, int32_t threads) {
  const paring_product& p = c->p;
  plain(p, int64_t(c->n) * c->out_h * c->out_w, int64_t(c->kernel_h) * c->kernel_w * c->inputs, threads, [c, &p](int64_t m, int64_t k) {
    int64_t tap = k / c->inputs, image = m / c->out_w / c->out_h;
    int64_t line = m / c->out_w % c->out_h * c->stride_h - c->pad_top + tap / c->kernel_w * c->dilation_h;
    int64_t column = m % c->out_w * c->stride_w - c->pad_left + tap % c->kernel_w * c->dilation_w;
    if (line < 0 || line >= c->h || column < 0 || column >= c->w) return 0.0f;
    return x_at(p, ((image * c->h + line) * c->w + column) * c->inputs + k % c->inputs);
  });
  return 0;
}
