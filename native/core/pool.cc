#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <pthread.h>
#include <thread>

namespace paring {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

constexpr int most_threads = 64;

// Tasks of a job in as many ranges as threads may take part: each thread begins with its own, always the same for the same
// thread, so that a layer finds the values where its predecessor left them, in the cache of the same core. Who is done
// helps with the other ranges.
struct Job {
  struct alignas(64) Range { std::atomic<int> next; int end; };

  void (*task)(void*, int);
  void* context;
  int ranges;
  int seats;                        // how many more threads may join
  std::atomic<int> helpers{0};
  Job* after = nullptr;
  Range range[most_threads];

  Job(void (*task)(void*, int), void* context, int tasks, int threads) : task(task), context(context), ranges(threads), seats(threads - 1) {
    for (int i = 0; i < ranges; i++) {
      range[i].next.store(int(int64_t(tasks) * i / ranges), std::memory_order_relaxed);
      range[i].end = int(int64_t(tasks) * (i + 1) / ranges);
    }
  }

  bool open() const {
    if (seats <= 0) return false;
    for (int i = 0; i < ranges; i++) if (range[i].next.load(std::memory_order_relaxed) < range[i].end) return true;
    return false;
  }

  void work(int first) {
    for (int k = 0; k < ranges; k++) {
      Range& r = range[(first + k) % ranges];
      for (int i; r.next.load(std::memory_order_relaxed) < r.end && (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.end;) task(context, i);
    }
  }
};

// Lives as long as the process: its threads may wait when everything else is gone.
struct Pool {
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<uint64_t> posted{0};   // grows with every job, so that idle threads see one without the mutex
  Job* jobs = nullptr;
  int threads = 0, sleeping = 0;

  // With the mutex held: a job that wants another thread.
  Job* open() {
    for (Job* job = jobs; job; job = job->after)
      if (job->open()) return job;
    return nullptr;
  }

  void serve(int number) {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      if (Job* job = open()) {
        job->seats--;
        job->helpers.fetch_add(1, std::memory_order_relaxed);
        lock.unlock();
        job->work(number);
        job->helpers.fetch_sub(1, std::memory_order_release);   // the job may be gone from here on
        lock.lock();
        continue;
      }
      uint64_t seen = posted.load(std::memory_order_relaxed);
      lock.unlock();
      // The next layer follows within microseconds; a thread that sleeps takes tens of them to wake.
      bool news = false;
      for (int i = 0; i < spins && !news; i++) { pause(); news = posted.load(std::memory_order_relaxed) != seen; }
      lock.lock();
      if (!news) {
        sleeping++;
        wake.wait(lock, [&] { return posted.load(std::memory_order_relaxed) != seen; });
        sleeping--;
      }
    }
  }

  void run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (; threads < job.seats; threads++) std::thread([this, number = threads + 1] { serve(number); }).detach();
      job.after = jobs;
      jobs = &job;
      posted.fetch_add(1, std::memory_order_relaxed);
      if (sleeping) wake.notify_all();
    }
    job.work(0);
    {
      std::lock_guard<std::mutex> lock(mutex);
      Job** at = &jobs;
      while (*at != &job) at = &(*at)->after;
      *at = job.after;
    }
    for (int i = 0; job.helpers.load(std::memory_order_acquire); i++)
      if (i < 4 * spins) pause(); else std::this_thread::yield();   // a helper may have lost its processor
  }

  static constexpr int spins = 600;       // some ten microseconds: longer, and it would be in the way of the runtime's own threads
};

Pool* pool = nullptr;

Pool& the_pool() {
  static Pool* const made = [] {
    pool = new Pool;
    // A forked child has none of the threads, and must not inherit a locked mutex.
    pthread_atfork([] { pool->mutex.lock(); }, [] { pool->mutex.unlock(); }, [] { pool = new (pool) Pool; });
    return pool;
  }();
  return *made;
}

}  // namespace

void parallel(int threads, int tasks, void (*task)(void*, int), void* context) {
  if (threads <= 1 || tasks <= 1) {
    for (int i = 0; i < tasks; i++) task(context, i);
    return;
  }
  int limit = std::min(std::max(1, int(std::thread::hardware_concurrency())), most_threads);
  Job job(task, context, tasks, std::min({threads, tasks, limit}));
  the_pool().run(job);
}

}  // namespace paring
