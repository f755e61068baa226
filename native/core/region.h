// A run of connected operators whose values stay in planes of pixels: layouts are converted at its borders only.
// What the delegate hands over where weights have zeros in no pattern (or 4 outputs wide), for which lanes are pixels.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "paring.h"

namespace paring {

struct RegionOp {
  enum class Kind { conv, depthwise, add, pad };
  Kind kind;
  int x, x2;          // values that it reads; x2 for add only, else -1
  int y;              // the value that it makes
  paring_conv conv;   // conv and depthwise (weights [1][kh][kw][channels], outputs == inputs, depth multiplier 1)
  int before_h, after_h, before_w, after_w;  // pad: zeros around the image
  float low, high;    // add: its activation
};

struct Shape { int n, h, w, c; };

class Region {
 public:
  // Packs the weights, which are not needed afterwards. `inputs` and `outputs` are value numbers: what comes and leaves as
  // NHWC; an output may be read inside, too. Null and a message where an operator is not supported.
  static Region* create(const std::vector<RegionOp>& ops, const std::vector<int>& inputs, const std::vector<int>& outputs, std::string* message);
  virtual ~Region() = default;
  // Binds to shapes of the inputs and allocates; may be called again with others. Shapes of the outputs come back.
  virtual bool prepare(const std::vector<Shape>& inputs, int threads, std::vector<Shape>* outputs, std::string* message) = 0;
  virtual void run(const void* const* inputs, void* const* outputs) = 0;   // one at a time; `prepare` came before
  // Expected seconds of one run behind `prepare`, conversions included.
  virtual double estimate() const = 0;
};

}  // namespace paring
