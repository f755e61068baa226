// What the runtime and the borders of a claim are expected to cost, beside what the core's cost model says of products.
#pragma once
#include "operator.h"

namespace paring {
namespace litert {

// What a partition of ours costs beside its kernels. With tiny tensors and warm caches it is 30 ns, XNNPACK's part behind it
// included (measured); what its code and ours evict of each other comes on top.
constexpr double partition_seconds = 3e-7;

// Per byte of a value that changes between NHWC and planes, one thread.
constexpr double conversion_seconds = 1.0e-10;

// Seconds of a DEPTHWISE_CONV_2D, ADD or PAD in the runtime.
double estimate_other(const Operator&, const Geometry&, int threads);

// Roughly, seconds of an operator on planes, conversions left out: enough to say which way a border is to be moved.
double estimate_in_planes(const Operator&, int64_t nonzeros, const Geometry&, int threads);

}  // namespace litert
}  // namespace paring
