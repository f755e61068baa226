// A short look at what a claim really takes.
#pragma once
#include <set>
#include <string>

#include "island.h"
#include "product.h"

namespace paring {
namespace litert {

// Runs claims on made-up activations, as long as a few milliseconds per model last. In one thread and in its own time, which
// neighbours on the machine do not lengthen: what is measured must have been prepared for one thread.
class Stopwatch {
 public:
  // Seconds of one run, the best of a few; 0 where there is no time left for it, or its like was measured before.
  // `expected`: seconds.
  double product(const Product&, const Geometry&, double expected);
  double island(const Island&, const std::vector<std::vector<int>>& inputs, const std::vector<std::vector<int>>& outputs, double expected);

 private:
  template <class Run> double best(double expected, Run run);

  double left_ = 1e-2;
  std::set<std::string> seen_;
};

}  // namespace litert
}  // namespace paring
