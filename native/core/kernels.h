// What passes between packing, planning and the inner kernels of the NHWC family ("rows": vector lanes are output
// channels, so LiteRT's own layout is read and written as it is). One table row per kernel; the rows of each instruction
// set come from rows_f32.cc and rows_int8.cc, compiled once per target. Plain data only: see simd.h on why.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu.h"
#include "paring.h"

namespace paring {

// Weights as blocks of R outputs x I inputs of one tap. Blocks of group g (R outputs) in pass c (a range of input
// channels whose part of a tile stays in L1): [start[c * groups + g], start[c * groups + g + 1]).
struct Packed {
  int32_t outputs, groups, passes;
  const uint32_t* start;
  const void* value;         // blocks, in the order that the kernel wants (Kernel::order)
  const void* bias;          // [groups * R] float, or int32 with zero points folded in
  const float* scale;        // [groups * R]; s8: x_scale * w_scale / y_scale, qd8: w_scale
  const int32_t* sum;        // qd8: [groups * R], sum of a row's weights
  float low, high;           // f32, qd8
  int32_t zero, least, greatest;  // s8: output zero point, bounds
  int32_t small;             // s8: every scale is below 1, so that no product overflows
};

// R x C output pixels in R lines of an image (C neighbours each), for groups [first, last).
struct Tile {
  const char* x; ptrdiff_t step, line;      // input: bytes between pixels and between lines of pixels
  char* y; ptrdiff_t y_step, y_line;        // output alike
  const Packed* w;
  const void* entry;                        // offset of each block from the pixel: uint16 in units, or int32 in bytes
  int32_t first, last;
  const float* inverse; const int32_t* zero;  // qd8: of each pixel: 1 / scale and the zero point
  ptrdiff_t quant_line;                     // qd8: pixels between lines
  const char* ahead; int32_t ahead_bytes;   // input of the next tile, to be prefetched
};
using TileFn = void (*)(const Tile&);

enum class Order : int {
  plain,      // f32: R floats
  dot4,       // int8: R x 4, inputs innermost (vpdpbusd)
  dot2        // int8: two halves of R x 2 inputs (vpmaddwd on 16 bits)
};

constexpr int most_lines = 4, most_columns = 28;

struct Kernel {
  const char* name;
  Isa isa;
  int type, outputs, inputs;       // of a block
  Order order;
  int unit;                        // bytes of activation that a block's inputs take: what an entry counts
  int pixels;                      // at most in a tile
  // tiles[wide][lines - 1][columns - 1]; null where there is none. wide: entries are int32.
  const TileFn (*tiles)[most_lines][most_columns];
  // s8, qd8: signed bytes (n of them, padded to a multiple of 4) to what the kernel reads.
  void (*widen)(const int8_t* x, int n, void* out);
  // qd8: a row of floats to what the kernel reads; gives 1 / scale and zero point.
  void (*quantize)(const float* x, int64_t n, void* out, float* inverse, int32_t* zero);
};

// The rows of one target. Dot products change nothing for float32: the VNNI targets have the float kernels of their base.
struct KernelList { const Kernel* rows; int count; };
namespace portable { KernelList rows_f32(); KernelList rows_int8(); }
namespace avx2 { KernelList rows_f32(); KernelList rows_int8(); }
namespace avx2vnni { KernelList rows_int8(); }
namespace avx512 { KernelList rows_f32(); KernelList rows_int8(); }
namespace avx512vnni { KernelList rows_int8(); }

// Row `index` of the table for an instruction set, null at the end.
const Kernel* kernel_of(Isa, int index);

}  // namespace paring
