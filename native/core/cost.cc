#include "cost.h"

#include <cstring>

#include "layer.h"

namespace paring {

Choice choose(const paring_conv& c, const char* name, int64_t positions) {
  bool point = c.kernel_h == 1 && c.kernel_w == 1 && c.stride_h == 1 && c.stride_w == 1;
  const Kernel* best = nullptr;
  double least = 0;
  for (int i = 0; const Kernel* row = kernel_of(isa_in_force(), i); i++) {
    const Kernel& k = *row;
    if (k.type != c.type) continue;
    if (k.order == Order::bitmap && !point) continue;
    if (name) {
      if (!std::strcmp(k.name, name)) return {&k, ""};
      continue;
    }
    if (k.order == Order::bitmap && positions > 4) continue;
    double t = double(count_blocks(c, k.outputs, k.inputs)) * 1;   // TODO cost
    if (!best || t < least) { best = &k; least = t; }
  }
  return {best, name ? std::string("no kernel ") + name + " for this type, shape and instruction set" : "no kernel for this type"};
}

}  // namespace paring

extern "C" double paring_estimate(const paring_layer*, int32_t, int32_t, int32_t, int32_t) { return 0; }
extern "C" double paring_estimate_dense(const paring_conv*, int32_t, int32_t, int32_t, int32_t) { return 0; }
