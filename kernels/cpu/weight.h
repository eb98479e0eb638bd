/* A weight in 4 bits, and how its codes become numbers.

   All weights of a block share a scale, so a block has only 16 different weights: the table of 16 products
   value * scale, rounded to the type wanted. Decoding is a look-up in that table, and a table of 16 fits a register:

       AVX512      vpermw: 32 look-ups of 16 bits in one instruction
       AVX2, NEON  pshufb, tbl: 16 look-ups of a byte; one for the low bytes of the table, one for the high bytes
       otherwise   one at a time

   The product is the same float32 product as in nf4/blockwise.py, rounded the same way, so the bits are the same on
   every path. Nothing here may be contracted to a fused multiply-add (-ffp-contract=off). */
#ifndef QLORALAB_WEIGHT_H
#define QLORALAB_WEIGHT_H

#include "pool.h"

#include <string.h>

#if !defined(QLORALAB_PORTABLE) && defined(__x86_64__)
#include <immintrin.h>
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HAVE_AVX512 1
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

/* The arguments of nf4's operators; kernels/cpu/library.py has the same structure. */
typedef struct {
    const uint8_t *packed;   /* two codes a byte, the first in the high nibble */
    const void *scales;      /* float [blocks], or uint8_t [blocks] with absmax2 */
    const float *absmax2;    /* [ceil(blocks / 256)] or NULL */
    const float *offset;     /* [] or NULL */
    const float *map;        /* the 8-bit dynamic map, [256] */
    const float *values;     /* the codebook, [16]: no -0.0, no subnormal products with scales that are not tiny */
    int64_t rows, columns;
    int64_t block_size;      /* a power of two, at least 32 */
} weight;

static inline float block_scale(const weight *w, int64_t block)
{
    if (!w->absmax2)
        return ((const float *)w->scales)[block];
    float product = w->map[((const uint8_t *)w->scales)[block]] * w->absmax2[block >> 8];
    return product + *w->offset;
}

/* The scales of `count` blocks. One after the other: compilers make gathers of the look-ups, which are slower. */
static inline void block_scales(const weight *w, int64_t block, int64_t count, float *out)
{
    if (!w->absmax2) {
        memcpy(out, (const float *)w->scales + block, (size_t)count * 4);
        return;
    }
    const uint8_t *codes = (const uint8_t *)w->scales;
    float offset = *w->offset;
    for (int64_t end = block + count; block < end; block++) {
        uint64_t code = codes[block];
        __asm__("" : "+r"(code));
        float product = w->map[code] * w->absmax2[block >> 8];
        *out++ = product + offset;
    }
}

static inline floats load_floats(const float *p)
{
    floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* float32 -> bfloat16: to nearest, ties to even, every NaN to 0x7fc0. Integer steps: vcvtneps2bf16 flushes subnormals. */
static inline halves to_bf16(floats x)
{
    words bits = (words)x;
    words nan = (words)(x != x);
    bits = (nan & 0x7fc00000u) | (~nan & bits);
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return __builtin_convertvector(bits >> 16, halves);
}

/* The 16 weights of a block as bfloat16. */
static inline halves bf16_table(floats values, float scale)
{
#if HAVE_AVX512 && defined(__AVX512BF16__)
    /* One instruction rounds as to_bf16 does, but takes subnormal numbers for 0. Here there are none, nor is there -0.0:
       a value is 0 or at least 2**-24 (nf4/codebook.py). */
    if (scale > 1e-30f && scale < 1e30f) {
        halves out;
        __m256bh rounded = _mm512_cvtneps_pbh((__m512)(values * scale));
        memcpy(&out, &rounded, sizeof out);
        return out;
    }
#endif
    return to_bf16(values * scale + 0.0f);
}

static inline uint16_t bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float from_bf16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* float32 -> float16, to nearest, ties to even. Adding a power of two 2**(e + 13), with e the exponent of the result's
   last place, lets the float32 adder round there. */
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

static inline halves to_fp16(floats x)
{
    halves out;
#if HAVE_AVX512
    __m256i h = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    memcpy(&out, &h, 32);
#elif HAVE_AVX2
    float f[16];
    memcpy(f, &x, 64);
    for (int i = 0; i < 2; i++) {
        __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(f + 8 * i), _MM_FROUND_TO_NEAREST_INT);
        memcpy((char *)&out + 16 * i, &h, 16);
    }
#else
    for (int i = 0; i < 16; i++)
        out[i] = fp16_in_software(x[i]);
#endif
    return out;
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

#if HAVE_AVX512

/* Indices for vpermw: 16 bytes of codes as 32 words in order, the code in bits 0 to 3 of each. Bit 4 may be anything. */
static inline void nibbles(const uint8_t *packed, __m512i *first, __m512i *second)
{
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)packed)); /* a byte per pair of weights */
    *first = _mm512_srli_epi32(bytes, 4);
    *second = _mm512_slli_epi32(bytes, 16);
}

/* A table of 16-bit weights, twice, so that bit 4 of an index does not count. */
static inline __m512i table16(halves t)
{
    __m256i half;
    memcpy(&half, &t, 32);
    return _mm512_broadcast_i64x4(half);
}

/* 16 bytes of codes -> 32 weights of 16 bits, in order. */
static inline __m512i look_up16(const uint8_t *packed, __m512i table)
{
    __m512i first, second;
    nibbles(packed, &first, &second);
    return _mm512_permutexvar_epi16(_mm512_or_si512(first, second), table);
}

#if defined(__AVX512BF16__)

/* The tables of two blocks in one register: a below, b above, told apart by bit 4 of the index. For products only:
   vcvtne2ps2bf16 makes subnormal weights 0, as the product instruction vdpbf16ps does itself. */
static inline __m512i table_pair(const weight *w, floats values, int64_t a, int64_t b)
{
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)(values * block_scale(w, b)), (__m512)(values * block_scale(w, a)));
}

/* 16 bytes of codes of the first or the second block of a pair -> 32 bfloat16, in order. */
static inline __m512i look_up_pair(const uint8_t *packed, __m512i table, int is_second)
{
    const __m512i bit4 = _mm512_set1_epi16(16);
    __m512i first, second;
    nibbles(packed, &first, &second);
    __m512i index = is_second ? _mm512_ternarylogic_epi32(first, second, bit4, 0xfe)  /* (first | second) | bit4 */
                              : _mm512_ternarylogic_epi32(first, second, bit4, 0x54); /* (first | second) & ~bit4 */
    return _mm512_permutexvar_epi16(index, table);
}

#endif
#endif

/* Look up n codes that begin with a high nibble. stream: past the caches, where out is aligned to a cache line. */
static inline void decode_run16(const uint8_t *packed, int64_t n, halves table, uint16_t *out, int stream)
{
    int64_t i = 0;
#if HAVE_AVX512
    __m512i t = table16(table);
    if (stream && (uintptr_t)out % 64 == 0)
        for (; i + 32 <= n; i += 32)
            _mm512_stream_si512((__m512i *)(out + i), look_up16(packed + i / 2, t));
    for (; i + 32 <= n; i += 32)
        _mm512_storeu_si512(out + i, look_up16(packed + i / 2, t));
#elif HAVE_AVX2 || HAVE_NEON
    (void)stream;
    uint8_t low[16], high[16];
    for (int j = 0; j < 16; j++) {
        low[j] = (uint8_t)table[j];
        high[j] = (uint8_t)(table[j] >> 8);
    }
#if HAVE_AVX2
    __m128i tl = _mm_loadu_si128((const __m128i *)low), th = _mm_loadu_si128((const __m128i *)high);
    __m128i nibble = _mm_set1_epi8(15);
    for (; i + 32 <= n; i += 32) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(packed + i / 2));
        __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), second = _mm_and_si128(bytes, nibble);
        __m128i index[2] = {_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second)};
        for (int j = 0; j < 2; j++) {
            __m128i l = _mm_shuffle_epi8(tl, index[j]), h = _mm_shuffle_epi8(th, index[j]);
            _mm_storeu_si128((__m128i *)(out + i + 16 * j), _mm_unpacklo_epi8(l, h));
            _mm_storeu_si128((__m128i *)(out + i + 16 * j + 8), _mm_unpackhi_epi8(l, h));
        }
    }
#else
    uint8x16_t tl = vld1q_u8(low), th = vld1q_u8(high);
    for (; i + 32 <= n; i += 32) {
        uint8x16_t bytes = vld1q_u8(packed + i / 2);
        uint8x16x2_t index = vzipq_u8(vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15)));
        for (int j = 0; j < 2; j++) {
            uint8x16x2_t both = vzipq_u8(vqtbl1q_u8(tl, index.val[j]), vqtbl1q_u8(th, index.val[j]));
            vst1q_u8((uint8_t *)(out + i + 16 * j), both.val[0]);
            vst1q_u8((uint8_t *)(out + i + 16 * j + 8), both.val[1]);
        }
    }
#endif
#else
    (void)stream;
#endif
    uint16_t t16[16];
    memcpy(t16, &table, 32);
    for (; i < n; i++)
        out[i] = t16[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

static inline void decode_run32(const uint8_t *packed, int64_t n, floats table, float *out)
{
    int64_t i = 0;
#if HAVE_AVX512
    for (; i + 16 <= n; i += 16) {
        __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(packed + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, (__m512)table));
    }
#elif HAVE_AVX2
    float t[16];
    memcpy(t, &table, 64);
    __m256 low = _mm256_loadu_ps(t), high = _mm256_loadu_ps(t + 8);
    for (; i + 8 <= n; i += 8) {
        int32_t four;
        memcpy(&four, packed + i / 2, 4);
        __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        __m256i index = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
        __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)); /* bit 3 of the code becomes the sign */
        __m256 l = _mm256_permutevar8x32_ps(low, index), h = _mm256_permutevar8x32_ps(high, index);
        _mm256_storeu_ps(out + i, _mm256_blendv_ps(l, h, is_high));
    }
#endif
    float t32[16];
    memcpy(t32, &table, 64);
    for (; i < n; i++)
        out[i] = t32[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

/* The n weights that begin at the flat index `first`, in a type of 16 or 32 bits. Any first, any n. Adding 0 to a product
   turns -0.0 into +0.0, as the reference does. */
static inline void decode(const weight *w, int64_t first, int64_t n, dtype type, void *out, int stream)
{
    floats values = load_floats(w->values);
    int shift = __builtin_ctzll((uint64_t)w->block_size);
    while (n > 0) {
        int64_t block = first >> shift;
        int64_t run = min64(n, (block + 1) * w->block_size - first);
        float scale = block_scale(w, block);
        const uint8_t *packed = w->packed + first / 2;
        int64_t odd = first % 2; /* begin with a low nibble: take it alone */
        int code = packed[0] & 15;
        if (type == FLOAT32) {
            float *to = out;
            floats table = values * scale + 0.0f;
            if (odd)
                to[0] = table[code];
            decode_run32(packed + odd, run - odd, table, to + odd);
            out = to + run;
        } else {
            halves t = type == BFLOAT16 ? bf16_table(values, scale) : to_fp16(values * scale + 0.0f);
            uint16_t *to = out;
            if (odd)
                to[0] = t[code];
            decode_run16(packed + odd, run - odd, t, to + odd, stream);
            out = to + run;
        }
        first += run;
        n -= run;
    }
}

#endif
