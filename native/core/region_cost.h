// What steps on planes are expected to take: the kernels are timed once per process on data in the nearest cache; ways to
// memory that lies farther are added by who knows them (region.cc).
#pragma once
#include "planes.h"

namespace paring {

// Seconds for one vector of pixels.
struct PlaneRates {
  double block;      // four outputs x 1 (input, tap)
  double lone;       // one weight
  double end;        // begin and finish the sums of one output
  double tap;        // depthwise, with stride 1
  double add;        // of one channel
  double convert;    // of one channel, either way
};
const PlaneRates& plane_rates(const PlaneKernels&);

}  // namespace paring
