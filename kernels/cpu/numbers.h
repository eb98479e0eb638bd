/* Float32, bfloat16 and float16: vectors of them, and how one becomes another, with the bits of PyTorch. */
#ifndef QLORALAB_NUMBERS_H
#define QLORALAB_NUMBERS_H

#include "pool.h"

#include <string.h>

#if !defined(QLORALAB_PORTABLE) && defined(__x86_64__)
#include <immintrin.h>
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HAVE_AVX512 1
#if defined(__AVX512BF16__)
#define HAVE_AVX512_BF16 1
#endif
#elif defined(__AVX2__) && defined(__F16C__)
#define HAVE_AVX2 1
#endif
#elif !defined(QLORALAB_PORTABLE) && defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define HAVE_NEON 1
#endif

typedef float floats __attribute__((vector_size(64)));      /* 16 float32 */
typedef uint32_t words __attribute__((vector_size(64)));    /* 16 uint32 */
typedef uint16_t halves __attribute__((vector_size(32)));   /* 16 uint16 */

typedef enum { FLOAT32, BFLOAT16, FLOAT16 } dtype;

static inline int64_t size_of(dtype type) { return type == FLOAT32 ? 4 : 2; }

/* Calls a function whose first argument is a dtype with that as a constant: inlined, it is compiled for each. */
#define CALL_TYPED(function, type, ...) \
    do { \
        if ((type) == FLOAT32) \
            function(FLOAT32, __VA_ARGS__); \
        else if ((type) == BFLOAT16) \
            function(BFLOAT16, __VA_ARGS__); \
        else \
            function(FLOAT16, __VA_ARGS__); \
    } while (0)

static inline floats load_floats(const float *p)
{
    floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline float from_bf16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float from_fp16(uint16_t x)
{
    uint32_t bits = (uint32_t)(x & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f; /* moves the exponent from float16's bias to float32's; exact, subnormals included */
    memcpy(&bits, &value, 4);
    if ((x & 0x7c00) == 0x7c00)
        bits |= 0x7f800000u;
    bits |= (uint32_t)(x & 0x8000) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* float32 -> float16, to nearest, ties to even. Adding a power of two 2**(e + 13), with e the exponent of the result's
   last bit, lets the float32 adder round there. */
static inline uint16_t fp16_in_software(float x)
{
    uint32_t bits, rounded;
    memcpy(&bits, &x, 4);
    uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* below 2**-14: a multiple of 2**-24 */
        float shifted;
        memcpy(&shifted, &magnitude, 4);
        shifted += 0.5f;
        memcpy(&rounded, &shifted, 4);
        return (uint16_t)(sign | (rounded - 0x3f000000u));
    }
    rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

/* One number of a dtype as float32. */
static inline float number(const void *x, dtype type, int64_t at)
{
    if (type == FLOAT32)
        return ((const float *)x)[at];
    uint16_t bits = ((const uint16_t *)x)[at];
    return type == BFLOAT16 ? from_bf16(bits) : from_fp16(bits);
}

static inline void set_number(void *x, dtype type, int64_t at, float value)
{
    if (type == FLOAT32)
        ((float *)x)[at] = value;
    else
        ((uint16_t *)x)[at] = type == BFLOAT16 ? bf16(value) : fp16_in_software(value);
}

#if HAVE_AVX2

/* The result is the low half of each word. */
static inline __m256i rounded_bf16(__m256 x)
{
    __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
    __m256i up = _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(bits, 16), one), _mm256_set1_epi32(0x7fff));
    __m256i sum = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(_mm256_add_epi32(bits, up)),
                                                       _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)),
                                                       _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    return _mm256_srli_epi32(sum, 16);
}

/* 16 float32, the first eight in a, as 16 bits. */
static inline halves narrowed(__m256 a, __m256 b, dtype type)
{
    if (type == BFLOAT16) /* packing goes half by half */
        return (halves)_mm256_permute4x64_epi64(_mm256_packus_epi32(rounded_bf16(a), rounded_bf16(b)), 0xd8);
    return (halves)_mm256_set_m128i(_mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT),
                                    _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

#endif

/* float32 -> 16 bits: to nearest, ties to even. Every NaN becomes bfloat16 0x7fc0, in integer steps: vcvtneps2bf16 flushes
   subnormals. */
static inline halves to_halves(floats x, dtype type)
{
#if HAVE_AVX2
    __m256 part[2];
    memcpy(part, &x, sizeof part);
    return narrowed(part[0], part[1], type);
#else
    if (type == BFLOAT16) {
        words bits = (words)x, nan = (words)(x != x);
        bits = (nan & 0x7fc00000u) | (~nan & bits);
        bits += 0x7fffu + ((bits >> 16) & 1u);
        return __builtin_convertvector(bits >> 16, halves);
    }
#if HAVE_AVX512
    return (halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
    halves out;
    for (int i = 0; i < 16; i++)
        out[i] = fp16_in_software(x[i]);
    return out;
#endif
#endif
}

static inline halves to_bf16(floats x) { return to_halves(x, BFLOAT16); }
static inline halves to_fp16(floats x) { return to_halves(x, FLOAT16); }

#endif
