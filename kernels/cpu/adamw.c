/* AdamW: the steps of kernels/adamw.py. */
#include "update.h"

INLINE void adamw(const chunk *c, int64_t s, int64_t n, float *restrict p, const float *restrict g,
                  float *restrict *moments)
{
    float decay = c->constants[0], beta2 = c->constants[1], a2 = c->constants[3], eps = c->constants[4];
    float lerp = c->constants[2]; /* of g - m, to be added to m, or to g if not positive */
    float step_size = c->factors[0][s], root = c->factors[1][s];
    float *restrict m = moments[0], *restrict v = moments[1];
    for (int64_t i = 0; i < n; i++) {
        float mi = (lerp > 0 ? m[i] : g[i]) + lerp * (g[i] - m[i]);
        float vi = beta2 * v[i] + a2 * g[i] * g[i];
        m[i] = mi;
        v[i] = vi;
        p[i] = p[i] * decay - step_size * mi / (sqrtf(vi) / root + eps);
    }
}

EXPORT_RULE(adamw, 2, 2)
