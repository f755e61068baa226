// The four operators as TensorFlow runs them: attributes once, then shapes, checks and a kernel of core/ for every call.
#pragma once
#include <atomic>
#include <cstdint>

#include "call.h"
#include "dense.h"
#include "sparse.h"

namespace paring {
namespace tensorflow {

enum class Form { matmul, conv, packed_matmul, packed_conv };

class Product {
 public:
  Product(TF_OpKernelConstruction*, Form);
  void run(TF_OpKernelContext*);

 private:
  enum class Padding { same, valid, explicit_sizes };
  // A convolution's window over one input, and what it gives.
  struct Window {
    int32_t images, h, w, channels, kernel_h, kernel_w, top, bottom, left, right, out_h, out_w;
  };
  // The inputs and the output of one call.
  struct Call {
    Tensor x, weights, scale, y;
    Shape x_shape, w_shape;
    const float* scales = nullptr;   // [outputs]
    int threads;
  };

  void matmul(TF_OpKernelContext*, Call&) const;
  void conv(TF_OpKernelContext*, Call&) const;
  void packed(TF_OpKernelContext*, Call&);
  void sparse(Call&, const Blob&, const Window&);

  Window window(const Shape& x, int64_t kernel_h, int64_t kernel_w, int64_t inputs) const;
  paring_product product(const Call&, int64_t outputs) const;
  void run_conv(const paring_product&, const Window&, int threads) const;
  void on_large_pages(const Tensor& weights);

  Form form_;
  int type_ = float32;
  bool round_ = false, transpose_ = false, dynamic_ = false;
  Padding padding_ = Padding::valid;
  int32_t stride_[2] = {1, 1}, dilation_[2] = {1, 1};
  int64_t pad_[4] = {};            // top, bottom, left, right, where explicit
  std::atomic<int> threads_{0};    // as configured; 0 as long as nobody could be asked
  std::atomic<const void*> paged_{nullptr};   // the weights that were put on large pages
  Layers layers_;
};

}  // namespace tensorflow
}  // namespace paring
