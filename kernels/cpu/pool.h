/* Threads: those of PyTorch. Two pools in one process fight for the cores, so none is created here. Python finds the
   OpenMP runtime that torch has loaded and hands over its entry point; without one, everything runs on one thread. */
#ifndef QLORALAB_POOL_H
#define QLORALAB_POOL_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline)) /* with constants for arguments, mostly */

typedef void (*task)(void *job, int64_t index);

/* Runs task(job, 0) ... task(job, count - 1), each once, on up to `threads` threads, and waits for all of them. A
   thread that is done takes the next index, so tasks may differ in length. */
void for_each(int64_t count, int threads, task run, void *job);

/* Memory of this thread, 64-byte aligned, kept until the thread ends. The next call on this thread gives it out again. */
void *scratch(size_t bytes);

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
