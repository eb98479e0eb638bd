/* A weight in 4 bits, and how its codes become numbers.

   All weights of a block share a scale, so a block has only 16 different weights: the table of 16 products
   value * scale, rounded to the type wanted. Decoding is a look-up in that table, and a table of 16 fits a register:

       AVX512      vpermw: 32 look-ups of 16 bits in one instruction
       AVX2, NEON  pshufb, tbl: 32 or 16 look-ups of a byte, in a table of bytes: the low ones of the 16 products, the
                   high ones, of float32 the two between. AMD takes two pshufb a cycle, and half a vpermps
       otherwise   one at a time

   The product is the same float32 product as in nf4/blockwise.py, rounded the same way, so the bits are the same on
   every path. Nothing here may be contracted to a fused multiply-add (-ffp-contract=off). */
#ifndef QLORALAB_WEIGHT_H
#define QLORALAB_WEIGHT_H

#include "numbers.h"

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

/* The 16 weights of a block as bfloat16. */
static inline halves bf16_table(floats values, float scale)
{
#if HAVE_AVX512_BF16
    /* One instruction rounds as to_bf16 does, but takes subnormal numbers for 0. Here there are none, nor is there -0.0:
       a value is 0 or at least 2**-24 (nf4/codebook.py). */
    if (scale > 1e-30f && scale < 1e30f)
        return (halves)_mm512_cvtneps_pbh((__m512)(values * scale));
#endif
    return to_bf16(values * scale + 0.0f);
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
typedef __m512i tables;

static inline tables tables16(halves weights) { return _mm512_broadcast_i64x4((__m256i)weights); }

/* 16 bytes of codes -> 32 weights of 16 bits. stream: past the caches, where `out` is aligned to a cache line. */
INLINE void decode16(const uint8_t *packed, tables t, uint16_t *out, int stream)
{
    __m512i first, second;
    nibbles(packed, &first, &second);
    __m512i v = _mm512_permutexvar_epi16(_mm512_or_si512(first, second), t);
    if (stream)
        _mm512_stream_si512((__m512i *)out, v);
    else
        _mm512_storeu_si512(out, v);
}

/* 8 bytes of codes -> 16 float32. */
static inline __m512 look_up_floats(const uint8_t *packed, __m512 table)
{
    __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)packed));
    __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
    return _mm512_permutexvar_ps(index, table);
}

#if HAVE_AVX512_BF16

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
#elif HAVE_AVX2

/* The bytes of the 16 weights of a block: number b of the low ones is byte 0 of weight b, and so on. Two tables for types of
   16 bits, four for float32, each in both halves of a register. */
typedef struct {
    __m256i byte[4];
} tables;

static inline tables tables16(halves table)
{
    __m256i weights = (__m256i)table;
    tables t = {0};
    __m256i low = _mm256_and_si256(weights, _mm256_set1_epi16(0xff)), high = _mm256_srli_epi16(weights, 8);
    __m256i both = _mm256_packus_epi16(low, high); /* of half h: low bytes of weights 8h ..., then their high bytes */
    t.byte[0] = _mm256_permute4x64_epi64(both, 0x88);
    t.byte[1] = _mm256_permute4x64_epi64(both, 0xdd);
    return t;
}

static inline tables tables32(__m256 a, __m256 b)
{
    const __m256i by_byte = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i even = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5), odd = _mm256_setr_epi32(2, 6, 3, 7, 2, 6, 3, 7);
    __m256i x = _mm256_shuffle_epi8(_mm256_castps_si256(a), by_byte);
    __m256i y = _mm256_shuffle_epi8(_mm256_castps_si256(b), by_byte);
    __m256i low = _mm256_unpacklo_epi32(x, y), high = _mm256_unpackhi_epi32(x, y);
    return (tables){{_mm256_permutevar8x32_epi32(low, even), _mm256_permutevar8x32_epi32(low, odd),
                     _mm256_permutevar8x32_epi32(high, even), _mm256_permutevar8x32_epi32(high, odd)}};
}

/* 16 bytes of codes -> 32 indices. Half 0 of the register has codes 0 to 7 and 16 to 23, half 1 the others: unpacking then
   brings 32 results of 16 bits in order. by_eight: half 0 has codes 0 to 3, 8 to 11, ...: that is for 32 bits. */
static inline __m256i indices_of(__m128i packed, int by_eight)
{
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i order = by_eight ? _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0,
                                                      2, 3, 6, 7, 10, 11, 14, 15, 0, 0, 0, 0, 0, 0, 0, 0)
                                   : _mm256_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, 0, 0, 0, 0, 0, 0, 0, 0,
                                                      4, 5, 6, 7, 12, 13, 14, 15, 0, 0, 0, 0, 0, 0, 0, 0);
    __m256i bytes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(packed), order);
    __m256i first = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), second = _mm256_and_si256(bytes, nibble);
    return _mm256_unpacklo_epi8(first, second);
}

static inline __m256i indices(const uint8_t *packed, int by_eight)
{
    return indices_of(_mm_loadu_si128((const __m128i *)packed), by_eight);
}

/* stream: past the caches, where `to` is aligned to a vector. */
static inline void put(void *to, __m256i v, int stream)
{
    if (stream)
        _mm256_stream_si256(to, v);
    else
        _mm256_storeu_si256(to, v);
}

INLINE void decode16(const uint8_t *packed, tables t, uint16_t *out, int stream)
{
    __m256i index = indices(packed, 0);
    __m256i l = _mm256_shuffle_epi8(t.byte[0], index), h = _mm256_shuffle_epi8(t.byte[1], index);
    put(out, _mm256_unpacklo_epi8(l, h), stream);
    put(out + 16, _mm256_unpackhi_epi8(l, h), stream);
}

/* 32 indices, in the order that `indices` gives them by eight -> 32 float32 in order. */
INLINE void look_up32(__m256i index, tables t, __m256 out[4])
{
    __m256i b0 = _mm256_shuffle_epi8(t.byte[0], index), b1 = _mm256_shuffle_epi8(t.byte[1], index);
    __m256i b2 = _mm256_shuffle_epi8(t.byte[2], index), b3 = _mm256_shuffle_epi8(t.byte[3], index);
    __m256i low = _mm256_unpacklo_epi8(b0, b1), high = _mm256_unpacklo_epi8(b2, b3);
    out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high));
    out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high));
    low = _mm256_unpackhi_epi8(b0, b1);
    high = _mm256_unpackhi_epi8(b2, b3);
    out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high));
    out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high));
}

INLINE void decode32(const uint8_t *packed, tables t, float *out, int stream)
{
    __m256 x[4];
    look_up32(indices(packed, 1), t, x);
    for (int i = 0; i < 4; i++)
        put(out + 8 * i, _mm256_castps_si256(x[i]), stream);
}

#endif

/* Look up n codes that begin with a high nibble. stream: past the caches, where out is aligned to a cache line. */
static inline void decode_run16(const uint8_t *packed, int64_t n, halves table, uint16_t *out, int stream)
{
    int64_t i = 0;
    (void)stream;
#if HAVE_AVX512 || HAVE_AVX2
    tables t = tables16(table);
    if (stream && (uintptr_t)out % 64 == 0)
        for (; i + 32 <= n; i += 32)
            decode16(packed + i / 2, t, out + i, 1);
    for (; i + 32 <= n; i += 32)
        decode16(packed + i / 2, t, out + i, 0);
#elif HAVE_NEON
    uint8_t low[16], high[16];
    for (int j = 0; j < 16; j++) {
        low[j] = (uint8_t)table[j];
        high[j] = (uint8_t)(table[j] >> 8);
    }
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
    for (; i < n; i++)
        out[i] = table[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

static inline void decode_run32(const uint8_t *packed, int64_t n, floats table, float *out, int stream)
{
    int64_t i = 0;
    (void)stream;
#if HAVE_AVX512
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(out + i, look_up_floats(packed + i / 2, (__m512)table));
#elif HAVE_AVX2
    __m256 half[2];
    memcpy(half, &table, sizeof half);
    tables t = tables32(half[0], half[1]);
    if (stream && (uintptr_t)out % 64 == 0)
        for (; i + 32 <= n; i += 32)
            decode32(packed + i / 2, t, out + i, 1);
    for (; i + 32 <= n; i += 32)
        decode32(packed + i / 2, t, out + i, 0);
#endif
    for (; i < n; i++)
        out[i] = table[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
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
            decode_run32(packed + odd, run - odd, table, to + odd, stream);
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
