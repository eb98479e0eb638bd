/* x @ W' + bias for a handful of tokens: y[m, n] = sum over k of x[m, k] W[n, k].

   With few tokens, reading the weight is the cost. Each packed byte is read once (for more than 8 tokens again, from the
   cache), looked up in a register and multiplied there; no decoded weight is written anywhere. The accumulators run
   along k and are summed up at the end of a row.

       AVX512-BF16   of bfloat16: 32 pairs multiplied and added to 16 float32 in one instruction
       AVX512        vpermps: 16 float32 looked up in one instruction
       AVX2          vpshufb: 32 bytes looked up in one instruction. Of bfloat16, two for the bytes of the block's weights;
                     of float32, four for those of the codebook, and a multiplication by the scale
       otherwise     a part of a row is decoded into a buffer of L1's size

   A look-up takes codes in the order in which they lie in a register, so x is brought into that order before: the even
   ones meet the high nibbles, the odd ones the low nibbles. Weights are rounded to the dtype of x first, as dequantize
   does; sums are float32. */
#include "lanes.h"

enum {
    PASS = 8,       /* tokens at a time */
    PASSES = 2,
    ROWS = 64,      /* of the weight, per task: its codes are in the L2 cache when the second pass wants them */
    GROUP = 64,     /* weights that are looked up together: 32 bytes of codes */
    ALONE = 1 << 20 /* multiplications that one thread is done with before another is awake: 40 microseconds */
};

typedef struct few_job {
    const weight *w;
    dtype type;       /* of x, bias and y */
    const void *x;    /* as the function that takes rows wants it */
    const void *bias; /* [N] or NULL */
    void *y;          /* [tokens, N] */
    int64_t tokens;
    void (*rows)(const struct few_job *job, int64_t n, int rows);
    int step; /* rows that the function takes at a time */
} few_job;

static inline void store(const few_job *job, int64_t m, int64_t n, float sum)
{
    float bias = job->bias ? number(job->bias, job->type, n) : 0.0f;
    set_number(job->y, job->type, m * job->w->rows + n, sum + bias);
}

static inline float total(lane v)
{
    float sum = 0.0f;
    for (int i = 0; i < LANE; i++)
        sum += v[i];
    return sum;
}

static int64_t padded(int64_t K) { return ceil_div(K, GROUP) * GROUP; }

/* x as float32 [tokens, padded K], 0 behind its end. */
static void widen_rows(const void *x, dtype type, int64_t tokens, int64_t K, float *out)
{
    for (int64_t m = 0; m < tokens; m++)
        for (int64_t k = 0; k < padded(K); k += LANE, out += LANE)
            store_lane(out, load_numbers(x, type, m * K + k, K - k));
}

/* Row n, any shape and block size. */
static void any_row(const few_job *job, int64_t n, int rows)
{
    (void)rows;
    int64_t K = job->w->columns;
    float row[STRETCH];
    lane acc[PASS] = {{0}};
    for (int64_t k = 0; k < K; k += STRETCH) {
        int64_t length = min64(STRETCH, K - k);
        decode_numbers(job->w, job->type, n * K + k, length, row);
        for (int64_t i = length; i % LANE; i++)
            row[i] = 0.0f;
        for (int64_t i = 0; i < length; i += LANE)
            for (int64_t m = 0; m < job->tokens; m++) {
                const float *x = (const float *)job->x + m * padded(K) + k + i;
                acc[m] = multiply_add(load_lane(row + i), load_lane(x), acc[m]);
            }
    }
    for (int64_t m = 0; m < job->tokens; m++)
        store(job, m, n, total(acc[m]));
}

#if HAVE_AVX512_BF16

/* x [tokens, K] -> [K / 64, tokens, 64], and of each 64 the 32 even ones before the odd ones. */
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
INLINE void bf16_block_rows(const few_job *job, int64_t n, int rows, int tokens, int blocks)
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
        const uint16_t *x = (const uint16_t *)job->x + first * tokens;
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

static void bf16_rows(const few_job *job, int64_t n, int rows)
{
#define CASE(R, M) \
    case 16 * R + M: \
        if (job->w->block_size == 32) \
            bf16_block_rows(job, n, R, M, 2); \
        else \
            bf16_block_rows(job, n, R, M, 1); \
        break;
    switch (16 * rows + (int)job->tokens) {
        CASE(2, 3) CASE(2, 4) CASE(2, 5) CASE(2, 6) CASE(2, 7) CASE(2, 8)
        CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(1, 7) CASE(1, 8)
    }
#undef CASE
}

#endif

#if HAVE_AVX512

/* Which of 64 neighbours in x is number j of their group. */
static int in_order(dtype type, int j) { return (void)type, j / 32 * 32 + j % 16 * 2 + j / 16 % 2; }

/* What decodes a group: the table of each of its halves, which are of one block or of two. */
typedef struct {
    lane values, half[2];
} few_table;

static inline few_table make_table(const weight *w, dtype type)
{
    return (void)type, (few_table){load_lane(w->values), {{0}}};
}

static inline void enter_block(few_table *t, dtype type, float a, float b, int blocks)
{
    t->half[0] = round_to(type, t->values * a);
    t->half[1] = blocks == 2 ? round_to(type, t->values * b) : t->half[0];
}

/* Number v of the vectors that a group is: 64 / LANE of them. */
INLINE void look_up_group(const uint8_t *codes, const few_table *t, dtype type,
                          lane out[GROUP / LANE])
{
    (void)type;
    for (int half = 0; half < 2; half++) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + 16 * half)));
        out[2 * half] = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), t->half[half]);
        out[2 * half + 1] = _mm512_permutexvar_ps(bytes, t->half[half]);
    }
}

#elif HAVE_AVX2

static int in_order(dtype type, int j)
{
    int v = j / 8, nibble = v / 4, half = v / 2 % 2, third = v % 2, lane_half = j / 4 % 2, i = j % 4;
    return 32 * lane_half + 16 * half + nibble + (type == BFLOAT16 ? 4 * i + 2 * third : 2 * i + 8 * third);
}

/* What decodes a group. Of float32: bytes of the codebook, and the scales; of bfloat16: bytes of the block's weights. The
   halves of a register are the halves of a group. */
typedef struct {
    __m256 values[2];
    tables bytes;
    lane scale;
} few_table;

static inline few_table make_table(const weight *w, dtype type)
{
    few_table t = {.values = {_mm256_loadu_ps(w->values), _mm256_loadu_ps(w->values + 8)}};
    if (type == FLOAT32)
        t.bytes = tables32(t.values[0], t.values[1]);
    return t;
}

static inline tables bf16_tables(const few_table *t, float scale)
{
    return tables16(narrowed(t->values[0] * scale, t->values[1] * scale, BFLOAT16));
}

static inline void enter_block(few_table *t, dtype type, float a, float b, int blocks)
{
    if (type == FLOAT32) {
        t->scale = _mm256_insertf128_ps(all_lanes(a), _mm_set1_ps(blocks == 2 ? b : a), 1);
        return;
    }
    t->bytes = bf16_tables(t, a);
    if (blocks == 2) {
        tables second = bf16_tables(t, b);
        for (int i = 0; i < 2; i++)
            t->bytes.byte[i] = _mm256_blend_epi32(t->bytes.byte[i], second.byte[i], 0xf0);
    }
}

INLINE void look_up_group(const uint8_t *codes, const few_table *t, dtype type,
                          lane out[GROUP / LANE])
{
    const __m256i nibble = _mm256_set1_epi8(15), above = _mm256_set1_epi32((int)0xffff0000);
    __m256i bytes = _mm256_loadu_si256((const __m256i *)codes);
    __m256i index[2] = {_mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), _mm256_and_si256(bytes, nibble)};
    for (int i = 0; i < 2; i++) {
        if (type == FLOAT32) {
            look_up32(index[i], t->bytes, out + 4 * i);
            for (int j = 0; j < 4; j++)
                out[4 * i + j] *= t->scale;
            continue;
        }
        __m256i l = _mm256_shuffle_epi8(t->bytes.byte[0], index[i]);
        __m256i h = _mm256_shuffle_epi8(t->bytes.byte[1], index[i]);
        for (int j = 0; j < 2; j++) {
            __m256i words = j ? _mm256_unpackhi_epi8(l, h) : _mm256_unpacklo_epi8(l, h);
            out[4 * i + 2 * j] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
            out[4 * i + 2 * j + 1] = _mm256_castsi256_ps(_mm256_and_si256(words, above));
        }
    }
}

#endif

#if HAVE_AVX512 || HAVE_AVX2

/* x [tokens, K] -> float32 [K / 64, tokens, 64], each 64 in the order of a look-up. */
static void order_groups(const void *x, dtype type, int64_t tokens, int64_t K, float *out)
{
    int order[GROUP];
    for (int j = 0; j < GROUP; j++)
        order[j] = in_order(type, j);
    for (int64_t k = 0; k < K; k += GROUP)
        for (int64_t m = 0; m < tokens; m++, out += GROUP)
            for (int j = 0; j < GROUP; j++)
                out[j] = number(x, type, m * K + k + order[j]);
}

static __attribute__((noinline)) void row_scales(const weight *w, int64_t first, int64_t length, float *out)
{
    int shift = __builtin_ctzll((uint64_t)w->block_size);
    block_scales(w, first >> shift, ceil_div(length, w->block_size), out);
}

/* Row n times `tokens` tokens. Inlined with a constant count and type. */
INLINE void f32_block_row(const few_job *job, int64_t n, int tokens, dtype type)
{
    enum { VECTORS = GROUP / LANE };
    const weight *w = job->w;
    int blocks = w->block_size == 32 ? 2 : 1; /* that a group is; 1 for a part of one, too */
    int64_t K = w->columns, inside = w->block_size - 1;
    int shift = __builtin_ctzll((uint64_t)w->block_size);
    int chains = tokens <= 2 ? 4 : tokens <= 6 ? 2 : 1; /* a sum waits 4 cycles for the one before */
    few_table t = make_table(w, type);
    lane acc[PASS][4];
#pragma GCC unroll 8
    for (int m = 0; m < tokens; m++)
        for (int c = 0; c < chains; c++)
            acc[m][c] = all_lanes(0.0f);
    const float *x = job->x;
    for (int64_t first = 0; first < K; first += STRETCH) {
        int64_t length = min64(STRETCH, K - first);
        const uint8_t *codes = w->packed + (n * K + first) / 2;
        float scales[STRETCH / 32];
        row_scales(w, n * K + first, length, scales);
        for (int64_t k = 0; k < length; k += GROUP, x += GROUP * tokens) {
            lane weights[VECTORS];
            if ((k & inside) == 0)
                enter_block(&t, type, scales[k >> shift], scales[(k >> shift) + blocks - 1], blocks);
            look_up_group(codes + k / 2, &t, type, weights);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++)
#pragma GCC unroll 8
                for (int m = 0; m < tokens; m++)
                    acc[m][v % chains] = multiply_add(weights[v], load_lane(x + GROUP * m + LANE * v), acc[m][v % chains]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < tokens; m++) {
        for (int c = 1; c < chains; c++)
            acc[m][0] += acc[m][c];
        store(job, m, n, total(acc[m][0]));
    }
}

#define CASE(TYPE, M) \
    case M: \
        f32_block_row(job, n, M, TYPE); \
        break;
#define CASES(TYPE) \
    switch (job->tokens) { \
        CASE(TYPE, 1) CASE(TYPE, 2) CASE(TYPE, 3) CASE(TYPE, 4) CASE(TYPE, 5) CASE(TYPE, 6) CASE(TYPE, 7) CASE(TYPE, 8) \
    }

static void f32_row(const few_job *job, int64_t n, int rows)
{
    (void)rows;
    if (job->type == FLOAT32)
        CASES(FLOAT32)
    else
#if HAVE_AVX512 /* only rounding a block's table asks for the type: bfloat16 and float16 share a copy */
        CASES(job->type)
#else
        CASES(BFLOAT16)
#endif
}

#endif

static void few_rows(void *data, int64_t index)
{
    for (const few_job *job = data; job < (const few_job *)data + PASSES && job->tokens; job++) {
        int64_t n = index * ROWS, end = min64(job->w->rows, n + ROWS);
        for (; n < end; n += job->step)
            job->rows(job, n, (int)min64(job->step, end - n));
    }
}

/* Chooses the function for a job, and brings x into the form that it takes. */
static void prepare(few_job *job, float *own)
{
    int64_t K = job->w->columns;
    int whole = K % job->w->block_size == 0 && K % GROUP == 0;
    (void)whole;
    const void *x = job->x;
    job->x = own;
    job->step = 1;
#if HAVE_AVX512_BF16
    if (whole && job->type == BFLOAT16) {
        split_pairs(x, job->tokens, K, (uint16_t *)own);
        job->rows = bf16_rows;
        /* Two rows share what is loaded of x. One row alone is read as one stream, which the processor foresees best. */
        job->step = job->tokens <= 2 ? 1 : 2;
        return;
    }
#endif
#if HAVE_AVX512 || HAVE_AVX2
    if (whole && (LANE == 16 || job->type != FLOAT16)) {
        order_groups(x, job->type, job->tokens, K, own);
        job->rows = f32_row;
        return;
    }
#endif
    widen_rows(x, job->type, job->tokens, K, own);
    job->rows = any_row;
}

/* x [tokens, K], bias [N] or NULL -> y [tokens, N], all of the dtype `type`; 1 <= tokens <= 16. */
EXPORT void qloralab_linear_few(const weight *w, int type, const void *x, int64_t tokens, const void *bias, void *y,
                                int threads)
{
    int64_t K = w->columns, first = tokens <= PASS ? tokens : tokens / 2, size = size_of((dtype)type);
    few_job jobs[PASSES] = {{.w = w, .type = (dtype)type, .x = x, .bias = bias, .y = y, .tokens = first}};
    jobs[1] = jobs[0];
    jobs[1].x = (const char *)x + first * K * size;
    jobs[1].y = (char *)y + first * w->rows * size;
    jobs[1].tokens = tokens - first;
    float *own = scratch((size_t)(tokens * padded(K)) * 4);
    prepare(&jobs[0], own);
    prepare(&jobs[1], own + first * padded(K));
    if (w->rows * K * tokens < ALONE)
        threads = 1;
    for_each(ceil_div(w->rows, ROWS), threads, few_rows, jobs);
}
