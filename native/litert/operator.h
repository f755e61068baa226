// What a node computes, in the terms of the kernels: a product with constant weights, or what may stand between two in a
// region of planes.
#pragma once
#include <string>
#include <vector>

#include "../core/paring.h"
#include "graph.h"
#include "weights.h"

namespace paring {
namespace litert {

struct Operator {
  enum class Kind { product, depthwise, add, pad };
  enum class Form { image, rows, matrices };   // of a product: CONV_2D, FULLY_CONNECTED, BATCH_MATMUL

  Kind kind = Kind::product;
  Form form = Form::image;
  int position = -1;
  int x = -1, x2 = -1, y = -1;        // tensors; x2 of an ADD only
  paring_conv conv = {};              // product, depthwise; points into the constants
  Constant weights, bias;
  std::vector<int> helpers;           // positions of what unpacks the constants
  std::vector<float> scale;           // what conv.weight_scale points to
  double zeros = 0;                   // share, of the weights of a product
  bool keep_dims = false;             // rows: the result has the rank of x
  std::vector<int> batch;             // matrices: dimensions of the constant ahead of its matrix
  int before_h = 0, after_h = 0, before_w = 0, after_w = 0;   // pad
  float low = 0, high = 0;            // add: its activation

  Operator() = default;
  Operator(Operator&&) = default;               // `conv` points into the vectors, which keep their memory when moved
  Operator& operator=(Operator&&) = default;

  int64_t matrices() const { return elements_of(batch); }
  // The constants are not needed any more: packing took what it wanted.
  void drop_constants();
};

// A product as the kernels see it at given shapes: n images of h x w.
struct Geometry { std::vector<int> y; int n = 0, h = 0, w = 0; };

// Shape of the result. False and a reason where the inputs do not fit.
bool shape(const Operator&, const std::vector<int>& x, const std::vector<int>& x2, Geometry*, std::string* reason);

enum class Verdict {
  other,        // no operator that we know
  not_taken,    // one that we know, with a reason to leave it alone
  taken,
};

// Reads a node. Weights with fewer zeros than `threshold` are a reason to leave a product alone, found on a sample first.
Verdict recognize(const Graph&, int position, double threshold, Operator*, std::string* reason);

const char* operator_name(int code);
const char* type_name(const Operator&);

}  // namespace litert
}  // namespace paring
