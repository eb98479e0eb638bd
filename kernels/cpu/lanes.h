/* Float32 in the widest vectors that there are: 16, 8 or 4 in a lane. */
#ifndef QLORALAB_LANES_H
#define QLORALAB_LANES_H

#include "weight.h"

#if HAVE_AVX512
typedef __m512 lane;
enum { LANE = 16 };
#elif HAVE_AVX2
typedef __m256 lane;
enum { LANE = 8 };
#elif HAVE_NEON
typedef float32x4_t lane;
enum { LANE = 4 };
#else
typedef float lane __attribute__((vector_size(16)));
enum { LANE = 4 };
#endif

static inline lane load_lane(const void *p)
{
    lane v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store_lane(void *p, lane v) { memcpy(p, &v, sizeof v); }

static inline lane multiply_add(lane a, lane b, lane sum)
{
#if HAVE_AVX512
    return _mm512_fmadd_ps(a, b, sum);
#elif HAVE_AVX2 && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, sum);
#elif HAVE_NEON
    return vfmaq_f32(sum, a, b);
#else
    return a * b + sum;
#endif
}

/* Subtracting 0 is for the type alone: it changes no number, not even -0.0. */
static inline lane all_lanes(float x) { return x - (lane){0}; }

#if HAVE_AVX512

/* 16 vectors of 16 words, transposed: word c of vector r becomes word r of vector c. */
INLINE void transpose(__m512i v[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    /* v[4a + c], lane l: word c + 4l of rows 4a ... 4a + 3 */
    for (int c = 0; c < 4; c++) {
        t[c] = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
        t[8 + c] = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
    }
    for (int c = 0; c < 4; c++) {
        v[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
        v[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
        v[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
        v[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
    }
}

#endif

/* LANE vectors of LANE words, transposed. */
INLINE void transpose_lanes(lane v[LANE])
{
#if HAVE_AVX512
    transpose((__m512i *)v);
#elif HAVE_AVX2
    lane t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) /* v[i + c]: words c and c + 4 of rows i ... i + 3 */
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
            v[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
        }
    for (int c = 0; c < 4; c++) {
        t[c] = _mm256_permute2f128_ps(v[c], v[4 + c], 0x20);
        t[4 + c] = _mm256_permute2f128_ps(v[c], v[4 + c], 0x31);
    }
    memcpy(v, t, sizeof t);
#else
    float t[LANE][LANE];
    for (int i = 0; i < LANE; i++)
        for (int c = 0; c < LANE; c++)
            t[c][i] = v[i][c];
    memcpy(v, t, sizeof t);
#endif
}

/* LANE numbers of a matrix from element `at` on, of which `inside` are there; the others are 0. */
static inline lane load_numbers(const void *x, dtype type, int64_t at, int64_t inside)
{
    if (inside >= LANE) {
        if (type == FLOAT32)
            return load_lane((const float *)x + at);
#if HAVE_AVX512
        __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)x + at));
        return type == FLOAT16 ? _mm512_cvtph_ps(half) : (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif HAVE_AVX2
        __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + at));
        return type == FLOAT16 ? _mm256_cvtph_ps(half) : (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#endif
    }
    float some[LANE] = {0};
    for (int i = 0; i < min64(LANE, inside); i++)
        some[i] = number(x, type, at + i);
    return load_lane(some);
}

/* Zeros where a bit of `keep` is not set. */
static inline lane where(uint32_t keep, lane x)
{
#if HAVE_AVX512
    return _mm512_maskz_mov_ps((__mmask16)keep, x);
#elif HAVE_AVX2
    const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    __m256i own = _mm256_and_si256(_mm256_set1_epi32((int)keep), bit);
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(own, bit)));
#else
    float some[LANE];
    memcpy(some, &x, sizeof some);
    for (int i = 0; i < LANE; i++)
        if (!(keep >> i & 1))
            some[i] = 0.0f;
    return load_lane(some);
#endif
}

/* Each number rounded to the dtype, as float32. */
static inline lane round_to(dtype type, lane x)
{
    if (type == FLOAT32)
        return x;
    if (type == FLOAT16) {
#if HAVE_AVX512
        return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif HAVE_AVX2
        return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
        for (int i = 0; i < LANE; i++)
            x[i] = from_fp16(fp16_in_software(x[i]));
        return x;
#endif
    }
    typedef uint32_t lane_words __attribute__((vector_size(sizeof(lane))));
    lane_words bits = (lane_words)x, nan = (lane_words)(x != x); /* the steps of to_bf16 */
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return (lane)(((nan & 0x7fc00000u) | (~nan & bits)) & 0xffff0000u);
}

enum { STRETCH = 4096 };

/* n <= STRETCH weights from a flat index on, rounded to the dtype, as float32. */
INLINE void decode_numbers(const weight *w, dtype type, int64_t first, int64_t n, float *out)
{
    uint16_t low[STRETCH];
    decode(w, first, n, type, type == FLOAT32 ? (void *)out : (void *)low, 0);
    int64_t i = type == FLOAT32 ? n : 0;
#if HAVE_AVX512 || HAVE_AVX2
    for (; i + LANE <= n; i += LANE)
        store_lane(out + i, load_numbers(low, type, i, LANE));
#endif
    for (; i < n; i++)
        out[i] = number(low, type, i);
}

#endif
