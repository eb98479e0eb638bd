#include "pool.h"

#include <pthread.h>
#include <stdlib.h>

/* GCC's entry into a parallel region; LLVM's runtime has it too. */
typedef void (*parallel_region)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

static parallel_region region;

EXPORT void qloralab_set_pool(parallel_region entry) { region = entry; }

typedef struct {
    task run;
    void *job;
    int64_t count, next;
} loop;

static void work(void *data)
{
    loop *l = data;
    int64_t i;
    while ((i = __atomic_fetch_add(&l->next, 1, __ATOMIC_RELAXED)) < l->count)
        l->run(l->job, i);
}

void for_each(int64_t count, int threads, task run, void *job)
{
    loop l = {run, job, count, 0};
    if (region && threads > 1 && count > 1)
        region(work, &l, (unsigned)threads, 0); /* all of them: libgomp ends the threads that a smaller team leaves over */
    else
        work(&l);
}

typedef struct {
    void *data;
    size_t bytes;
} buffer;

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void release(void *held)
{
    free(((buffer *)held)->data);
    free(held);
}

static void make_key(void)
{
    if (pthread_key_create(&key, release))
        abort();
}

void *scratch(size_t bytes)
{
    pthread_once(&once, make_key);
    buffer *b = pthread_getspecific(key);
    if (!b) {
        b = calloc(1, sizeof *b);
        if (!b || pthread_setspecific(key, b))
            abort();
    }
    if (b->bytes < bytes) {
        free(b->data);
        b->bytes = (bytes + 63) / 64 * 64;
        b->data = aligned_alloc(64, b->bytes);
        if (!b->data)
            abort();
    }
    return b->data;
}
