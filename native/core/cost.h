// What a kernel is expected to cost, and which one to take.
#pragma once
#include <string>

#include "kernels.h"
#include "paring.h"

namespace paring {

struct Choice { const Kernel* kernel; std::string why; };
// The named kernel, or the one with the least expected time at `positions` output pixels.
Choice choose(const paring_conv&, const char* name, int64_t positions);

}  // namespace paring
