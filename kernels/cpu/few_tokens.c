/* x @ W' + bias for a handful of tokens: y[m, n] = sum over k of x[m, k] W[n, k].

   With few tokens, reading the weight is the cost. Each packed byte is read once (for more than 8 tokens again, from the
   cache), looked up in a register and multiplied there; no decoded weight is written anywhere. The accumulators run
   along k and are summed up at the end of a row.

   AVX512-BF16 multiplies 32 pairs of bfloat16 and adds them to 16 float32 in one instruction. Elsewhere a row is decoded
   into a buffer of L1's size and multiplied in float32, from the same bfloat16 weights. */
#include "weight.h"

enum {
    PASS = 8,       /* tokens at a time */
    PASSES = 2,
    ROWS = 64,      /* of the weight, per task: its codes are in the L2 cache when the second pass wants them */
    STRETCH = 4096, /* weights of a row at a time */
};
enum { ALONE = 1 << 20 }; /* multiplications that one thread is done with before another is awake: 40 microseconds */

typedef struct {
    const weight *w;
    const uint16_t *x;    /* bfloat16 [tokens, K] */
    const uint16_t *bias; /* bfloat16 [N] or NULL */
    uint16_t *y;          /* bfloat16 [tokens, N] */
    int64_t tokens;
    int split; /* x is as split_pairs leaves it */
} few_job;

static inline void store(const few_job *job, int64_t m, int64_t n, float sum)
{
    sum += job->bias ? from_bf16(job->bias[n]) : 0.0f;
    job->y[m * job->w->rows + n] = bf16(sum);
}

static inline floats widen(const uint16_t *p)
{
    halves h;
    memcpy(&h, p, sizeof h);
    return (floats)(__builtin_convertvector(h, words) << 16);
}

static inline float total(floats v)
{
    float sum = 0.0f;
    for (int i = 0; i < 16; i++)
        sum += v[i];
    return sum;
}

/* Row n, any shape and block size. */
static void any_row(const few_job *job, int64_t n)
{
    int64_t K = job->w->columns;
    uint16_t row[STRETCH], rest[16] = {0};
    floats acc[PASS] = {{0}};
    for (int64_t k = 0; k < K; k += STRETCH) {
        int64_t length = min64(STRETCH, K - k), i = 0;
        decode(job->w, n * K + k, length, BFLOAT16, row, 0);
        for (; i + 16 <= length; i += 16)
            for (int64_t m = 0; m < job->tokens; m++)
                acc[m] += widen(row + i) * widen(job->x + m * K + k + i);
        for (; i < length; i += 16) { /* the last few, completed by zeros */
            size_t bytes = 2 * (size_t)(length - i);
            memset(row + length, 0, 32 - bytes);
            for (int64_t m = 0; m < job->tokens; m++) {
                memcpy(rest, job->x + m * K + k + i, bytes);
                acc[m] += widen(row + i) * widen(rest);
            }
        }
    }
    for (int64_t m = 0; m < job->tokens; m++)
        store(job, m, n, total(acc[m]));
}

#if HAVE_AVX512 && defined(__AVX512BF16__)

/* x [tokens, K] -> [K / 64, tokens, 64], and of each 64 the 32 even ones before the odd ones: the even ones meet the high
   nibbles of 32 bytes, the odd ones the low nibbles. */
static void split_pairs(const uint16_t *x, int64_t tokens, int64_t K, uint16_t *out)
{
    for (int64_t k = 0; k < K; k += 64)
        for (int64_t m = 0; m < tokens; m++, out += 64)
            for (int j = 0; j < 32; j++) {
                out[j] = x[m * K + k + 2 * j];
                out[32 + j] = x[m * K + k + 2 * j + 1];
            }
}

/* `rows` rows from n times `tokens` tokens. Inlined with constant counts, and with a constant `blocks`: how many blocks
   64 weights are: 2, or 1 for a block of 64 or a part of a larger one. */
static inline __attribute__((always_inline)) void block_rows(const few_job *job, int64_t n, int rows, int tokens,
                                                             int blocks)
{
    const weight *w = job->w;
    int64_t K = w->columns, inside = w->block_size - 1;
    int other = rows * tokens < 8; /* a second chain of sums where there are few */
    int shift = __builtin_ctzll((uint64_t)w->block_size);
    __m512 values = (__m512)load_floats(w->values);
    __m512i nibble = _mm512_set1_epi16(15), bit4 = _mm512_setzero_si512();
    if (blocks == 2)
        bit4 = _mm512_inserti64x4(bit4, _mm256_set1_epi16(16), 1);
    __m512 acc[2][PASS][2];
    for (int r = 0; r < rows; r++)
        for (int m = 0; m < tokens; m++)
            acc[r][m][0] = acc[r][m][1] = _mm512_setzero_ps();
    for (int64_t first = 0; first < K; first += STRETCH) {
        int64_t length = min64(STRETCH, K - first);
        float scales[2][STRETCH / 32];
        __m512i table[2];
        const uint8_t *codes[2];
        for (int r = 0; r < rows; r++) {
            uint64_t flat = (uint64_t)((n + r) * K + first);
            codes[r] = w->packed + flat / 2;
            block_scales(w, (int64_t)(flat >> shift), length >> shift, scales[r]);
        }
        const uint16_t *x = job->x + first * tokens;
        for (int64_t k = 0; k < length; k += 64, x += 64 * tokens) {
            __m512bh even[2], odd[2];
            for (int r = 0; r < rows; r++) {
                if ((k & inside) == 0) { /* bit 4 of an index chooses between two blocks; it does not count for one */
                    __m512 a = _mm512_mul_ps(values, _mm512_set1_ps(scales[r][k >> shift]));
                    __m512 b = blocks == 2 ? _mm512_mul_ps(values, _mm512_set1_ps(scales[r][(k >> shift) + 1])) : a;
                    table[r] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
                }
                if (k % 128 == 0) /* a cache line of codes: ask for that of the rows to come */
                    _mm_prefetch((const char *)codes[r] + k / 2 + rows * K / 2, _MM_HINT_T0);
                __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes[r] + k / 2)));
                __m512i high = _mm512_srli_epi16(bytes, 4), low = bytes;
                if (blocks == 2) {
                    high = _mm512_or_si512(high, bit4);
                    low = _mm512_ternarylogic_epi32(bytes, nibble, bit4, 0xea); /* (bytes & nibble) | bit4 */
                }
                even[r] = (__m512bh)_mm512_permutexvar_epi16(high, table[r]);
                odd[r] = (__m512bh)_mm512_permutexvar_epi16(low, table[r]);
            }
            for (int m = 0; m < tokens; m++) {
                __m512bh x0 = (__m512bh)_mm512_load_si512(x + 64 * m), x1 = (__m512bh)_mm512_load_si512(x + 64 * m + 32);
                for (int r = 0; r < rows; r++) {
                    acc[r][m][0] = _mm512_dpbf16_ps(acc[r][m][0], even[r], x0);
                    acc[r][m][other] = _mm512_dpbf16_ps(acc[r][m][other], odd[r], x1);
                }
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int m = 0; m < tokens; m++)
            store(job, m, n + r, _mm512_reduce_add_ps(_mm512_add_ps(acc[r][m][0], acc[r][m][1])));
}

static void some_rows(const few_job *job, int64_t n, int rows)
{
    if (!job->split) {
        for (int r = 0; r < rows; r++)
            any_row(job, n + r);
        return;
    }
#define CASE(R, M) \
    case 16 * R + M: \
        if (job->w->block_size == 32) \
            block_rows(job, n, R, M, 2); \
        else \
            block_rows(job, n, R, M, 1); \
        break;
    switch (16 * rows + (int)job->tokens) {
        CASE(2, 3) CASE(2, 4) CASE(2, 5) CASE(2, 6) CASE(2, 7) CASE(2, 8)
        CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(1, 7) CASE(1, 8)
    }
#undef CASE
}

/* Two rows share what is loaded of x. One row alone is read as one stream, which the processor foresees best. */
static int rows_at_once(int64_t tokens) { return tokens <= 2 ? 1 : 2; }

#else

static void some_rows(const few_job *job, int64_t n, int rows)
{
    for (int r = 0; r < rows; r++)
        any_row(job, n + r);
}

static int rows_at_once(int64_t tokens) { return (void)tokens, 1; }

#endif

static void few_rows(void *data, int64_t index)
{
    for (const few_job *job = data; job < (const few_job *)data + PASSES && job->tokens; job++) {
        int64_t n = index * ROWS, end = min64(job->w->rows, n + ROWS);
        int step = rows_at_once(job->tokens);
        for (; n + step <= end; n += step)
            some_rows(job, n, step);
        for (; n < end; n++)
            some_rows(job, n, 1);
    }
}

/* bfloat16 x [tokens, K], bias [N] or NULL -> y [tokens, N], 1 <= tokens <= 16. */
EXPORT void qloralab_linear_few(const weight *w, const uint16_t *x, int64_t tokens, const uint16_t *bias, uint16_t *y,
                                int threads)
{
    int64_t first = tokens <= PASS ? tokens : tokens / 2;
    few_job jobs[PASSES] = {
        {w, x, bias, y, first, 0},
        {w, x + first * w->columns, bias, y + first * w->rows, tokens - first, 0},
    };
#if HAVE_AVX512 && defined(__AVX512BF16__)
    if (w->columns % w->block_size == 0 && w->columns % 64 == 0) {
        uint16_t *split = scratch((size_t)(tokens * w->columns) * 2);
        for (few_job *job = jobs; job < jobs + PASSES; job++) {
            split_pairs(job->x, job->tokens, w->columns, split);
            job->x = split;
            job->split = 1;
            split += job->tokens * w->columns;
        }
    }
#endif
    if (w->rows * w->columns * tokens < ALONE)
        threads = 1;
    for_each(ceil_div(w->rows, ROWS), threads, few_rows, jobs);
}
