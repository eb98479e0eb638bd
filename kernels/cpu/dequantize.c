/* Packed codes -> weights in full. */
#include "weight.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

enum {
    CHUNK = 1 << 15,  /* weights per task, or more where a row is longer */
    LARGE = 16 << 20, /* bytes of a result that the caches do not keep. Written past them, its lines are not read first */
};

typedef struct {
    const weight *w;
    int64_t row, rows, column, columns, rows_per_task;
    dtype type;
    char *out;
    int stream;
} dequantize_job;

static void dequantize_rows(void *data, int64_t index)
{
    const dequantize_job *job = data;
    int64_t K = job->w->columns, bytes = size_of(job->type);
    int64_t first = index * job->rows_per_task, end = min64(job->rows, first + job->rows_per_task);
    if (job->columns == K) { /* whole rows follow each other */
        decode(job->w, (job->row + first) * K, (end - first) * K, job->type, job->out + first * K * bytes, job->stream);
#if HAVE_AVX512 || HAVE_AVX2
        _mm_sfence();
#endif
        return;
    }
    for (int64_t n = first; n < end; n++)
        decode(job->w, (job->row + n) * K + job->column, job->columns, job->type, job->out + n * job->columns * bytes, 0);
}

/* Whether a large result is written past the caches: not where its memory is new. Linux clears a page of that at the first
   touch and leaves it in the cache; to write past it costs 15 to 19 % there, and saves 6 to 23 % elsewhere. The page in the
   middle tells, untouched. */
static int is_streamed(const char *out, int64_t bytes)
{
    if (bytes < LARGE)
        return 0;
#if defined(__linux__)
    unsigned char resident = 1;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t middle = ((uintptr_t)out + (size_t)bytes / 2) / page * page;
    if (mincore((void *)middle, page, &resident) == 0)
        return resident & 1;
#endif
    return 1;
}

/* The block W[row : row + rows, column : column + columns] -> out [rows, columns]. */
EXPORT void qloralab_dequantize(const weight *w, int64_t row, int64_t rows, int64_t column, int64_t columns, int type,
                                void *out, int threads)
{
    int64_t rows_per_task = columns < CHUNK && columns > 0 ? CHUNK / columns : 1;
    dequantize_job job = {w, row, rows, column, columns, rows_per_task, (dtype)type, out,
                          is_streamed(out, rows * columns * size_of((dtype)type))};
    if (columns > 0)
        for_each(ceil_div(rows, rows_per_task), threads, dequantize_rows, &job);
}
