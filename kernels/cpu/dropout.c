/* A copy with some elements zeroed and the others scaled up. */
#include "dropout.h"
#include "lanes.h"

enum { ROWS = 8 }; /* per task */

typedef struct {
    const void *x;
    void *out;
    int64_t rows, columns;
    dtype type;
    float scale;
    dropout d;
} dropout_job;

/* 32 elements, all there. */
INLINE void drop_segment(const dropout_job *job, dtype type, int64_t at, uint32_t keep)
{
    float y[32];
    for (int i = 0; i < 32; i += LANE)
        store_lane(y + i, where(keep >> i, load_numbers(job->x, type, at + i, LANE) * all_lanes(job->scale)));
    if (type == FLOAT32) {
        memcpy((float *)job->out + at, y, sizeof y);
        return;
    }
    for (int i = 0; i < 32; i += 16) {
        halves h = to_halves(load_floats(y + i), type);
        memcpy((uint16_t *)job->out + at + i, &h, sizeof h);
    }
}

INLINE void drop_row(dtype type, const dropout_job *job, int64_t m)
{
    int64_t k = 0, K = job->columns;
    for (; k + 32 <= K; k += 32)
        drop_segment(job, type, m * K + k, kept(&job->d, m, k / 32));
    if (k == K)
        return;
    uint32_t keep = kept(&job->d, m, k / 32);
    for (int64_t at = m * K + k; k < K; k++, at++, keep >>= 1)
        set_number(job->out, type, at, keep & 1 ? number(job->x, type, at) * job->scale : 0.0f);
}

static void drop_rows(void *data, int64_t index)
{
    const dropout_job *job = data;
    for (int64_t m = index * ROWS; m < min64(job->rows, (index + 1) * ROWS); m++)
        CALL_TYPED(drop_row, job->type, job, m);
}

/* x [rows, columns] -> out, the elements that stay times scale. */
EXPORT void qloralab_dropout(const void *x, int type, int64_t rows, int64_t columns, int64_t seed, int threshold,
                             float scale, void *out, int threads)
{
    dropout_job job = {x, out, rows, columns, (dtype)type, scale,
                       {(uint64_t)seed, (uint32_t)threshold, ceil_div(columns, 32)}};
    for_each(ceil_div(rows, ROWS), threads, drop_rows, &job);
}
