/* The arithmetic of products in bfloat16, for AVX512-BF16: one instruction multiplies 16 pairs of bfloat16 and adds both
   products to 16 float32. A word is a pair, elements 2p and 2p + 1 of the contraction; 24 sums = 12 rows x 2 vectors stay
   in registers. A matrix whose contraction runs over its rows needs two rows interleaved. */
#ifndef QLORALAB_TILES_BF16_H
#define QLORALAB_TILES_BF16_H

#include "weight.h"

#if HAVE_AVX512_BF16

enum {
    MR = 12, NR = 32, STEP = 2,
    WIDEST = 1,       /* panels per task: one panel and the tiles stream from the L2 cache fast enough */
    MAX_STEPS = 2048, /* of a panel: 256 KB, in the L2 cache */
    DIVISOR = 128,    /* of where a panel may begin in the contraction: see weight_rows */
};

#include "tiles.h"

static inline __m512i load_bf16(const void *p, uint32_t mask) { return _mm512_maskz_loadu_epi16(mask, p); }

static inline __m512i joined(halves a, halves b)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1);
}

/* 32 float32 -> 32 bfloat16 in order. */
static inline __m512i load_as_bf16(const float *p, uint32_t mask)
{
    return joined(to_bf16((floats)_mm512_maskz_loadu_ps((__mmask16)mask, p)),
                  to_bf16((floats)_mm512_maskz_loadu_ps((__mmask16)(mask >> 16), p + 16)));
}

/* Rows a and b of 32 bfloat16 -> 32 words (a, b). */
static inline void store_interleaved(__m512i a, __m512i b, uint32_t *out)
{
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    _mm512_store_si512(out, _mm512_permutex2var_epi16(a, first, b));
    _mm512_store_si512(out + 16, _mm512_permutex2var_epi16(a, second, b));
}

/* mr rows of x -> words [pair][mr]. With a dropout, zeros where it drops. */
static void pack_rows(const matrix *x, int64_t row, int mr, const dropout *drop, uint32_t *out)
{
    int64_t K = x->columns;
    const uint16_t *from = (const uint16_t *)x->data + row * K;
    for (int64_t k = 0; k < K; k += 32) {
        __m512i v[16];
        uint32_t inside = first_bits(K - k);
        for (int m = 0; m < 16; m++) {
            if (m < mr) {
                uint32_t mask = drop ? inside & kept(drop, row + m, k / 32) : inside;
                v[m] = load_bf16(from + m * K + k, mask);
            } else
                v[m] = _mm512_setzero_si512();
        }
        transpose(v);
        int pairs = (int)min64(16, (K - k + 1) / 2);
        for (int p = 0; p < pairs; p++)
            _mm512_storeu_si512(out + (k / 2 + p) * mr, v[p]);
    }
}

/* C [mr, 32] += L R, or = L R. mr is a constant wherever this is inlined. */
INLINE void multiply_n(int mr, const uint32_t *l, const uint32_t *r, int64_t pairs, float *c, int add)
{
    __m512 acc[MR][2];
#pragma GCC unroll 12
    for (int m = 0; m < mr; m++)
        for (int j = 0; j < 2; j++)
            acc[m][j] = add ? _mm512_loadu_ps(c + m * NR + 16 * j) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh r0 = (__m512bh)_mm512_load_si512(r + p * NR), r1 = (__m512bh)_mm512_load_si512(r + p * NR + 16);
#pragma GCC unroll 12
        for (int m = 0; m < mr; m++) {
            __m512bh word = (__m512bh)_mm512_set1_epi32((int)l[p * mr + m]);
            acc[m][0] = _mm512_dpbf16_ps(acc[m][0], word, r0);
            acc[m][1] = _mm512_dpbf16_ps(acc[m][1], word, r1);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < mr; m++)
        for (int j = 0; j < 2; j++)
            _mm512_storeu_ps(c + m * NR + 16 * j, acc[m][j]);
}

/* 16 rows, each a vector of 32 numbers -> half a panel: 16 columns of `pairs` pairs. */
INLINE void store_transposed(__m512i rows[16], int pairs, uint32_t *out)
{
    transpose(rows);
#pragma GCC unroll 16
    for (int p = 0; p < 16; p++)
        if (p < pairs)
            _mm512_store_si512(out + p * NR, rows[p]);
}

/* 16 rows of the weight, 32 columns from k, any shape: `inside` of the columns and `rows` of the rows are there. */
static void any_weight_rows(const weight *w, int64_t n, int64_t rows, int64_t k, int64_t inside, uint32_t *out)
{
    __m512i v[16];
    for (int i = 0; i < 16; i++) {
        uint16_t numbers[32] = {0};
        if (i < rows)
            decode(w, (n + i) * w->columns + k, inside, BFLOAT16, numbers, 0);
        v[i] = _mm512_loadu_si512(numbers);
    }
    store_transposed(v, (int)((inside + 1) / 2), out);
}

/* The weight's rows n ..., columns [k, end) as the contraction: the panel of the forward product. k is a multiple of
   DIVISOR, the weights in a cache line of codes. Where K is a power of two, the codes of 32 rows fall on a few sets of the
   L1 cache: 16 rows are done with a line before the next 16 begin. */
static void weight_rows(const weight *w, dtype type, int64_t n, int64_t k, int64_t end, uint32_t *out)
{
    (void)type;
    int64_t K = w->columns, mask = w->block_size - 1;
    int shift = __builtin_ctzll((uint64_t)w->block_size);
    floats values = load_floats(w->values);
    for (int64_t line = k; line < end; line += DIVISOR)
        for (int half = 0; half < 2; half++) {
            int64_t first = n + 16 * half;
            __m512i table[8]; /* of two rows each */
            for (int64_t at = line; at < min64(end, line + DIVISOR); at += 32) {
                uint32_t *to = out + (at - k) / 2 * NR + 16 * half;
                int64_t flat = first * K + at;
                if (K % 32 || first + 16 > w->rows) {
                    any_weight_rows(w, first, w->rows - first, at, min64(32, end - at), to);
                    continue;
                }
                if (at == line || K & mask || (flat & mask) == 0) /* a row enters a block */
                    for (int i = 0; i < 8; i++)
                        table[i] = table_pair(w, values, (flat + 2 * i * K) >> shift, (flat + (2 * i + 1) * K) >> shift);
                const uint8_t *codes = w->packed + flat / 2;
                __m512i v[16];
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    v[2 * i] = look_up_pair(codes + i * K, table[i], 0);
                    v[2 * i + 1] = look_up_pair(codes + i * K + K / 2, table[i], 1);
                }
                store_transposed(v, 16, to);
            }
        }
}

/* The weight's columns k ... k + 31, rows [n, end) as the contraction: the panel of the gradient. n is even. */
static void weight_columns(const weight *w, dtype type, int64_t k, int64_t count, int64_t n, int64_t end, uint32_t *out,
                           int64_t stride)
{
    (void)type, (void)count, (void)stride; /* WIDEST is 1 */
    int64_t K = w->columns, length = min64(NR, K - k);
    int aligned = K % 32 == 0, shift = __builtin_ctzll((uint64_t)w->block_size);
    floats values = load_floats(w->values);
    uint16_t line[2][32] = {{0}};
    for (; n < end; n += 2, out += NR) {
        int64_t first = n * K + k, second = n + 1 < end ? first + K : first;
        __m512i a, b;
        if (aligned) {
            __m512i table = table_pair(w, values, first >> shift, second >> shift);
            a = look_up_pair(w->packed + first / 2, table, 0);
            b = look_up_pair(w->packed + second / 2, table, 1);
        } else {
            decode(w, first, length, BFLOAT16, line[0], 0);
            decode(w, second, length, BFLOAT16, line[1], 0);
            a = _mm512_loadu_si512(line[0]);
            b = _mm512_loadu_si512(line[1]);
        }
        if (n + 1 == end)
            b = _mm512_setzero_si512();
        store_interleaved(a, b, out);
    }
}

/* Rows n ... n + 31 of a float32 matrix [rows, columns], its columns [k, end) as the contraction. */
static void float_rows(const matrix *x, dtype type, int64_t n, int64_t k, int64_t end, uint32_t *out)
{
    (void)type;
    for (int64_t at = k; at < end; at += 32)
        for (int half = 0; half < 2; half++) {
            __m512i v[16];
            for (int i = 0; i < 16; i++) {
                int64_t row = n + 16 * half + i;
                v[i] = row < x->rows ? load_as_bf16((const float *)x->data + row * x->columns + at, first_bits(end - at))
                                     : _mm512_setzero_si512();
            }
            store_transposed(v, (int)min64(16, (end - at + 1) / 2), out + (at - k) / 2 * NR + 16 * half);
        }
}

/* Columns k ... k + 31 of a float32 matrix [rows, columns], its rows [n, end) as the contraction. */
static void float_columns(const matrix *x, dtype type, int64_t k, int64_t n, int64_t end, uint32_t *out)
{
    (void)type;
    uint32_t inside = first_bits(x->columns - k);
    for (; n < end; n += 2, out += NR) {
        const float *from = (const float *)x->data + n * x->columns + k;
        __m512i a = load_as_bf16(from, inside);
        __m512i b = n + 1 < end ? load_as_bf16(from + x->columns, inside) : _mm512_setzero_si512();
        store_interleaved(a, b, out);
    }
}

/* Columns k ... k + 31 of x, its rows as the contraction; zeros where it drops. */
static void x_columns(const matrix *x, int64_t k, int64_t count, const dropout *drop, uint32_t *out, int64_t stride)
{
    (void)count, (void)stride; /* WIDEST is 1 */
    uint32_t inside = first_bits(x->columns - k);
    const uint16_t *from = (const uint16_t *)x->data + k;
    for (int64_t m = 0; m < x->rows; m += 2, out += NR) {
        __m512i row[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        for (int i = 0; i < min64(2, x->rows - m); i++) {
            uint32_t mask = drop ? inside & kept(drop, m + i, k / 32) : inside;
            row[i] = load_bf16(from + (m + i) * x->columns, mask);
        }
        store_interleaved(row[0], row[1], out);
    }
}

/* Tokens m and m + 1 of a column of x. */
static inline uint32_t word_of_column(const matrix *x, int64_t m, int64_t column)
{
    const uint16_t *from = (const uint16_t *)x->data + m * x->columns + column;
    return from[0] | (m + 1 < x->rows ? (uint32_t)from[x->columns] << 16 : 0);
}

/* The first n of 32 float32, rounded to bfloat16 or as they are -> out. */
static inline void store(void *out, dtype type, int64_t at, const float *x, int64_t n)
{
    uint32_t inside = first_bits(n);
    if (type == FLOAT32) {
        float *to = (float *)out + at;
        _mm512_mask_storeu_ps(to, (__mmask16)inside, _mm512_loadu_ps(x));
        _mm512_mask_storeu_ps(to + 16, (__mmask16)(inside >> 16), _mm512_loadu_ps(x + 16));
        return;
    }
    _mm512_mask_storeu_epi16((uint16_t *)out + at, inside, joined(to_bf16(load_floats(x)), to_bf16(load_floats(x + 16))));
}

#endif
#endif
