/* The AdamW update of a chunk, moments in 8 bits: the steps of kernels/adamw_8bit.py, once over the memory.

   The code of a number is found in two look-ups: moment_tables in kernels/adamw_8bit.py says how. */
#include "adamw.h"

#include <float.h>

enum { TASK = 32 };

typedef struct {
    const float *values;     /* [256]: the map */
    const float *thresholds; /* [256]: the last one is infinity */
    const uint8_t *below;    /* [2**15]: thresholds that are below all numbers with these 15 bits */
    int shift;               /* of the bits of a float32, to the 15 */
} map;

typedef struct {
    const chunk *c;
    map m, v;
} job;

static inline void decode_moment(const map *t, const uint8_t *restrict codes, float absmax, int64_t n, float *restrict out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = t->values[codes[i]] * absmax;
}

/* What kernels/cpu/quantize.c does for the scales of weights. x [MOMENTS_PER_BLOCK] is 0 from n on. */
static inline void encode_moment(const map *t, const float *restrict x, int64_t n, uint8_t *restrict codes, float *absmax)
{
    uint32_t top = 0; /* magnitudes as integers: NaN is above infinity */
    for (int64_t i = 0; i < MOMENTS_PER_BLOCK; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffffu;
        top = bits > top ? bits : top;
    }
    float scale;
    memcpy(&scale, &top, 4);
    *absmax = scale;
    float r = 1.0f / scale, q[MOMENTS_PER_BLOCK];
    if (scale == 0.0f)
        memset(q, 0, sizeof q);
    else if (scale < FLT_MIN || r < FLT_MIN)
        for (int64_t i = 0; i < MOMENTS_PER_BLOCK; i++)
            q[i] = x[i] / scale;
    else
        for (int64_t i = 0; i < MOMENTS_PER_BLOCK; i++)
            q[i] = x[i] * r;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, q + i, 4);
        unsigned below = t->below[(bits >> t->shift) & 0x7fffu];
        codes[i] = (uint8_t)(below + (q[i] > t->thresholds[below]));
    }
}

static void update_block(const job *j, int64_t s, int64_t block)
{
    const chunk *c = j->c;
    int64_t first = block * MOMENTS_PER_BLOCK, n = min64(MOMENTS_PER_BLOCK, c->numels[s] - first);
    uint8_t *m_codes = (uint8_t *)c->m[s] + first, *v_codes = (uint8_t *)c->v[s] + first;
    float *m_absmax = c->m_absmax[s] + block, *v_absmax = c->v_absmax[s] + block;
    float m[MOMENTS_PER_BLOCK] = {0}, v[MOMENTS_PER_BLOCK] = {0};
    decode_moment(&j->m, m_codes, *m_absmax, n, m);
    decode_moment(&j->v, v_codes, *v_absmax, n, v);
    dtype type = (dtype)c->types[s];
    if (type == FLOAT32)
        update(c, s, n, (float *)c->params[s] + first, (const float *)c->grads[s] + first, m, v);
    else {
        float p[MOMENTS_PER_BLOCK], g[MOMENTS_PER_BLOCK];
        widen((const uint16_t *)c->params[s] + first, n, type, p);
        widen((const uint16_t *)c->grads[s] + first, n, type, g);
        update(c, s, n, p, g, m, v);
        narrow(p, n, type, (uint16_t *)c->params[s] + first);
    }
    encode_moment(&j->m, m, n, m_codes, m_absmax);
    encode_moment(&j->v, v, n, v_codes, v_absmax);
}

static void update_task(void *data, int64_t index)
{
    const job *j = data;
    const chunk *c = j->c;
    int64_t at = index * TASK, end = min64(at + TASK, c->ends[c->count - 1]);
    for (int64_t s = segment_of(c, at); at < end; s++)
        for (; at < min64(end, c->ends[s]); at++)
            update_block(j, s, at - (c->ends[s] - ceil_div(c->numels[s], MOMENTS_PER_BLOCK)));
}

/* In place. `ends` counts blocks. values, thresholds and below are those of m, then those of v. */
EXPORT void qloralab_adamw_8bit(const chunk *c, const float *values, const float *thresholds, const uint8_t *below,
                                int threads)
{
    job j = {c, {values, thresholds, below, 17}, {values + 256, thresholds + 256, below + (1 << 15), 16}};
    for_each(c->count ? ceil_div(c->ends[c->count - 1], TASK) : 0, threads, update_task, &j);
}
