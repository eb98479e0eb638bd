/* Weights -> packed codes and scales; scales -> 8-bit codes. The steps of nf4/blockwise.py and nf4/double_quant.py. */
#include "weight.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

enum { CHUNK = 1 << 14, MAX_BLOCK = 4096, SCALES_PER_BLOCK = 256 };

/* The largest magnitude of n floats, n a multiple of 16; NaN if there is one. */
static float largest_of_floats(const float *x, int64_t n)
{
    words top = {0};
    for (int64_t i = 0; i < n; i += 16) {
        words m = (words)load_floats(x + i) & 0x7fffffffu; /* ordered as the magnitudes are, NaN above infinity */
        words larger = (words)(m > top);
        top = (larger & m) | (~larger & top);
    }
    uint32_t best = 0;
    for (int i = 0; i < 16; i++)
        best = top[i] > best ? top[i] : best;
    float value;
    memcpy(&value, &best, 4);
    return value;
}

/* The factor of a block's numbers by the policy of nf4/blockwise.py, 0 for a block of zeros; *exact asks for the quotient
   by absmax instead. */
static inline float reciprocal(float absmax, int *exact)
{
    float r = absmax == 0.0f ? 0.0f : 1.0f / absmax;
    *exact = absmax != 0.0f && (absmax < FLT_MIN || r < FLT_MIN);
    return r;
}

typedef struct {
    const void *x;
    dtype type;
    int64_t numel, block_size;
    const float *thresholds; /* [15]: a number above i of them has rank i among the values of the codebook */
    const uint8_t *codes;    /* [256]: a byte of two ranks -> a byte of their codes; NULL where ranks are codes */
    uint8_t *packed;
    float *absmax;
} quantize_job;

#if HAVE_AVX2

/* 15 thresholds as a tree of four levels. A node is known by how many of its level are on its left, as -1, -2, ..., since a
   comparison that is true adds -1; the low bits of such a number index a permutation, so number i has index -i in its level.
   Only the last level needs a permutation across the halves of a register. */
typedef struct {
    __m256 level[4];
} tree;

/* Every step-th of 16 * step - 1 thresholds. */
static tree make_tree(const float *thresholds, int step)
{
    tree t;
    for (int level = 0; level < 4; level++) {
        float nodes[8];
        for (int i = 0; i < 8; i++) /* a level of fewer than eight is repeated */
            nodes[-i & 7] = thresholds[step * ((16 >> level) * (i & ((1 << level) - 1)) + (8 >> level)) - 1];
        t.level[level] = _mm256_loadu_ps(nodes);
    }
    return t;
}

/* Minus how many thresholds are below each of eight numbers. */
static inline __m256i ranks8(__m256 q, const tree *t)
{
    __m256i node = _mm256_castps_si256(_mm256_cmp_ps(q, t->level[0], _CMP_GT_OQ));
    for (int level = 1; level < 4; level++) {
        __m256 threshold = level == 3 ? _mm256_permutevar8x32_ps(t->level[3], node)
                                      : _mm256_permutevar_ps(t->level[level], node);
        __m256i above = _mm256_castps_si256(_mm256_cmp_ps(q, threshold, _CMP_GT_OQ));
        node = _mm256_add_epi32(_mm256_add_epi32(node, node), above);
    }
    return node;
}

/* 16 numbers from x on as float32: 0 to 3 and 8 to 11, the others. */
static inline void load16(const char *x, dtype type, __m256 *even, __m256 *odd)
{
    if (type == FLOAT32) {
        const float *p = (const float *)x;
        *even = _mm256_set_m128(_mm_loadu_ps(p + 8), _mm_loadu_ps(p));
        *odd = _mm256_set_m128(_mm_loadu_ps(p + 12), _mm_loadu_ps(p + 4));
        return;
    }
    __m256i h = _mm256_loadu_si256((const __m256i *)x);
    if (type == BFLOAT16) {
        *even = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), h));
        *odd = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), h));
    } else {
        h = _mm256_permute4x64_epi64(h, 0xd8);
        *even = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
        *odd = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
    }
}

/* The largest magnitude of n numbers, n a multiple of 32; NaN if there is one. Without the sign, the bits of numbers are
   ordered as the numbers are, NaN above infinity, in every type. */
INLINE float largest(const char *x, dtype type, int64_t n)
{
    __m256i top[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t i = 0; i < n * size_of(type); i += 64)
        for (int j = 0; j < 2; j++) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(x + i + 32 * j));
            top[j] = type == FLOAT32 ? _mm256_max_epu32(top[j], _mm256_and_si256(v, _mm256_set1_epi32(0x7fffffff)))
                                     : _mm256_max_epu16(top[j], _mm256_and_si256(v, _mm256_set1_epi16(0x7fff)));
        }
    if (type != FLOAT32) { /* there is an instruction for the least of eight */
        __m256i both = _mm256_max_epu16(top[0], top[1]);
        __m128i half = _mm_max_epu16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
        uint16_t most = (uint16_t)~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1))));
        return type == BFLOAT16 ? from_bf16(most) : from_fp16(most);
    }
    __m256i both = _mm256_max_epu32(top[0], top[1]);
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(half));
}

/* n numbers, a multiple of 32, divided or multiplied by a number -> n / 2 bytes. codes: of the 16 ranks. */
INLINE void encode(const char *x, dtype type, int64_t n, int exact, float by,
                   const tree *t, __m256i codes, uint8_t *packed)
{
    const __m256i digits = _mm256_set1_epi16(1 << 8 | 16); /* 16 times the first of two, and the second */
    __m256 factor = _mm256_set1_ps(by);
    for (int64_t i = 0; i < n; i += 32) {
        __m256 q[4];
        load16(x + i * size_of(type), type, q, q + 1);
        load16(x + (i + 16) * size_of(type), type, q + 2, q + 3);
        __m256i r[4];
        for (int j = 0; j < 4; j++)
            r[j] = ranks8(exact ? _mm256_div_ps(q[j], factor) : _mm256_mul_ps(q[j], factor), t);
        /* Half h of these has numbers 8h to 8h + 7 of either 16. */
        __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(r[0], r[1]), _mm256_packs_epi32(r[2], r[3]));
        __m256i pairs = _mm256_maddubs_epi16(_mm256_shuffle_epi8(codes, _mm256_abs_epi8(bytes)), digits);
        __m128i out = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        _mm_storeu_si128((__m128i *)(packed + i / 2), _mm_shuffle_epi32(out, 0xd8));
    }
}

/* In the blocks' own dtype, 32 numbers at a time. */
INLINE void quantize_blocks(dtype type, const quantize_job *job, int64_t first, int64_t end)
{
    const tree t = make_tree(job->thresholds, 1);
    uint8_t of_ranks[16];
    for (int i = 0; i < 16; i++)
        of_ranks[i] = job->codes ? job->codes[i] & 15 : (uint8_t)i;
    const __m256i codes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)of_ranks));
    int64_t bs = job->block_size, size = size_of(type);
    for (; first < end; first += bs) {
        int64_t n = min64(bs, end - first);
        const char *x = (const char *)job->x + first * size;
        uint8_t *packed = job->packed + first / 2;
        float whole[MAX_BLOCK];
        uint8_t last[MAX_BLOCK / 2];
        if (n < bs) { /* zeros complete it; they have the code of 0, which completes an odd count */
            memset(whole, 0, (size_t)(bs * size));
            memcpy(whole, x, (size_t)(n * size));
            x = (const char *)whole;
            packed = last;
        }
        float absmax = largest(x, type, bs);
        int exact;
        float r = reciprocal(absmax, &exact);
        job->absmax[first / bs] = absmax;
        if (exact)
            encode(x, type, bs, 1, absmax, &t, codes, packed);
        else
            encode(x, type, bs, 0, r, &t, codes, packed);
        if (n < bs)
            memcpy(job->packed + first / 2, last, (size_t)((n + 1) / 2));
    }
}

static void quantize_chunk(void *data, int64_t index)
{
    const quantize_job *job = data;
    int64_t first = index * CHUNK, end = min64(job->numel, first + CHUNK);
    CALL_TYPED(quantize_blocks, job->type, job, first, end);
}

#else

/* The n elements from `first` as float32, completed by zeros to `padded`. */
INLINE void load(dtype type, const quantize_job *job, int64_t first, int64_t n, int64_t padded, float *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = number(job->x, type, first + i);
    for (int64_t i = n; i < padded; i++)
        out[i] = 0.0f;
}

typedef uint8_t bytes __attribute__((vector_size(16)));

#if HAVE_AVX512

/* The thresholds as a tree: the children of number i are 2i and 2i + 1; number 0 is not used. */
typedef __m512 search;

static search make_search(const float *thresholds)
{
    float tree[16] = {0};
    for (int level = 0, node = 1; level < 4; level++)
        for (int i = 0; i < 1 << level; i++, node++)
            tree[node] = thresholds[(16 >> level) * i + (8 >> level) - 1];
    return _mm512_loadu_ps(tree);
}

/* How many thresholds are below each of 16 numbers: four steps down the tree. */
static inline bytes ranks16(floats q, search tree)
{
    __m512i node = _mm512_set1_epi32(1), one = node;
    for (int level = 0; level < 4; level++) {
        __mmask16 above = _mm512_cmp_ps_mask((__m512)q, _mm512_permutexvar_ps(node, tree), _CMP_GT_OQ);
        node = _mm512_add_epi32(node, node);
        node = _mm512_mask_add_epi32(node, above, node, one);
    }
    return (bytes)_mm512_cvtepi32_epi8(_mm512_sub_epi32(node, _mm512_set1_epi32(16)));
}

#else

typedef int32_t counts __attribute__((vector_size(64)));
typedef const float *search;

static search make_search(const float *thresholds) { return thresholds; }

static inline bytes ranks16(floats q, search thresholds)
{
    counts rank = {0};
    for (int t = 0; t < 15; t++)
        rank -= q > thresholds[t]; /* a comparison is -1 where true */
    return __builtin_convertvector(rank, bytes);
}

#endif

static void quantize_chunk(void *data, int64_t index)
{
    const quantize_job *job = data;
    search thresholds = make_search(job->thresholds);
    float x[MAX_BLOCK];
    uint8_t ranks[MAX_BLOCK];
    int64_t bs = job->block_size, end = min64(job->numel, (index + 1) * CHUNK);
    for (int64_t first = index * CHUNK; first < end; first += bs) {
        int64_t n = min64(bs, end - first);
        CALL_TYPED(load, job->type, job, first, n, bs, x);
        float absmax = largest_of_floats(x, bs);
        int exact;
        float r = reciprocal(absmax, &exact);
        job->absmax[first / bs] = absmax;
        for (int64_t i = 0; i < bs; i += 16) {
            floats q = load_floats(x + i);
            bytes b = ranks16(exact ? q / absmax : q * r, thresholds);
            memcpy(ranks + i, &b, 16);
        }
        /* The zeros past the end have the code of 0, which completes an odd count. */
        uint8_t *packed = job->packed + first / 2;
        for (int64_t i = 0; i < (n + 1) / 2; i++)
            packed[i] = (uint8_t)(ranks[2 * i] << 4 | ranks[2 * i + 1]);
        if (job->codes)
            for (int64_t i = 0; i < (n + 1) / 2; i++)
                packed[i] = job->codes[packed[i]];
    }
}

#endif

/* x [numel] -> packed [(numel + 1) / 2], absmax [ceil(numel / block_size)]. */
EXPORT void qloralab_quantize(const void *x, int type, int64_t numel, int64_t block_size, const float *thresholds,
                              const uint8_t *codes, uint8_t *packed, float *absmax, int threads)
{
    quantize_job job = {x, (dtype)type, numel, block_size, thresholds, codes, packed, absmax};
    for_each(ceil_div(numel, CHUNK), threads, quantize_chunk, &job);
}

typedef struct {
    const float *absmax;
    int64_t count;
    float offset;
    const float *thresholds; /* [255] */
    uint8_t *codes;
    float *absmax2;
} scales_job;

static void quantize_scales_block(void *data, int64_t index)
{
    const scales_job *job = data;
    float x[SCALES_PER_BLOCK] = {0};
    int64_t first = index * SCALES_PER_BLOCK, n = min64(SCALES_PER_BLOCK, job->count - first);
    for (int64_t i = 0; i < n; i++)
        x[i] = job->absmax[first + i] - job->offset;
    float absmax = largest_of_floats(x, SCALES_PER_BLOCK);
    int exact;
    float r = reciprocal(absmax, &exact);
    job->absmax2[index] = absmax;
    /* How many of the 255 thresholds are below q: one bit after the other, and no jump to foresee. */
#if HAVE_AVX2
    const tree t = make_tree(job->thresholds, SCALES_PER_BLOCK / 16);
    int32_t codes[SCALES_PER_BLOCK];
    for (int i = 0; i < SCALES_PER_BLOCK; i += 8) {
        __m256 q = _mm256_loadu_ps(x + i);
        q = exact ? _mm256_div_ps(q, _mm256_set1_ps(absmax)) : _mm256_mul_ps(q, _mm256_set1_ps(r));
        __m256i code = _mm256_mullo_epi32(ranks8(q, &t), _mm256_set1_epi32(-16)); /* the first four bits */
        for (int bit = 8; bit; bit >>= 1) {
            __m256 threshold = _mm256_i32gather_ps(job->thresholds + bit - 1, code, 4);
            __m256i above = _mm256_castps_si256(_mm256_cmp_ps(q, threshold, _CMP_GT_OQ));
            code = _mm256_or_si256(code, _mm256_and_si256(above, _mm256_set1_epi32(bit)));
        }
        _mm256_storeu_si256((__m256i *)(codes + i), code);
    }
    for (int64_t i = 0; i < n; i++)
        job->codes[first + i] = (uint8_t)codes[i];
#else
    for (int64_t i = 0; i < n; i++) {
        float q = exact ? x[i] / absmax : x[i] * r;
        int code = 0;
        for (int bit = 128; bit; bit >>= 1)
            code += bit & -(q > job->thresholds[code + bit - 1]);
        job->codes[first + i] = (uint8_t)code;
    }
#endif
}

/* absmax [count] minus offset -> codes [count], absmax2 [ceil(count / 256)]. */
EXPORT void qloralab_quantize_scales(const float *absmax, int64_t count, float offset, const float *thresholds,
                                     uint8_t *codes, float *absmax2, int threads)
{
    scales_job job = {absmax, count, offset, thresholds, codes, absmax2};
    for_each(ceil_div(count, SCALES_PER_BLOCK), threads, quantize_scales_block, &job);
}
