/* AVX512 and AVX512-BF16 in plain C: each 512-bit intrinsic that kernels/cpu uses, for a processor that has AVX2 only.

   A C file that is compiled for AVX2 with this folder before the compiler's own takes its 512-bit path, and any x86-64 machine
   from 2013 on can test it: what is looked up, shifted and masked, in which order numbers are added, and that an aligned
   access is aligned. Intrinsics of 128 and 256 bits stay the compiler's. Not shown here: that the compiler makes the right
   instructions of the real ones, and how fast they are.

   Each function follows the operation that Intel's manual (volume 2) gives for the instruction. -DQLORALAB_EMULATE_BF16: with
   AVX512-BF16. Optimization has to be on: without, the compiler's own header has macros of the same names. */
#ifndef QLORALAB_EMULATED_AVX512
#define QLORALAB_EMULATED_AVX512

#include_next <immintrin.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef union {
    __m512 ps;
    __m512i si;
    __m512bh bh;
    __m256i half[2];
    float f[16];
    uint16_t h[32];
    uint32_t w[16];
    uint64_t l[8];
} any512;

#define EMULATED static __attribute__((noinline, unused, optimize("O3")))
#define FOR(n) for (int i = 0; i < (n); i++)
/* A function of vectors, `statement` for each of the n elements of the result r. */
#define OF_NONE(name, n, statement) \
    EMULATED __m512i emulated_##name(void) { any512 r; FOR(n) statement; return r.si; }
#define OF_TWO(name, n, statement) \
    EMULATED __m512i emulated_##name(__m512i x, __m512i y) \
    { any512 a = {.si = x}, b = {.si = y}, r; FOR(n) statement; return r.si; }
#define BY_COUNT(name, n, statement) \
    EMULATED __m512i emulated_##name(__m512i x, unsigned count) { any512 a = {.si = x}, r; FOR(n) statement; return r.si; }

/* Loads, stores, constants. What a mask leaves out is not touched. */
static inline void must_be_aligned(const void *p, const char *what)
{
    if ((uintptr_t)p % 64 == 0)
        return;
    fprintf(stderr, "%s at %p, which is not a multiple of 64\n", what, p);
    abort();
}

EMULATED __m512i emulated_loadu_si512(const void *p) { any512 r; memcpy(&r, p, 64); return r.si; }
EMULATED __m512 emulated_loadu_ps(const void *p) { any512 r; memcpy(&r, p, 64); return r.ps; }
EMULATED void emulated_storeu_si512(void *p, __m512i x) { memcpy(p, &x, 64); }
EMULATED void emulated_storeu_ps(void *p, __m512 x) { memcpy(p, &x, 64); }

EMULATED __m512i emulated_load_si512(const void *p)
{
    must_be_aligned(p, "_mm512_load_si512");
    return emulated_loadu_si512(p);
}

EMULATED void emulated_store_si512(void *p, __m512i x)
{
    must_be_aligned(p, "_mm512_store_si512");
    memcpy(p, &x, 64);
}

EMULATED void emulated_stream_si512(__m512i *p, __m512i x)
{
    must_be_aligned(p, "_mm512_stream_si512");
    memcpy(p, &x, 64);
}

EMULATED __m512i emulated_maskz_loadu_epi16(uint32_t mask, const void *p)
{
    any512 r;
    FOR(32) r.h[i] = mask >> i & 1 ? ((const uint16_t *)p)[i] : 0;
    return r.si;
}

EMULATED __m512 emulated_maskz_loadu_ps(__mmask16 mask, const void *p)
{
    any512 r;
    FOR(16) r.f[i] = mask >> i & 1 ? ((const float *)p)[i] : 0.0f;
    return r.ps;
}

EMULATED void emulated_mask_storeu_epi16(void *p, uint32_t mask, __m512i x)
{
    any512 a = {.si = x};
    FOR(32) if (mask >> i & 1) ((uint16_t *)p)[i] = a.h[i];
}

EMULATED void emulated_mask_storeu_ps(void *p, __mmask16 mask, __m512 x)
{
    any512 a = {.ps = x};
    FOR(16) if (mask >> i & 1) ((float *)p)[i] = a.f[i];
}

OF_NONE(setzero_si512, 8, r.l[i] = 0)
EMULATED __m512 emulated_setzero_ps(void) { return (__m512)emulated_setzero_si512(); }
EMULATED __m512i emulated_set1_epi16(short x) { any512 r; FOR(32) r.h[i] = (uint16_t)x; return r.si; }
EMULATED __m512i emulated_set1_epi32(int x) { any512 r; FOR(16) r.w[i] = (uint32_t)x; return r.si; }
EMULATED __m512 emulated_set1_ps(float x) { any512 r; FOR(16) r.f[i] = x; return r.ps; }
EMULATED __m512i emulated_set_epi16(const short from_31[32]) { any512 r; FOR(32) r.h[i] = (uint16_t)from_31[31 - i]; return r.si; }

/* Arithmetic, bits, comparisons. */
OF_TWO(add_epi16, 32, r.h[i] = (uint16_t)(a.h[i] + b.h[i]))
OF_TWO(add_epi32, 16, r.w[i] = a.w[i] + b.w[i])
OF_TWO(sub_epi32, 16, r.w[i] = a.w[i] - b.w[i])
OF_TWO(or_si512, 8, r.l[i] = a.l[i] | b.l[i])
BY_COUNT(slli_epi32, 16, r.w[i] = count > 31 ? 0 : a.w[i] << count)
BY_COUNT(srli_epi32, 16, r.w[i] = count > 31 ? 0 : a.w[i] >> count)
BY_COUNT(slli_epi64, 8, r.l[i] = count > 63 ? 0 : a.l[i] << count)
BY_COUNT(srli_epi64, 8, r.l[i] = count > 63 ? 0 : a.l[i] >> count)
BY_COUNT(srli_epi16, 32, r.h[i] = count > 15 ? 0 : (uint16_t)(a.h[i] >> count))
EMULATED __m512 emulated_add_ps(__m512 x, __m512 y) { return x + y; }
EMULATED __m512 emulated_mul_ps(__m512 x, __m512 y) { return x * y; }

EMULATED __m512 emulated_fmadd_ps(__m512 x, __m512 y, __m512 z)
{
    any512 a = {.ps = x}, b = {.ps = y}, c = {.ps = z}, r;
    FOR(16) r.f[i] = __builtin_fmaf(a.f[i], b.f[i], c.f[i]);
    return r.ps;
}

EMULATED __m512 emulated_mask_add_ps(__m512 other, __mmask16 mask, __m512 x, __m512 y)
{
    any512 o = {.ps = other}, sum = {.ps = x + y}, r;
    FOR(16) r.f[i] = mask >> i & 1 ? sum.f[i] : o.f[i];
    return r.ps;
}

EMULATED __m512i emulated_mask_add_epi32(__m512i other, __mmask16 mask, __m512i x, __m512i y)
{
    any512 o = {.si = other}, sum = {.si = emulated_add_epi32(x, y)}, r;
    FOR(16) r.w[i] = mask >> i & 1 ? sum.w[i] : o.w[i];
    return r.si;
}

EMULATED __m512 emulated_maskz_mov_ps(__mmask16 mask, __m512 x)
{
    any512 a = {.ps = x}, r;
    FOR(16) r.f[i] = mask >> i & 1 ? a.f[i] : 0.0f;
    return r.ps;
}

/* As compilers expand it: halves are added to halves, the last two numbers at the end. */
EMULATED float emulated_reduce_add_ps(__m512 x)
{
    any512 a = {.ps = x};
    for (int n = 8; n; n /= 2)
        FOR(n) a.f[i] += a.f[i + n];
    return a.f[0];
}

/* Bit by bit: the bits of a, b and c are an index into the table. */
EMULATED __m512i emulated_ternarylogic_epi32(__m512i x, __m512i y, __m512i z, int table)
{
    any512 a = {.si = x}, b = {.si = y}, c = {.si = z}, r = {.si = emulated_setzero_si512()};
    for (int row = 0; row < 8; row++)
        if (table >> row & 1)
            FOR(8) r.l[i] |= (row & 4 ? a.l[i] : ~a.l[i]) & (row & 2 ? b.l[i] : ~b.l[i]) & (row & 1 ? c.l[i] : ~c.l[i]);
    return r.si;
}

EMULATED uint32_t emulated_cmpge_epu16_mask(__m512i x, __m512i y)
{
    any512 a = {.si = x}, b = {.si = y};
    uint32_t mask = 0;
    FOR(32) mask |= (uint32_t)(a.h[i] >= b.h[i]) << i;
    return mask;
}

EMULATED __mmask16 emulated_cmp_ps_mask(__m512 x, __m512 y, int predicate)
{
    any512 a = {.ps = x}, b = {.ps = y};
    uint32_t mask = 0;
    if (predicate != _CMP_GT_OQ) /* the only one in use */
        abort();
    FOR(16) mask |= (uint32_t)(a.f[i] > b.f[i]) << i;
    return (__mmask16)mask;
}

/* Elements moved. An index has as many bits as it takes; those above do not count. */
OF_TWO(permutexvar_epi16, 32, r.h[i] = b.h[a.h[i] & 31])
OF_TWO(unpacklo_epi32, 16, r.w[i] = (i % 2 ? &b : &a)->w[i / 4 * 4 + i % 4 / 2])
OF_TWO(unpackhi_epi32, 16, r.w[i] = (i % 2 ? &b : &a)->w[i / 4 * 4 + 2 + i % 4 / 2])
OF_TWO(unpacklo_epi64, 8, r.l[i] = (i % 2 ? &b : &a)->l[i / 2 * 2])
OF_TWO(unpackhi_epi64, 8, r.l[i] = (i % 2 ? &b : &a)->l[i / 2 * 2 + 1])

EMULATED __m512 emulated_permutexvar_ps(__m512i index, __m512 x)
{
    any512 a = {.si = index}, b = {.ps = x}, r;
    FOR(16) r.f[i] = b.f[a.w[i] & 15];
    return r.ps;
}

EMULATED __m512i emulated_permutex2var_epi16(__m512i x, __m512i index, __m512i y)
{
    any512 a = {.si = x}, at = {.si = index}, b = {.si = y}, r;
    FOR(32) r.h[i] = (at.h[i] & 32 ? &b : &a)->h[at.h[i] & 31];
    return r.si;
}

/* Two quarters of x, then two of y, chosen by two bits each. */
EMULATED __m512i emulated_shuffle_i32x4(__m512i x, __m512i y, int control)
{
    any512 a = {.si = x}, b = {.si = y}, r;
    FOR(16) r.w[i] = (i < 8 ? &a : &b)->w[4 * (control >> (i / 4 * 2) & 3) + i % 4];
    return r.si;
}

EMULATED __m512i emulated_broadcast_i64x4(__m256i x) { return ((any512){.half = {x, x}}).si; }
/* The upper half of the real one is undefined: here it has a pattern that nothing expects. */
EMULATED __m512i emulated_castsi256_si512(__m256i x) { return ((any512){.half = {x, _mm256_set1_epi8(0x5a)}}).si; }
EMULATED __m512i emulated_inserti64x4(__m512i x, __m256i y, int at) { any512 r = {.si = x}; r.half[at & 1] = y; return r.si; }

/* From one type to another. */
typedef union {
    __m256i v;
    __m256 ps;
    uint8_t b[32];
    uint16_t h[16];
} any256;

typedef union {
    __m128i v;
    uint8_t b[16];
} any128;

EMULATED __m512i emulated_cvtepu8_epi16(__m256i x) { any256 a = {x}; any512 r; FOR(32) r.h[i] = a.b[i]; return r.si; }
EMULATED __m512i emulated_cvtepu16_epi32(__m256i x) { any256 a = {x}; any512 r; FOR(16) r.w[i] = a.h[i]; return r.si; }
EMULATED __m512i emulated_cvtepu8_epi32(__m128i x) { any128 a = {x}; any512 r; FOR(16) r.w[i] = a.b[i]; return r.si; }
EMULATED __m512i emulated_cvtepu8_epi64(__m128i x) { any128 a = {x}; any512 r; FOR(8) r.l[i] = a.b[i]; return r.si; }
EMULATED __m128i emulated_cvtepi32_epi8(__m512i x) { any512 a = {.si = x}; any128 r; FOR(16) r.b[i] = (uint8_t)a.w[i]; return r.v; }

EMULATED __m512 emulated_cvtph_ps(__m256i x)
{
    any512 r;
    FOR(2)
    {
        __m256 eight = _mm256_cvtph_ps(i ? _mm256_extracti128_si256(x, 1) : _mm256_castsi256_si128(x));
        memcpy(r.f + 8 * i, &eight, 32);
    }
    return r.ps;
}

EMULATED __m256i emulated_cvtps_ph(__m512 x, int rounding)
{
    any512 a = {.ps = x};
    if (rounding != _MM_FROUND_TO_NEAREST_INT) /* the only one in use */
        abort();
    __m128i low = _mm256_cvtps_ph((__m256)a.half[0], _MM_FROUND_TO_NEAREST_INT);
    return _mm256_set_m128i(_mm256_cvtps_ph((__m256)a.half[1], _MM_FROUND_TO_NEAREST_INT), low);
}

/* AVX512-BF16: it neither reads nor writes subnormal numbers, whatever MXCSR says; they are zeros of the same sign. */
static inline uint32_t subnormal_is_zero(uint32_t x) { return x & 0x7f800000u ? x : x & 0x80000000u; }

static inline float flushed(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = subnormal_is_zero(bits);
    memcpy(&x, &bits, 4);
    return x;
}

/* To nearest, ties to even. A NaN keeps its upper bits and becomes quiet. */
static inline uint16_t bf16_of(uint32_t x)
{
    x = subnormal_is_zero(x);
    uint32_t rounded = (x + 0x7fffu + (x >> 16 & 1)) >> 16, quiet = x >> 16 | 0x40;
    return (uint16_t)((x & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

EMULATED __m256bh emulated_cvtneps_pbh(__m512 x)
{
    any512 a = {.ps = x};
    uint16_t r[16];
    __m256bh out;
    FOR(16) r[i] = bf16_of(a.w[i]);
    memcpy(&out, r, 32);
    return out;
}

/* y below, x above. */
EMULATED __m512bh emulated_cvtne2ps_pbh(__m512 x, __m512 y)
{
    any512 a = {.ps = x}, b = {.ps = y}, r;
    FOR(16) r.h[i] = bf16_of(b.w[i]);
    FOR(16) r.h[16 + i] = bf16_of(a.w[i]);
    return r.bh;
}

/* The odd elements are multiplied and added first, then the even ones. A product of two bfloat16 is exact; a sum is rounded. */
EMULATED __m512 emulated_dpbf16_ps(__m512 sum, __m512bh x, __m512bh y)
{
    any512 a = {.bh = x}, b = {.bh = y}, r = {.ps = sum}, left, right;
    for (int odd = 1; odd >= 0; odd--) {
        FOR(16) left.w[i] = subnormal_is_zero(odd ? a.w[i] & 0xffff0000u : a.w[i] << 16);
        FOR(16) right.w[i] = subnormal_is_zero(odd ? b.w[i] & 0xffff0000u : b.w[i] << 16);
        FOR(16) r.f[i] = flushed(__builtin_fmaf(left.f[i], right.f[i], flushed(r.f[i])));
    }
    return r.ps;
}

/* The names. Where the compiler does not optimize, its header has macros of some of them. */
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_inserti64x4
#undef _mm512_shuffle_i32x4
#undef _mm512_slli_epi32
#undef _mm512_slli_epi64
#undef _mm512_srli_epi16
#undef _mm512_srli_epi32
#undef _mm512_srli_epi64
#undef _mm512_ternarylogic_epi32
#define _mm512_add_epi16 emulated_add_epi16
#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_add_ps emulated_add_ps
#define _mm512_broadcast_i64x4 emulated_broadcast_i64x4
#define _mm512_castsi256_si512 emulated_castsi256_si512
#define _mm512_cmp_ps_mask emulated_cmp_ps_mask
#define _mm512_cmpge_epu16_mask emulated_cmpge_epu16_mask
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepu8_epi16 emulated_cvtepu8_epi16
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtepu8_epi64 emulated_cvtepu8_epi64
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtps_ph emulated_cvtps_ph
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_inserti64x4 emulated_inserti64x4
#define _mm512_load_si512 emulated_load_si512
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_mask_add_epi32 emulated_mask_add_epi32
#define _mm512_mask_add_ps emulated_mask_add_ps
#define _mm512_mask_storeu_epi16 emulated_mask_storeu_epi16
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#define _mm512_maskz_loadu_epi16 emulated_maskz_loadu_epi16
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#define _mm512_maskz_mov_ps emulated_maskz_mov_ps
#define _mm512_mul_ps emulated_mul_ps
#define _mm512_or_si512 emulated_or_si512
#define _mm512_permutex2var_epi16 emulated_permutex2var_epi16
#define _mm512_permutexvar_epi16 emulated_permutexvar_epi16
#define _mm512_permutexvar_ps emulated_permutexvar_ps
#define _mm512_reduce_add_ps emulated_reduce_add_ps
#define _mm512_set1_epi16 emulated_set1_epi16
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_set_epi16(...) emulated_set_epi16((const short[32]){__VA_ARGS__})
#define _mm512_setzero_ps emulated_setzero_ps
#define _mm512_setzero_si512 emulated_setzero_si512
#define _mm512_shuffle_i32x4 emulated_shuffle_i32x4
#define _mm512_slli_epi32 emulated_slli_epi32
#define _mm512_slli_epi64 emulated_slli_epi64
#define _mm512_srli_epi16 emulated_srli_epi16
#define _mm512_srli_epi32 emulated_srli_epi32
#define _mm512_srli_epi64 emulated_srli_epi64
#define _mm512_store_si512 emulated_store_si512
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_storeu_si512 emulated_storeu_si512
#define _mm512_stream_si512 emulated_stream_si512
#define _mm512_sub_epi32 emulated_sub_epi32
#define _mm512_ternarylogic_epi32 emulated_ternarylogic_epi32
#define _mm512_unpackhi_epi32 emulated_unpackhi_epi32
#define _mm512_unpackhi_epi64 emulated_unpackhi_epi64
#define _mm512_unpacklo_epi32 emulated_unpacklo_epi32
#define _mm512_unpacklo_epi64 emulated_unpacklo_epi64

/* What a file asks for before it uses them. */
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#ifdef QLORALAB_EMULATE_BF16
#define __AVX512BF16__ 1
#endif

#undef EMULATED
#undef FOR
#undef OF_NONE
#undef OF_TWO
#undef BY_COUNT

#endif
