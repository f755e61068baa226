// The C API of paring's sparse kernels: pack a layer's weights, bind it to an input shape, run it.
// Plain data in and out; nothing throws across it. Activations are NHWC, weights OHWI; a dense layer of n rows is a
// 1x1 convolution of an n x 1 x 1 image. Sizes are in elements unless a name says bytes.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define PARING_API __declspec(dllexport)
#else
#define PARING_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// f32: everything float32. s8: int8 activations and weights, int32 bias, requantized in float as XNNPACK does.
// qd8: float activations, quantized per row when they arrive (asymmetric, as XNNPACK does), int8 weights, float bias.
enum paring_type { PARING_F32 = 0, PARING_S8 = 1, PARING_QD8 = 2 };

typedef struct paring_conv {
  int32_t type;                          // paring_type
  int32_t outputs, kernel_h, kernel_w, inputs;
  int32_t stride_h, stride_w, dilation_h, dilation_w;
  int32_t same;                          // 1: SAME padding, 0: VALID
  const void* weights;                   // [outputs][kernel_h][kernel_w][inputs], float or int8
  const void* bias;                      // [outputs], float (f32, qd8) or int32 (s8); may be null
  const float* weight_scale;             // s8, qd8: [weight_scales]
  int32_t weight_scales;                 // 1 or outputs
  float x_scale, y_scale;                // s8
  int32_t x_zero, y_zero;                // s8
  float low, high;                       // fused activation: bounds of the result, in real numbers; +-infinity for none
} paring_conv;

typedef struct paring_layer paring_layer;  // packed weights; may be run by many plans at once
typedef struct paring_plan paring_plan;    // a layer bound to an input shape, with its working memory; one run at a time

typedef struct paring_layer_info {
  const char* kernel;      // name of the row of the kernel table
  int32_t block_outputs, block_inputs;
  int64_t nonzeros;        // weights that are not zero
  int64_t stored;          // weights that the kernel reads, with the zeros inside blocks
  int64_t bytes;           // of the packed layer
} paring_layer_info;

// Packs with the named kernel, or with the one that is expected to run fastest where `kernel` is null (`positions`:
// output pixels or rows of the runs to expect, `threads` of them at once). Returns null and writes why into `message`.
PARING_API paring_layer* paring_pack(const paring_conv*, const char* kernel, int64_t positions, char* message, size_t length);
PARING_API void paring_layer_delete(paring_layer*);
PARING_API paring_layer_info paring_layer_describe(const paring_layer*);

// Null where memory ran out or the shape cannot be (an output without elements).
PARING_API paring_plan* paring_plan_new(const paring_layer*, int32_t n, int32_t h, int32_t w, int32_t threads);
PARING_API void paring_plan_delete(paring_plan*);
PARING_API void paring_run(paring_plan*, const void* x, void* y);
PARING_API void paring_output_shape(const paring_conv*, int32_t h, int32_t w, int32_t* out_h, int32_t* out_w);

// The kernel table: rows that this machine can run under the instruction set in force; `index` from 0, false at the end.
typedef struct paring_kernel_info {
  const char* name;
  const char* isa;         // portable, avx2, avx2vnni, avx512, avx512vnni
  int32_t type, block_outputs, block_inputs;
} paring_kernel_info;
PARING_API int paring_kernel(int index, paring_kernel_info*);

// The instruction set in force: the best that machine and build have, or what PARING_ISA or paring_set_isa names.
// Unknown or unavailable names leave it as it is and return 0.
PARING_API const char* paring_isa(void);
PARING_API int paring_set_isa(const char* name);

// Expected seconds of one run (see cost.h), and of the same layer run dense by a good library.
PARING_API double paring_estimate(const paring_layer*, int32_t n, int32_t h, int32_t w, int32_t threads);
PARING_API double paring_estimate_dense(const paring_conv*, int32_t n, int32_t h, int32_t w, int32_t threads);

#ifdef __cplusplus
}
#endif
