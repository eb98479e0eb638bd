/* What the AdamW updates with moments of 32 and of 8 bits have in common: the chunk, and the update of some elements. */
#ifndef QLORALAB_ADAMW_H
#define QLORALAB_ADAMW_H

#include "weight.h"

#include <math.h>

enum { MOMENTS_PER_BLOCK = 256 };

/* The segments of a chunk; kernels/cpu/library.py has the same structure. Each array has an entry for each segment. */
typedef struct {
    int64_t count;
    void *const *params;
    const void *const *grads;
    void *const *m;
    void *const *v;
    float *const *m_absmax; /* of moments of 8 bits, or NULL */
    float *const *v_absmax;
    const int64_t *numels;
    const int64_t *ends;    /* elements, or blocks, of this segment and all before it */
    const int32_t *types;   /* of params and grads */
    const float *step_sizes, *roots;
    float decay, beta2, lerp, one_minus_beta2, eps; /* lerp: of g - m, to be added to m, or to g if not positive */
} chunk;

/* The segment that element (or block) number `at` of the chunk is in. */
static inline int64_t segment_of(const chunk *c, int64_t at)
{
    int64_t low = 0, high = c->count - 1; /* it is among low ... high */
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (at < c->ends[middle])
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* n elements of segment s, all of float32. Every operation is rounded by itself. */
static inline void update(const chunk *c, int64_t s, int64_t n, float *restrict p, const float *restrict g,
                          float *restrict m, float *restrict v)
{
    float decay = c->decay, beta2 = c->beta2, lerp = c->lerp, a2 = c->one_minus_beta2, eps = c->eps;
    float step_size = c->step_sizes[s], root = c->roots[s];
    for (int64_t i = 0; i < n; i++) {
        float mi = (lerp > 0 ? m[i] : g[i]) + lerp * (g[i] - m[i]);
        float vi = beta2 * v[i] + a2 * g[i] * g[i];
        m[i] = mi;
        v[i] = vi;
        p[i] = p[i] * decay - step_size * mi / (sqrtf(vi) / root + eps);
    }
}

/* bfloat16 or float16 -> float32. */
static inline void widen(const uint16_t *restrict x, int64_t n, dtype type, float *restrict out)
{
    if (type == BFLOAT16)
        for (int64_t i = 0; i < n; i++)
            out[i] = from_bf16(x[i]);
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = from_fp16(x[i]);
}

/* float32 -> bfloat16 or float16. x may be read up to the next multiple of 16. */
static inline void narrow(const float *restrict x, int64_t n, dtype type, uint16_t *restrict out)
{
    for (int64_t i = 0; i < n; i += 16) {
        halves h = type == BFLOAT16 ? to_bf16(load_floats(x + i)) : to_fp16(load_floats(x + i));
        if (n - i >= 16)
            memcpy(out + i, &h, 32);
        else
            memcpy(out + i, &h, (size_t)(n - i) * 2);
    }
}

#endif
