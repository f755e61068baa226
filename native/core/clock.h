// Short measurements of one thread, by its own processor time.
#pragma once
#include <algorithm>
#include <ctime>

namespace paring {

inline double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// Seconds of one call, the least of several measurements of some tens of microseconds: whatever disturbs one makes it longer.
template <class F> double least_time(F f) {
  double best = 1;
  int runs = 1;
  for (int i = 0; i < 9; i++) {
    double start = now();
    for (int r = 0; r < runs; r++) f();
    double taken = now() - start;
    if (i) best = std::min(best, taken / runs);      // the first one only says how many fill the time
    else runs = int(std::min(1e4, std::max(1.0, 3e-5 / std::max(taken, 1e-8))));
  }
  return best;
}

}  // namespace paring
