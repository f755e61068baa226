#include "sparse.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace paring {
namespace tensorflow {
namespace {

constexpr size_t most_idle = 8;       // plans of one layer that wait: input shapes that come and go
constexpr int64_t few_positions = 4;  // up to here other kernels are fastest

// Tells contents apart that were written into the same bytes, as TensorFlow 1's reference variables do: a hash of the header
// and of 64 places. Other weights differ nearly everywhere.
uint64_t fingerprint(const void* data, int64_t bytes) {
  constexpr int64_t places = 64, word = 8;
  const char* at = static_cast<const char*>(data);
  uint64_t hash = uint64_t(bytes);
  auto add = [&](int64_t offset) {
    uint64_t value;
    std::memcpy(&value, at + offset, word);
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  };
  for (int64_t i = 0; i < 64; i += word) add(i);
  for (int64_t i = 1; i <= places; i++) add((bytes - word) / places * i);
  return hash;
}

// Layers of all nodes, so that two that read one tensor share what is made of it. Never destroyed: threads of TensorFlow's may
// outlive static objects.
struct All {
  std::mutex mutex;
  std::vector<std::weak_ptr<Layer>> layers;
};
All& all() {
  static All* const made = new All;
  return *made;
}

}  // namespace

Layer::Layer(Tensor packed, const Blob& blob, const Geometry& g, bool dynamic, int64_t positions)
    : packed_(std::move(packed)), data_(packed_.data()), geometry_(g), dynamic_(dynamic), few_(positions <= few_positions) {
  paring_conv c = {};
  c.type = dynamic ? PARING_QD8 : PARING_F32;
  c.outputs = blob.outputs;
  c.kernel_h = blob.kernel_h;
  c.kernel_w = blob.kernel_w;
  c.inputs = blob.inputs;
  c.stride_h = g.stride_h;
  c.stride_w = g.stride_w;
  c.dilation_h = g.dilation_h;
  c.dilation_w = g.dilation_w;
  c.same = g.same;
  c.low = -std::numeric_limits<float>::infinity();
  c.high = std::numeric_limits<float>::infinity();
  // The scale is an input of its own, and is multiplied to the result.
  const float one = 1;
  c.weight_scale = &one;
  c.weight_scales = 1;
  char why[256] = "";
  if (dynamic) {
    std::vector<int8_t> weights = expand_int8(blob);
    c.weights = weights.data();
    layer_ = paring_pack(&c, nullptr, positions, why, sizeof why);
  } else {
    std::vector<float> weights = expand_floats(blob);
    c.weights = weights.data();
    layer_ = paring_pack(&c, nullptr, positions, why, sizeof why);
  }
  if (!layer_) fail(invalid_argument, "packed: expected weights that the sparse kernels take, got %s", why);
}

std::unique_ptr<Plan> Layer::take(int32_t n, int32_t h, int32_t w, int32_t threads) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = idle_.size(); i-- > 0;) {
      const Plan& p = *idle_[i];
      if (p.n != n || p.h != h || p.w != w || p.threads != threads) continue;
      std::unique_ptr<Plan> found = std::move(idle_[i]);
      idle_.erase(idle_.begin() + int64_t(i));
      return found;
    }
  }
  std::unique_ptr<Plan> made(new Plan{n, h, w, threads, nullptr, {}, {}});
  made->plan = paring_plan_new(layer_, n, h, w, threads);
  if (!made->plan) fail(resource_exhausted, "expected working memory for %d x %d x %d positions, got none", int(n), int(h), int(w));
  return made;
}

void Layer::give_back(std::unique_ptr<Plan> plan) {
  std::unique_ptr<Plan> oldest;   // goes outside the lock
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(plan));
  if (idle_.size() <= most_idle) return;
  oldest = std::move(idle_.front());
  idle_.erase(idle_.begin());
}

std::shared_ptr<Layer> Layers::find(Tensor& packed, int64_t bytes, const Blob& blob, const Geometry& g, bool dynamic, int64_t positions) {
  const void* data = packed.data();
  uint64_t print = fingerprint(data, bytes);
  bool few = positions <= few_positions;
  auto fits = [&](const Layer& l) { return l.data_ == data && l.print_ == print && l.dynamic_ == dynamic && l.few_ == few && l.geometry_ == g; };
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& l : mine_)
    if (fits(*l)) return l;
  All& others = all();
  std::lock_guard<std::mutex> one_packs(others.mutex);
  // Something is new, so something may be over: what was packed from bytes that were written over, or that only a layer keeps.
  mine_.erase(std::remove_if(mine_.begin(), mine_.end(), [&](const std::shared_ptr<Layer>& l) {
    return (l->data_ == data && l->print_ != print) || l->packed_.alone();
  }), mine_.end());
  std::shared_ptr<Layer> found;
  auto& layers = others.layers;
  layers.erase(std::remove_if(layers.begin(), layers.end(), [](const std::weak_ptr<Layer>& l) { return l.expired(); }), layers.end());
  for (const auto& weak : layers)
    if (auto l = weak.lock(); l && fits(*l)) found = l;
  if (!found) {
    found = std::make_shared<Layer>(std::move(packed), blob, g, dynamic, positions);
    found->print_ = print;
    layers.push_back(found);
  }
  mine_.push_back(found);
  return found;
}

}  // namespace tensorflow
}  // namespace paring
