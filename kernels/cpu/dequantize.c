/* Packed codes -> weights in full. */
#include "weight.h"

enum {
    CHUNK = 1 << 15,  /* weights per task, or more where a row is longer */
    LARGE = 16 << 20, /* bytes of a result that the caches do not keep: written past them, its lines are not read first */
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
    int64_t K = job->w->columns, bytes = job->type == FLOAT32 ? 4 : 2;
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

/* The block W[row : row + rows, column : column + columns] -> out [rows, columns]. */
EXPORT void qloralab_dequantize(const weight *w, int64_t row, int64_t rows, int64_t column, int64_t columns, int type,
                                void *out, int threads)
{
    int64_t rows_per_task = columns < CHUNK && columns > 0 ? CHUNK / columns : 1;
    dequantize_job job = {w, row, rows, column, columns, rows_per_task, (dtype)type, out,
                          rows * columns * (type == FLOAT32 ? 4 : 2) >= LARGE};
    if (columns > 0)
        for_each(ceil_div(rows, rows_per_task), threads, dequantize_rows, &job);
}
