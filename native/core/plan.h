// A layer bound to an input shape.
#pragma once
#include <vector>

#include "layer.h"

struct paring_plan {
  const paring_layer* layer;
  int n, h, w, out_h, out_w, threads;
  int pad_top, pad_left;
  int padded_h, padded_w;              // of the copy with its border; 0 where the input is read as it is
  struct Part { int32_t image, line, column, lines, columns, first, last; };   // a task: a tile, and groups [first, last)
  std::vector<Part> parts;
  bool flat = false;                   // 1x1, stride 1: all pixels are one line
  bool wide = false;
  const void* entry = nullptr;
  std::vector<int32_t> entry32;
  paring::Memory copy;                 // padded, widened or quantized input
  size_t copy_image = 0;               // bytes of one image in it
  paring::Memory quantized;            // qd8: what a padded copy is made of
  size_t pixel = 0;                    // bytes of a pixel as the kernel reads it
  size_t apart = 0;                    // bytes from one to the next
  std::vector<float> inverse;          // qd8: of each image (a dense layer: of each row)
  std::vector<int32_t> zero;
  std::vector<float> pixel_inverse;    // of each pixel of a tile's reach, where an image has several
  std::vector<int32_t> pixel_zero;
  bool local = false;                  // 1x1: every task widens (s8) or spreads (f32) its own pixels
};
