// Products of float32 or bfloat16 activations with dense int8 or int4 weights, in the layout in which TensorFlow stores them:
// nothing is packed, weights are converted where they are used. Plain data in and out; nothing throws across it.
//
//   y[m][n] = scale[n] * sum_k x[m][k] * w[k][n]
//   in blocks: scale[n] * sum over blocks b of s[b][n] * sum over the block's k of x[m][k] * w[k][n]
//
// Sums are float32 in an order that does not depend on the number of threads. Numbers below the least normal one count as
// zero. NaN and infinities of x go through as in the plain loop. Pointers need the alignment of their elements only.
#pragma once
#include "paring.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct paring_product {
  int64_t m, k, n;
  const void* x;                // [m] rows, `x_row` elements apart; float, or bfloat16 bits where x_bf16
  int64_t x_row;
  int32_t x_bf16;
  int32_t round;                // 1: a float x is rounded to bfloat16 (nearest, ties to even; NaN stays NaN)
  const void* w;                // int8 [k][n], or [n][k] where transposed; 4 bits: [ceil(k/2)][n], even k in the low nibble
  int32_t bits;                 // 8 or 4
  int32_t transposed;           // 8 bits only
  const uint16_t* block_scale;  // 4 bits: float16 [ceil(k/block)][n]; null for none
  int64_t block;                // inputs per block; 0 for none
  const float* scale;           // [n]; null for ones
  void* y;                      // [m] rows, `y_row` elements apart; float, or bfloat16 where y_bf16
  int64_t y_row;
  int32_t y_bf16;
} paring_product;

// A convolution, NHWC x HWIO, without unrolling the whole input: rows of x are the patches of output pixels, k counts
// (kernel line, kernel column, input), n outputs. p.m, p.k, p.x_row are not read; y_row is the distance of output pixels.
typedef struct paring_product_conv {
  paring_product p;
  int32_t n, h, w, inputs, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left, out_h, out_w;
} paring_product_conv;

// In at most `threads` threads of the pool, the caller's among them; may be called by several threads at once. Working memory
// is small (below 1 MB a thread, and a copy of x where m is 1) and kept by each thread. 0 on success, 1 where memory ran out.
PARING_API int paring_product_run(const paring_product*, int32_t threads);
PARING_API int paring_product_conv_run(const paring_product_conv*, int32_t threads);

#ifdef __cplusplus
}
#endif
