/* The AdamW update of a chunk, moments in float32: the steps of kernels/adamw.py, once over the memory. */
#include "adamw.h"

enum { TASK = 1 << 16, PIECE = 512 };

/* A piece is widened into memory that the first cache keeps. */
static void update_narrow(const chunk *c, int64_t s, int64_t n, dtype type, uint16_t *p, const uint16_t *g, float *m,
                          float *v)
{
    float wide_p[PIECE], wide_g[PIECE];
    for (int64_t i = 0; i < n; i += PIECE) {
        int64_t some = min64(PIECE, n - i);
        widen(p + i, some, type, wide_p);
        widen(g + i, some, type, wide_g);
        update(c, s, some, wide_p, wide_g, m + i, v + i);
        narrow(wide_p, some, type, p + i);
    }
}

static void update_task(void *data, int64_t index)
{
    const chunk *c = data;
    int64_t at = index * TASK, end = min64(at + TASK, c->ends[c->count - 1]);
    for (int64_t s = segment_of(c, at); at < end; s++) {
        int64_t first = at - (c->ends[s] - c->numels[s]), n = min64(end, c->ends[s]) - at;
        float *m = (float *)c->m[s] + first, *v = (float *)c->v[s] + first;
        dtype type = (dtype)c->types[s];
        if (type == FLOAT32)
            update(c, s, n, (float *)c->params[s] + first, (const float *)c->grads[s] + first, m, v);
        else
            update_narrow(c, s, n, type, (uint16_t *)c->params[s] + first, (const uint16_t *)c->grads[s] + first, m, v);
        at += n;
    }
}

/* In place. `ends` counts elements. A task has as many of them as any other, in however many segments. */
EXPORT void qloralab_adamw(const chunk *c, int threads)
{
    for_each(c->count ? ceil_div(c->ends[c->count - 1], TASK) : 0, threads, update_task, (void *)c);
}
