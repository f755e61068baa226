// A product with constant weights, packed, and run by itself on NHWC activations.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "operator.h"

namespace paring {
namespace litert {

struct LayerDelete { void operator()(paring_layer* p) const { paring_layer_delete(p); } };
struct PlanDelete { void operator()(paring_plan* p) const { paring_plan_delete(p); } };

class Product {
 public:
  // Packs the weights with the kernel that fits them best; null and a reason where there is none.
  static std::unique_ptr<Product> pack(Operator op, const Geometry&, std::string* reason);

  const Operator& op() const { return op_; }
  Operator& op() { return op_; }
  paring_layer_info info() const { return paring_layer_describe(layers_[0].get()); }
  double estimate(const Geometry&, int threads) const;   // seconds of one run

  // Binds to shapes; may be called again with others.
  bool prepare(const Geometry&, int threads, std::string* reason);
  void run(const void* x, void* y) const;

 private:
  Operator op_;
  std::vector<std::unique_ptr<paring_layer, LayerDelete>> layers_;   // one per matrix of the constant
  std::vector<std::unique_ptr<paring_plan, PlanDelete>> plans_;      // alike; none where there is nothing to compute
  size_t x_bytes_ = 0, y_bytes_ = 0;                                 // of one matrix
};

// Seconds of the same product run dense by a good library.
double estimate_dense(const Operator&, const Geometry&, int threads);

}  // namespace litert
}  // namespace paring
