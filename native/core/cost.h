// What a layer is expected to take, and which kernel to take for it. No table of processors: the inner kernels themselves
// are timed once per process, on data in the first-level cache, when the first layer asks; memory traffic is added to that.
#pragma once
#include <string>

#include "kernels.h"
#include "paring.h"

namespace paring {

// Seconds of one kernel, one thread.
struct Rates {
  double block;      // a block for one pixel of a full tile
  double alone;      // a block in a tile of one pixel
  double end;        // the end of a group for one pixel: bias, activation, requantization, store
};
const Rates& rates(const Kernel&);

// Bytes per second that one thread reads from the third-level cache, and from memory.
struct Bandwidth { double cache, memory; };
const Bandwidth& bandwidth();

// Seconds of one thread below which others are left asleep: waking them takes as long as what they would save.
constexpr double worth_threads = 8e-5;
constexpr double wake_seconds = 3e-5;     // until a second thread that slept is at work

struct Choice { const Kernel* kernel; int64_t blocks; std::string why; };   // blocks that hold a weight
// The named kernel, or the one with the least expected time at `positions` output pixels.
Choice choose(const paring_conv&, const char* name, int64_t positions);

}  // namespace paring
