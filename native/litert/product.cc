#include "product.h"

#include <cstring>

#include "text.h"

namespace paring {
namespace litert {
namespace {

size_t element(const Operator& op) { return op.conv.type == PARING_S8 ? 1 : 4; }

}  // namespace

std::unique_ptr<Product> Product::pack(Operator op, const Geometry& g, std::string* reason) {
  std::unique_ptr<Product> p(new Product);
  const paring_conv& c = op.conv;
  int64_t size = int64_t(c.outputs) * c.kernel_h * c.kernel_w * c.inputs * int64_t(op.conv.type == PARING_F32 ? 4 : 1);
  int64_t positions = elements_of(g.y) / c.outputs / op.matrices();
  for (int64_t m = 0; m < op.matrices(); m++) {
    paring_conv one = c;
    one.weights = static_cast<const char*>(c.weights) + m * size;
    char message[256] = "";
    paring_layer* layer = paring_pack(&one, nullptr, positions, message, sizeof message);
    if (!layer) {
      *reason = message;
      return nullptr;
    }
    p->layers_.emplace_back(layer);
  }
  p->op_ = std::move(op);
  return p;
}

double Product::estimate(const Geometry& g, int threads) const {
  double seconds = 0;
  for (const auto& layer : layers_) seconds += paring_estimate(layer.get(), g.n, g.h, g.w, threads);
  return seconds;
}

bool Product::prepare(const Geometry& g, int threads, std::string* reason) {
  plans_.clear();
  if (elements_of(g.y) == 0) return true;   // a batch of nothing
  for (const auto& layer : layers_) {
    paring_plan* plan = paring_plan_new(layer.get(), g.n, g.h, g.w, threads);
    if (!plan) {
      *reason = text("expected room for the working memory of %d x %d x %d, got none", g.n, g.h, g.w);
      return false;
    }
    plans_.emplace_back(plan);
  }
  x_bytes_ = size_t(g.n) * size_t(g.h) * size_t(g.w) * size_t(op_.conv.inputs) * element(op_);
  y_bytes_ = size_t(elements_of(g.y)) / plans_.size() * element(op_);
  return true;
}

void Product::run(const void* x, void* y) const {
  for (size_t m = 0; m < plans_.size(); m++)
    paring_run(plans_[m].get(), static_cast<const char*>(x) + m * x_bytes_, static_cast<char*>(y) + m * y_bytes_);
}

double estimate_dense(const Operator& op, const Geometry& g, int threads) {
  return double(op.matrices()) * paring_estimate_dense(&op.conv, g.n, g.h, g.w, threads);
}

}  // namespace litert
}  // namespace paring
