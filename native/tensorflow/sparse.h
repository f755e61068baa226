// Sparse layers packed for the kernels of core/: made once from a tensor of packed weights, kept as long as that tensor
// lives, run by any number of threads.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "call.h"
#include "packed.h"
#include "paring.h"

namespace paring {
namespace tensorflow {

// How a layer meets its input; of a matrix all strides are 1.
struct Geometry {
  int32_t stride_h = 1, stride_w = 1, dilation_h = 1, dilation_w = 1;
  int32_t same = 0;
  bool operator==(const Geometry& o) const {
    return stride_h == o.stride_h && stride_w == o.stride_w && dilation_h == o.dilation_h && dilation_w == o.dilation_w && same == o.same;
  }
};

// A layer bound to an input shape, for one run at a time, with room for its input and result where those need converting.
struct Plan {
  int32_t n, h, w, threads;
  paring_plan* plan = nullptr;
  std::vector<float> x, y;
  ~Plan() { if (plan) paring_plan_delete(plan); }
};

class Layer {
 public:
  Layer(Tensor packed, const Blob&, const Geometry&, bool dynamic, int64_t positions);
  ~Layer() { paring_layer_delete(layer_); }

  // Gives a plan to one caller; `give_back` lets others have it. Fails where memory runs out.
  std::unique_ptr<Plan> take(int32_t n, int32_t h, int32_t w, int32_t threads);
  void give_back(std::unique_ptr<Plan>);

 private:
  friend class Layers;
  Tensor packed_;                 // its bytes stay where they are, and nobody else's can come to lie there
  const void* data_;
  uint64_t print_;
  Geometry geometry_;
  bool dynamic_, few_;
  paring_layer* layer_ = nullptr;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Plan>> idle_;   // the last one used at the end
};

// The layers of one node of a graph: usually one. Nodes that read the same tensor in the same way share it.
class Layers {
 public:
  // `positions`: rows or output pixels of this run.
  std::shared_ptr<Layer> find(Tensor& packed, int64_t bytes, const Blob&, const Geometry&, bool dynamic, int64_t positions);

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<Layer>> mine_;
};

}  // namespace tensorflow
}  // namespace paring
