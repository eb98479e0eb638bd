/* Which elements dropout drops: a function of the seed, the row and the column, defined in nf4/adapter.py.

   A row of K elements has 8 * ceil(K / 32) words of 64 random bits (splitmix64 of a counter); a word serves four
   neighbours, 16 bits each. So 32 elements take one vector of eight words. */
#ifndef QLORALAB_DROPOUT_H
#define QLORALAB_DROPOUT_H

#include "weight.h"

typedef uint64_t longs __attribute__((vector_size(64)));

typedef struct {
    uint64_t seed;
    uint32_t threshold; /* an element is dropped when its 16 bits are below it; 0: no dropout */
    int64_t segments;   /* of 32 elements, in a row */
} dropout;

/* Bit i tells whether element 32 * segment + i of the row stays. */
static inline uint32_t kept(const dropout *d, int64_t row, int64_t segment)
{
    longs z = {1, 2, 3, 4, 5, 6, 7, 8};
    z = (z + 8 * (uint64_t)(row * d->segments + segment)) * 0x9E3779B97F4A7C15u + d->seed;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
#if HAVE_AVX512
    return _mm512_cmpge_epu16_mask((__m512i)z, _mm512_set1_epi16((short)d->threshold));
#else
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++)
        bits |= (uint32_t)(((z[i / 4] >> (16 * (i % 4))) & 0xffff) >= d->threshold) << i;
    return bits;
#endif
}

#endif
