/* A copy with some elements zeroed and the others scaled up. */
#include "dropout.h"

enum { ROWS = 8 }; /* per task */

typedef struct {
    const void *x;
    void *out;
    int64_t rows, columns;
    dtype type;
    float scale;
    dropout d;
} dropout_job;

static void drop_rows(void *data, int64_t index)
{
    const dropout_job *job = data;
    for (int64_t m = index * ROWS; m < min64(job->rows, (index + 1) * ROWS); m++)
        for (int64_t k = 0; k < job->columns; k += 32) {
            uint32_t keep = kept(&job->d, m, k / 32);
            int64_t first = m * job->columns + k;
            int n = (int)min64(32, job->columns - k);
            for (int i = 0; i < n; i++) {
                int64_t at = first + i;
                int stays = keep >> i & 1;
                if (job->type == FLOAT32)
                    ((float *)job->out)[at] = stays ? ((const float *)job->x)[at] * job->scale : 0.0f;
                else if (job->type == BFLOAT16)
                    ((uint16_t *)job->out)[at] =
                        stays ? bf16(from_bf16(((const uint16_t *)job->x)[at]) * job->scale) : 0;
                else
                    ((uint16_t *)job->out)[at] =
                        stays ? fp16_in_software(from_fp16(((const uint16_t *)job->x)[at]) * job->scale) : 0;
            }
        }
}

/* x [rows, columns] -> out, the elements that stay times scale. */
EXPORT void qloralab_dropout(const void *x, int type, int64_t rows, int64_t columns, int64_t seed, int threshold,
                             float scale, void *out, int threads)
{
    dropout_job job = {x, out, rows, columns, (dtype)type, scale,
                       {(uint64_t)seed, (uint32_t)threshold, ceil_div(columns, 32)}};
    for_each(ceil_div(rows, ROWS), threads, drop_rows, &job);
}
