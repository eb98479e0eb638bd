/* The AdamW update of one chunk (torch.optim.AdamW's order: the decay first). */
#include "pool.h"

#include <math.h>

enum { CHUNK = 1 << 14 };

typedef struct {
    float *restrict param;
    const float *restrict grad;
    float *restrict m;
    float *restrict v;
    int64_t numel;
    float decay, beta1, beta2, one_minus_beta1, one_minus_beta2, step_size, root_correction2, eps;
} adamw_job;

static void adamw_chunk(void *data, int64_t index)
{
    const adamw_job *job = data;
    int64_t first = index * CHUNK, n = min64(CHUNK, job->numel - first);
    float *restrict p = job->param + first, *restrict m = job->m + first, *restrict v = job->v + first;
    const float *restrict g = job->grad + first;
    float decay = job->decay, beta2 = job->beta2, a1 = job->one_minus_beta1, a2 = job->one_minus_beta2;
    float step_size = job->step_size, root2 = job->root_correction2, eps = job->eps;
    for (int64_t i = 0; i < n; i++) {
        float mi = m[i] + a1 * (g[i] - m[i]);
        float vi = beta2 * v[i] + a2 * g[i] * g[i];
        m[i] = mi;
        v[i] = vi;
        p[i] = p[i] * decay - step_size * mi / (sqrtf(vi) / root2 + eps);
    }
}

/* In place, float32 [numel]. step counts from 1. */
EXPORT void qloralab_adamw(float *param, const float *grad, float *m, float *v, int64_t numel, int64_t step, double lr,
                           double beta1, double beta2, double eps, double weight_decay, int threads)
{
    double correction1 = 1.0 - pow(beta1, (double)step), correction2 = 1.0 - pow(beta2, (double)step);
    adamw_job job = {param, grad, m, v, numel, (float)(1.0 - lr * weight_decay), (float)beta1, (float)beta2,
                     (float)(1.0 - beta1), (float)(1.0 - beta2), (float)(lr / correction1), (float)sqrt(correction2),
                     (float)eps};
    for_each(ceil_div(numel, CHUNK), threads, adamw_chunk, &job);
}
