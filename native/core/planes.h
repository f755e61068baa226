// Kernels on planes of pixels: one table per instruction set, one row per kind of work. A tile is some vectors of
// neighbouring pixels in every channel; a tap is a constant distance from a pixel, so a kernel knows nothing of images.
#pragma once
#include <cstddef>
#include <cstdint>

namespace paring {

// A group of outputs and where its blocks end; they begin where those of the group before it end.
struct PlaneGroup { int32_t output, end; };

// Sparse convolution with stride 1. Blocks are `rows` outputs x 1 (input, tap): `rows` values and one distance each.
struct PlaneConv {
  const int32_t* offsets;       // bytes from a pixel of channel 0 to the one that the block reads
  const float* values;
  const PlaneGroup* groups;     // [passes][group_count]; a pass adds the input channels that fit the nearest cache
  int passes, group_count;
  const float* bias;            // by output, padded to whole groups
  float low, high;
  const float* x;               // the first pixel of the tile in channel 0
  float* y;
  size_t y_stride;              // floats from channel to channel
  const float* mask;            // all bits set where a pixel is, none in the gaps; null where gaps need not be zero
  // Where not null: what `offsets` would read is first copied side by side, pass by pass, for lines that straddle two cache
  // lines take half as long again. Bytes from a pixel for each (input, tap), where each pass ends, and room for one pass.
  const int32_t* sources;
  const int32_t* source_ends;
  float* copies;
  size_t copy_stride;           // floats
  const float* start;           // what sums begin with besides the bias: an addition that follows; or null
  size_t start_stride;
  bool far;                     // y lies outside of the nearer caches: stores to many places would wait for one another
};

// A part of a row where output pixels are not input pixels: floats from a channel's first pixel of x and from the tile's
// of y; zeros, then pixels, then zeros.
struct PlaneRow { int32_t x, y, before, pixels, after; };

struct PlaneDepthwise {
  const float* x; size_t x_stride;
  float* y; size_t y_stride;
  const int32_t* offsets;       // [taps], bytes
  const float* weights;         // [channels][taps]
  const float* bias;            // [channels]
  const float* mask;
  int taps, first, last;        // channels first .. last - 1
  float low, high;
  const PlaneRow* rows;         // with a stride: the rows of the tile, for then x is the plane and not the tile; else null
  int row_count, stride;
};

struct PlaneAdd {
  const float *a, *b; size_t a_stride, b_stride;
  float* y; size_t y_stride;
  const float* mask;
  int first, last;
  float low, high;
};

struct PlaneKernels {
  int width;                    // pixels in a vector
  int block_vectors, line_vectors;   // most vectors that `conv4` and `conv1` hold in registers at a time
  void (*conv4)(const PlaneConv&, int vectors);   // 4 outputs x 1 (input, tap)
  void (*conv1)(const PlaneConv&, int vectors);   // no pattern
  void (*depthwise)(const PlaneDepthwise&, int vectors);
  void (*add)(const PlaneAdd&, int vectors);
  // Between rows of `channels` floats and planes; pixel[i] is the row that belongs to pixel i, -1 in a gap (zeros).
  void (*to_planes)(const float* rows, const int32_t* pixel, int channels, int first, int last, float* planes, size_t stride, int vectors);
  void (*from_planes)(const float* planes, size_t stride, const int32_t* pixel, int channels, int first, int last, float* rows, int vectors);
  void (*sample)(const float* x, size_t x_stride, float* y, size_t y_stride, const PlaneRow* rows, int row_count, int first, int last, int stride,
                 int vectors);
};

extern const PlaneKernels planes_portable, planes_avx2, planes_avx512;

// The table of the instruction set in force.
const PlaneKernels& plane_kernels();

}  // namespace paring
