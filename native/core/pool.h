// One pool of threads for the whole process. Callers of several threads may run jobs at once.
#pragma once

namespace paring {

// Runs task(context, i) for i in [0, tasks) on up to `threads` threads, the caller's among them; returns when all are
// done, and what they wrote is visible. Neighbouring tasks go to one thread, the
// same one for the same index from job to job as far as possible; who is done early helps the others.
void parallel(int threads, int tasks, void (*task)(void* context, int index), void* context);

template <class F> void parallel_for(int threads, int tasks, F&& f) {
  if (threads <= 1 || tasks <= 1) {
    for (int i = 0; i < tasks; i++) f(i);
    return;
  }
  parallel(threads, tasks, [](void* c, int i) { (*static_cast<F*>(c))(i); }, &f);
}

}  // namespace paring
