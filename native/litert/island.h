// Connected operators whose values stay in planes of pixels between them: one Region of the core.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "../core/region.h"
#include "operator.h"

namespace paring {
namespace litert {

class Island {
 public:
  // `ops` in an order in which they can run. What of their results `leaves` (tensors) is written as NHWC. Null and a reason
  // where the region refuses.
  static std::unique_ptr<Island> build(const std::vector<const Operator*>& ops, const std::vector<int>& leaves, std::string* reason);

  const std::vector<int>& inputs() const { return inputs_; }     // tensors
  const std::vector<int>& outputs() const { return outputs_; }
  const std::vector<int>& positions() const { return positions_; }

  // Binds to the shapes of the inputs; those of the outputs come back.
  bool prepare(const std::vector<std::vector<int>>& inputs, int threads, std::vector<std::vector<int>>* outputs, std::string* reason);
  void run(const void* const* inputs, void* const* outputs) const;
  double estimate() const { return region_->estimate(); }

 private:
  std::unique_ptr<Region> region_;
  std::vector<int> inputs_, outputs_, positions_;
  bool empty_ = false;
};

}  // namespace litert
}  // namespace paring
