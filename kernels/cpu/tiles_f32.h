/* The arithmetic of products in float32. A word is one number; what is bfloat16 or float16 is widened when it is packed,
   and the weight is rounded to that dtype first, so that every implementation multiplies by the same weights.

                  lane             MR x NR    sums in registers, of
       AVX512     16 float32       12 x 32    24 of 32
       AVX2       8                6 x 16     12 of 16
       NEON       4                4 x 16     16 of 32
       portable   4                4 x 8      8 of 16 (SSE2)

   A step of AVX2 loads 2 vectors and 6 numbers for 12 fused multiply-adds: 6 cycles of two units that multiply, and of two
   that load. For that, what is loaded has to be near: a part of a panel, 384 steps (24 KB), stays in the L1 cache while all
   tiles pass it, and WIDEST panels share a pass, so that the tiles, which come from further away, are read less often. */
#ifndef QLORALAB_TILES_F32_H
#define QLORALAB_TILES_F32_H

#include "lanes.h"

#if HAVE_AVX512
enum { MR = 12, NR = 32, MAX_STEPS = 256 };
#elif HAVE_AVX2
enum { MR = 6, NR = 16, MAX_STEPS = 384 };
#elif HAVE_NEON
enum { MR = 4, NR = 16, MAX_STEPS = 384 };
#else
enum { MR = 4, NR = 8, MAX_STEPS = 384 };
#endif
enum { STEP = 1, VECTORS = NR / LANE, WIDEST = 4, DIVISOR = 32 /* codes that one step of decoding takes */ };
enum { AHEAD = 16 }; /* rows whose codes are asked for */

#include "tiles.h"

/* C [mr, NR] += L R, or = L R. The parts of a contraction are sums of their own: the error of a sum grows with its length.
   mr is a constant wherever this is inlined. */
INLINE void multiply_n(int mr, const uint32_t *left, const uint32_t *right, int64_t steps, float *c, int add)
{
    const float *l = (const float *)left, *r = (const float *)right;
    lane acc[MR][VECTORS];
#pragma GCC unroll 12
    for (int m = 0; m < mr; m++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++)
            acc[m][j] = all_lanes(0.0f);
#pragma GCC unroll 4
    for (int64_t p = 0; p < steps; p++) {
        lane row[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++)
            row[j] = load_lane(r + p * NR + LANE * j);
#pragma GCC unroll 12
        for (int m = 0; m < mr; m++) {
            lane one = all_lanes(l[p * mr + m]);
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++)
                acc[m][j] = multiply_add(one, row[j], acc[m][j]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < mr; m++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) {
            float *at = c + m * NR + LANE * j;
            if (add)
                acc[m][j] += load_lane(at);
            store_lane(at, acc[m][j]);
        }
}

/* mr rows of x -> words [column][mr]. With a dropout, zeros where it drops. */
static void pack_rows(const matrix *x, int64_t row, int mr, const dropout *drop, uint32_t *out)
{
    int64_t K = x->columns;
    for (int64_t k = 0; k < K; k += 32) {
        uint32_t keep[MR];
        for (int m = 0; drop && m < mr; m++)
            keep[m] = kept(drop, row + m, k / 32);
        for (int64_t j = 0; j < min64(32, K - k); j += LANE) {
            lane v[LANE];
            for (int m = 0; m < LANE; m++) {
                if (m >= mr) {
                    v[m] = all_lanes(0.0f);
                    continue;
                }
                v[m] = load_numbers(x->data, x->type, (row + m) * K + k + j, K - k - j);
                if (drop)
                    v[m] = where(keep[m] >> j, v[m]);
            }
            transpose_lanes(v);
            for (int64_t p = 0; p < min64(LANE, K - k - j); p++)
                store_lane(out + (k + j + p) * mr, v[p]);
        }
    }
}

/* Rows n ... n + NR - 1 of a float32 matrix, its columns [k, end) as the contraction, rounded to the dtype. */
static void float_rows(const matrix *x, dtype type, int64_t n, int64_t k, int64_t end, uint32_t *out)
{
    for (; k < end; k += LANE)
        for (int group = 0; group < NR; group += LANE) {
            lane v[LANE];
            for (int i = 0; i < LANE; i++) {
                int64_t row = n + group + i;
                v[i] = row < x->rows ? load_numbers(x->data, FLOAT32, row * x->columns + k, end - k) : all_lanes(0.0f);
                v[i] = round_to(type, v[i]);
            }
            transpose_lanes(v);
            for (int64_t p = 0; p < min64(LANE, end - k); p++)
                store_lane(out + p * NR + group, v[p]);
            if (group + LANE == NR)
                out += LANE * NR;
        }
}

/* Columns k ... k + NR - 1 of a float32 matrix, its rows [n, end) as the contraction, rounded to the dtype. */
static void float_columns(const matrix *x, dtype type, int64_t k, int64_t n, int64_t end, uint32_t *out)
{
    for (; n < end; n++, out += NR)
        for (int j = 0; j < NR; j += LANE)
            store_lane(out + j, round_to(type, load_numbers(x->data, FLOAT32, n * x->columns + k + j, x->columns - k - j)));
}

/* The columns of x from k on, `count` panels of them, its rows as the contraction; zeros where it drops. The panels follow
   each other every `stride` words: of each row all are taken while it is near. */
static void x_columns(const matrix *x, int64_t k, int64_t count, const dropout *drop, uint32_t *out, int64_t stride)
{
    int64_t K = x->columns;
    for (int64_t m = 0; m < x->rows; m++, out += NR) {
        uint32_t keep = ~0u;
        for (int64_t p = 0; p < count; p++) {
            int64_t at = k + p * NR;
            __builtin_prefetch((const char *)x->data + ((m + AHEAD) * K + at) * size_of(x->type));
            if (drop && (p == 0 || at % 32 == 0))
                keep = kept(drop, m, at / 32);
            for (int j = 0; j < NR; j += LANE) {
                lane v = load_numbers(x->data, x->type, m * K + at + j, K - at - j);
                store_lane(out + p * stride + j, drop ? where(keep >> (at % 32 + j), v) : v);
            }
        }
    }
}

/* Number m of a column of x. */
static inline uint32_t word_of_column(const matrix *x, int64_t m, int64_t column)
{
    float value = number(x->data, x->type, m * x->columns + column);
    uint32_t word;
    memcpy(&word, &value, 4);
    return word;
}

/* The first n of NR float32, rounded to the dtype -> out. */
static inline void store(void *out, dtype type, int64_t at, const float *x, int64_t n)
{
    if (type == FLOAT32) {
        float *to = (float *)out + at;
        for (int j = 0; n >= NR && j < NR; j += LANE)
            store_lane(to + j, load_lane(x + j));
        for (int i = 0; n < NR && i < n; i++)
            to[i] = x[i];
        return;
    }
    if (n >= NR && NR % 16 == 0)
        for (int j = 0; j + 16 <= NR; j += 16) {
            halves h = to_halves(load_floats(x + j), type);
            memcpy((uint16_t *)out + at + j, &h, sizeof h);
        }
    else
        for (int i = 0; i < min64(NR, n); i++)
            set_number(out, type, at + i, x[i]);
}

/* Any NR rows of the weight, up to 32 columns from k on. */
static void any_weight_rows(const weight *w, dtype type, int64_t n, int64_t k, int64_t columns, float *out)
{
    float row[32];
    for (int i = 0; i < NR; i++) {
        if (n + i < w->rows)
            decode_numbers(w, type, (n + i) * w->columns + k, columns, row);
        else
            memset(row, 0, sizeof row);
        for (int64_t p = 0; p < columns; p++)
            out[p * NR + i] = row[p];
    }
}

#if HAVE_AVX2

/* 16 rows of the weight from n on, 32 columns from k on, all there. The codes are transposed, 16 bytes of each row, before
   they are looked up: a byte is two columns. */
static inline void weight_block(const weight *w, dtype type, tables t, const lane scales[2], int64_t n, int64_t k,
                                float *out)
{
    static const int order[8] = {0, 1, 2, 3, 8, 9, 10, 11}; /* rows in half 0; those 4 further are in half 1 */
    const __m256i nibble = _mm256_set1_epi8(15);
    int64_t K = w->columns;
    const uint8_t *codes = w->packed + (n * K + k) / 2;
    __m256i v[8], u[8];
    for (int i = 0; i < 8; i++) {
        const uint8_t *row = codes + order[i] * (K / 2);
        v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)row)),
                                       _mm_loadu_si128((const __m128i *)(row + 2 * K)), 1);
    }
    for (int i = 0; i < 8; i += 2) { /* pairs of rows: bytes 0 ... 7, then 8 ... 15 */
        u[i / 2] = _mm256_unpacklo_epi8(v[i], v[i + 1]);
        u[4 + i / 2] = _mm256_unpackhi_epi8(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 2) { /* fours of rows: bytes 0 ... 3, 4 ... 7, 8 ... 11, 12 ... 15 */
        v[i / 4 * 4 + i % 4 / 2] = _mm256_unpacklo_epi16(u[i], u[i + 1]);
        v[i / 4 * 4 + 2 + i % 4 / 2] = _mm256_unpackhi_epi16(u[i], u[i + 1]);
    }
    for (int i = 0; i < 8; i += 2) { /* all eight rows: two bytes of each */
        u[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        u[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i++) /* bytes 2i and 2i + 1: columns 4i ... 4i + 3 */
        for (int odd = 0; odd < 2; odd++) {
            __m256 x[4];
            __m256i c = _mm256_and_si256(odd ? u[i] : _mm256_srli_epi16(u[i], 4), nibble);
            look_up32(c, t, x);
            float *to = out + (4 * i + odd) * NR;
            for (int j = 0; j < 2; j++) {
                _mm256_store_ps(to + 8 * j, round_to(type, x[j] * scales[j]));
                _mm256_store_ps(to + 2 * NR + 8 * j, round_to(type, x[2 + j] * scales[j]));
            }
        }
}

#endif

/* The weight's rows n ..., columns [k, end) as the contraction: the panel of the forward product. k is a multiple of
   DIVISOR. */
INLINE void typed_weight_rows(dtype type, const weight *w, int64_t n, int64_t k, int64_t end, float *out)
{
    int64_t K = w->columns;
    int whole = K % 32 == 0 && n + NR <= w->rows;
#if HAVE_AVX512
    int shift = __builtin_ctzll((uint64_t)w->block_size);
    lane values = load_lane(w->values), table[NR];
#elif HAVE_AVX2
    int shift = __builtin_ctzll((uint64_t)w->block_size);
    int64_t mask = w->block_size - 1;
    tables t = tables32(_mm256_loadu_ps(w->values), _mm256_loadu_ps(w->values + 8));
    lane scales[2] = {all_lanes(0.0f), all_lanes(0.0f)};
#endif
    for (int64_t at = k; at < end; at += 32, out += 32 * NR) {
        int64_t flat = n * K + at;
        (void)flat;
        if (!whole) {
            any_weight_rows(w, type, n, at, min64(32, end - at), out);
            continue;
        }
#if HAVE_AVX512
        for (int group = 0; group < NR; group += 16)
            for (int half = 0; half < 2; half++) {
                lane v[16];
                for (int i = 0; i < 16; i++) {
                    int64_t first = flat + (group + i) * K + 16 * half;
                    if (half == 0)
                        table[group + i] = round_to(type, values * block_scale(w, first >> shift));
                    v[i] = look_up_floats(w->packed + first / 2, table[group + i]);
                }
                transpose_lanes(v);
                for (int p = 0; p < 16; p++)
                    store_lane(out + (16 * half + p) * NR + group, v[p]);
            }
#elif HAVE_AVX2
        if (at == k || K & mask || (flat & mask) == 0) { /* a row enters a block */
            float s[NR];
            for (int i = 0; i < NR; i++)
                s[i] = block_scale(w, (flat + i * K) >> shift);
            scales[0] = load_lane(s);
            scales[1] = load_lane(s + 8);
        }
        weight_block(w, type, t, scales, n, at, out);
#else
        any_weight_rows(w, type, n, at, 32, out);
#endif
    }
}

/* The weight's columns from k on, `count` panels of them, rows [n, end) as the contraction: panels of the gradient, which
   follow each other every `stride` numbers. A row has a cache line of codes for 128 columns: all panels take theirs while it
   is near. */
INLINE void typed_weight_columns(dtype type, const weight *w, int64_t k, int64_t count, int64_t n, int64_t end,
                                 float *out, int64_t stride)
{
    int64_t K = w->columns;
#if HAVE_AVX512
    int64_t whole = K % 32 == 0 ? count : 0; /* panels */
    int shift = __builtin_ctzll((uint64_t)w->block_size);
    lane values = load_lane(w->values);
    for (int64_t row = n; whole && row < end; row++) {
        __builtin_prefetch(w->packed + ((row + AHEAD) * K + k) / 2);
        for (int64_t p = 0; p < whole; p++) {
            int64_t first = row * K + k + p * NR;
            lane table = round_to(type, values * block_scale(w, first >> shift));
            for (int half = 0; half < 2; half++)
                store_lane(out + p * stride + (row - n) * NR + 16 * half,
                           look_up_floats(w->packed + first / 2 + 8 * half, table));
        }
    }
    if (whole)
        return;
#elif HAVE_AVX2
    if (K % 32 == 0) { /* two rows at a time, 16 columns of each */
        int shift = __builtin_ctzll((uint64_t)w->block_size);
        tables t = tables32(_mm256_loadu_ps(w->values), _mm256_loadu_ps(w->values + 8));
        for (; n + 2 <= end; n += 2, out += 2 * NR) {
            lane a = all_lanes(0.0f), b = a;
            for (int i = 0; i < 2; i++)
                __builtin_prefetch(w->packed + ((n + i + AHEAD) * K + k) / 2);
            for (int64_t p = 0; p < count; p++) {
                int64_t first = n * K + k + p * NR, second = first + K;
                float *to = out + p * stride;
                if (p == 0 || first >> shift != (first - NR) >> shift || second >> shift != (second - NR) >> shift) {
                    a = all_lanes(block_scale(w, first >> shift));
                    b = all_lanes(block_scale(w, second >> shift));
                }
                __m128i both = _mm_loadl_epi64((const __m128i *)(w->packed + first / 2));
                both = _mm_unpacklo_epi64(both, _mm_loadl_epi64((const __m128i *)(w->packed + second / 2)));
                __m256 x[4];
                look_up32(indices_of(both, 1), t, x);
                _mm256_store_ps(to, round_to(type, x[0] * a));
                _mm256_store_ps(to + 8, round_to(type, x[1] * a));
                _mm256_store_ps(to + NR, round_to(type, x[2] * b));
                _mm256_store_ps(to + NR + 8, round_to(type, x[3] * b));
            }
        }
    }
#endif
    for (; n < end; n++, out += NR)
        for (int64_t p = 0; p < count; p++) {
            float row[32] = {0};
            int64_t first = k + p * NR;
            decode_numbers(w, type, n * K + first, min64(NR, K - first), row);
            memcpy(out + p * stride, row, NR * sizeof *out);
        }
}

static void weight_rows(const weight *w, dtype type, int64_t n, int64_t k, int64_t end, uint32_t *out)
{
    CALL_TYPED(typed_weight_rows, type, w, n, k, end, (float *)out);
}

static void weight_columns(const weight *w, dtype type, int64_t k, int64_t count, int64_t n, int64_t end, uint32_t *out,
                           int64_t stride)
{
    CALL_TYPED(typed_weight_columns, type, w, k, count, n, end, (float *)out, stride);
}

#endif
