/* Lion: the steps of kernels/lion.py. */
#include "update.h"

INLINE void lion(const chunk *c, int64_t s, int64_t n, float *restrict p, const float *restrict g,
                 float *restrict *moments)
{
    (void)s;
    float decay = c->constants[0], lr = c->constants[1], b1 = c->constants[2], a1 = c->constants[3];
    float b2 = c->constants[4], a2 = c->constants[5], *restrict m = moments[0];
    for (int64_t i = 0; i < n; i++) {
        float sum = b1 * m[i] + a1 * g[i], sign = sum == sum ? (sum > 0) - (sum < 0) : sum;
        p[i] = p[i] * decay - lr * sign;
        m[i] = b2 * m[i] + a2 * g[i];
    }
}

EXPORT_RULE(lion, 1, 0)
