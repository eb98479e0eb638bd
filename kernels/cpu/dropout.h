/* Which elements dropout drops: a function of the seed, the row and the column, defined in lora/dropout.py.

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

#if HAVE_AVX2

/* The low 64 bits of products with a constant, out of three products of 32 bits. */
static inline __m256i times(__m256i a, uint64_t b)
{
    __m256i low = _mm256_set1_epi64x((int64_t)(b & 0xffffffffu)), high = _mm256_set1_epi64x((int64_t)(b >> 32));
    __m256i across = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(a, 32), low), _mm256_mul_epu32(a, high));
    return _mm256_add_epi64(_mm256_mul_epu32(a, low), _mm256_slli_epi64(across, 32));
}

/* Four words; all bits of an element where it stays. */
static inline __m256i kept16(__m256i z, __m256i threshold)
{
    z = times(_mm256_xor_si256(z, _mm256_srli_epi64(z, 30)), 0xBF58476D1CE4E5B9u);
    z = times(_mm256_xor_si256(z, _mm256_srli_epi64(z, 27)), 0x94D049BB133111EBu);
    z = _mm256_xor_si256(z, _mm256_srli_epi64(z, 31));
    return _mm256_cmpeq_epi16(z, _mm256_max_epu16(z, threshold));
}

#endif

/* Bit i tells whether element 32 * segment + i of the row stays. */
static inline uint32_t kept(const dropout *d, int64_t row, int64_t segment)
{
    const longs steps = (longs){1, 2, 3, 4, 5, 6, 7, 8} * 0x9E3779B97F4A7C15u;
    uint64_t first = 8 * (uint64_t)(row * d->segments + segment) * 0x9E3779B97F4A7C15u + d->seed;
#if HAVE_AVX2
    __m256i step[2], start = _mm256_set1_epi64x((int64_t)first), threshold = _mm256_set1_epi16((short)d->threshold);
    memcpy(step, &steps, sizeof step);
    __m256i a = kept16(_mm256_add_epi64(start, step[0]), threshold);
    __m256i b = kept16(_mm256_add_epi64(start, step[1]), threshold);
    __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8); /* packing went half by half */
    return (uint32_t)_mm256_movemask_epi8(bytes);
#else
    longs z = steps + first;
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
#endif
}

#endif
