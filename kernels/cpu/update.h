/* The update of a chunk by a rule, once over the memory, moments in 32 or in 8 bits: kernels/rule.py says what it does.

   A rule is a function of some elements in float32, which each file of a rule hands to the functions below. They are
   inlined there, and the rule into them. The code of a moment in 8 bits is found in two look-ups: moment_tables in
   kernels/moment_codes.py says how. */
#ifndef QLORALAB_UPDATE_H
#define QLORALAB_UPDATE_H

#include "weight.h"

#include <float.h>
#include <math.h>

#define INLINE static inline __attribute__((always_inline))

enum { MOST_MOMENTS = 2, CONSTANTS = 6, MOMENTS_PER_BLOCK = 256, BLOCKS = 32, ELEMENTS = 1 << 16, PIECE = 512 };

/* The segments of a chunk; kernels/cpu/library.py has the same structure. Each array has an entry for each segment. */
typedef struct {
    int64_t count;
    void *const *params;
    const void *const *grads;
    void *const *moments[MOST_MOMENTS];
    float *const *scales[MOST_MOMENTS];  /* of moments in 8 bits */
    const int64_t *numels;
    const int64_t *ends;                 /* elements, or blocks, of this segment and all before it */
    const int32_t *types;                /* of params and grads */
    const float *factors[2];             /* of the rule: what depends on the step */
    float constants[CONSTANTS];          /* of the rule: what all segments share */
    const float *values, *thresholds;    /* the signed map and its thresholds, [256], then those of the unsigned one */
    const uint8_t *below;                /* [2][2**15]: thresholds that are below all numbers with these 15 bits */
} chunk;

/* n elements of segment s, all of float32. Every operation is rounded by itself. */
typedef void rule(const chunk *c, int64_t s, int64_t n, float *restrict p, const float *restrict g,
                  float *restrict *moments);

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

/* Elements first ... first + n - 1 of segment s. A piece is widened into memory that the first cache keeps. */
INLINE void update(const chunk *c, int64_t s, int64_t first, int64_t n, float *restrict *moments, int count, rule *apply)
{
    dtype type = (dtype)c->types[s];
    if (type == FLOAT32) {
        apply(c, s, n, (float *)c->params[s] + first, (const float *)c->grads[s] + first, moments);
        return;
    }
    uint16_t *params = (uint16_t *)c->params[s] + first;
    const uint16_t *grads = (const uint16_t *)c->grads[s] + first;
    float p[PIECE], g[PIECE], *at[MOST_MOMENTS];
    for (int64_t i = 0; i < n; i += PIECE) {
        int64_t some = min64(PIECE, n - i);
        widen(params + i, some, type, p);
        widen(grads + i, some, type, g);
        for (int k = 0; k < count; k++)
            at[k] = moments[k] + i;
        apply(c, s, some, p, g, at);
        narrow(p, some, type, params + i);
    }
}

/* Moments in float32. `ends` counts elements. A task has as many of them as any other, in however many segments. */
INLINE void update_elements(const chunk *c, int64_t index, int count, rule *apply)
{
    int64_t at = index * ELEMENTS, end = min64(at + ELEMENTS, c->ends[c->count - 1]);
    for (int64_t s = segment_of(c, at); at < end; s++) {
        int64_t first = at - (c->ends[s] - c->numels[s]), n = min64(end, c->ends[s]) - at;
        float *moments[MOST_MOMENTS];
        for (int k = 0; k < count; k++)
            moments[k] = (float *)c->moments[k][s] + first;
        update(c, s, first, n, moments, count, apply);
        at += n;
    }
}

/* What kernels/cpu/quantize.c does for the scales of weights. x [MOMENTS_PER_BLOCK] is 0 from n on. */
static inline void encode_moment(const chunk *c, int is_unsigned, const float *restrict x, int64_t n,
                                 uint8_t *restrict codes, float *absmax)
{
    const float *thresholds = c->thresholds + is_unsigned * 256;
    const uint8_t *table = c->below + is_unsigned * (1 << 15);
    int shift = 17 - is_unsigned; /* of the bits of a float32, to the 15 */
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
        unsigned below = table[(bits >> shift) & 0x7fffu];
        codes[i] = (uint8_t)(below + (q[i] > thresholds[below]));
    }
}

/* Moments in 8 bits. `ends` counts blocks. Bit k of `is_unsigned` says that moment k has the unsigned map. */
INLINE void update_blocks(const chunk *c, int64_t index, int count, int is_unsigned, rule *apply)
{
    int64_t at = index * BLOCKS, end = min64(at + BLOCKS, c->ends[c->count - 1]);
    for (int64_t s = segment_of(c, at); at < end; s++)
        for (; at < min64(end, c->ends[s]); at++) {
            int64_t block = at - (c->ends[s] - ceil_div(c->numels[s], MOMENTS_PER_BLOCK));
            int64_t first = block * MOMENTS_PER_BLOCK, n = min64(MOMENTS_PER_BLOCK, c->numels[s] - first);
            float decoded[MOST_MOMENTS][MOMENTS_PER_BLOCK] = {{0}}, *moments[MOST_MOMENTS];
            for (int k = 0; k < count; k++) {
                const float *values = c->values + (is_unsigned >> k & 1) * 256;
                const uint8_t *codes = (const uint8_t *)c->moments[k][s] + first;
                float absmax = c->scales[k][s][block];
                moments[k] = decoded[k];
                for (int64_t i = 0; i < n; i++)
                    decoded[k][i] = values[codes[i]] * absmax;
            }
            update(c, s, first, n, moments, count, apply);
            for (int k = 0; k < count; k++)
                encode_moment(c, is_unsigned >> k & 1, decoded[k], n, (uint8_t *)c->moments[k][s] + first,
                              c->scales[k][s] + block);
        }
}

/* The functions that kernels/cpu/library.py calls, in place: qloralab_<name> and qloralab_<name>_8bit. */
#define EXPORT_RULE(name, moments, is_unsigned)                                                                        \
    static void name##_elements(void *c, int64_t index) { update_elements(c, index, moments, name); }                  \
    static void name##_blocks(void *c, int64_t index) { update_blocks(c, index, moments, is_unsigned, name); }         \
    EXPORT void qloralab_##name(const chunk *c, int threads)                                                           \
    {                                                                                                                  \
        for_each(c->count ? ceil_div(c->ends[c->count - 1], ELEMENTS) : 0, threads, name##_elements, (void *)c);       \
    }                                                                                                                  \
    EXPORT void qloralab_##name##_8bit(const chunk *c, int threads)                                                    \
    {                                                                                                                  \
        for_each(c->count ? ceil_div(c->ends[c->count - 1], BLOCKS) : 0, threads, name##_blocks, (void *)c);           \
    }

#endif
