/* Weights -> packed codes and scales; scales -> 8-bit codes. The steps of nf4/blockwise.py and nf4/double.py. */
#include "weight.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

enum { CHUNK = 1 << 14, MAX_BLOCK = 4096, SCALES_PER_BLOCK = 256 };

typedef int32_t counts __attribute__((vector_size(64)));
typedef uint8_t bytes __attribute__((vector_size(16)));

/* |x| as an integer: ordered as the magnitudes are, NaN above infinity. */
static inline words magnitude(floats x) { return (words)x & 0x7fffffffu; }

/* The largest magnitude of n floats, n a multiple of 16; NaN if there is one. */
static float largest(const float *x, int64_t n)
{
    words top = {0};
    for (int64_t i = 0; i < n; i += 16) {
        words m = magnitude(load_floats(x + i));
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

/* What to multiply by so that x / absmax follows the policy of nf4/blockwise.py; *exact asks for the quotient itself. */
static inline float reciprocal(float absmax, int *exact)
{
    float r = 1.0f / absmax;
    *exact = absmax < FLT_MIN || r < FLT_MIN;
    return r;
}

static inline floats divide(floats x, float absmax, float r, int exact)
{
    if (absmax == 0.0f)
        return x - x; /* all zeros */
    return exact ? x / absmax : x * r;
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

/* The n elements from `first` as float32, completed by zeros to `padded`. */
static void load(const quantize_job *job, int64_t first, int64_t n, int64_t padded, float *out)
{
    if (job->type == FLOAT32)
        memcpy(out, (const float *)job->x + first, (size_t)n * 4);
    else if (job->type == BFLOAT16)
        for (int64_t i = 0; i < n; i++)
            out[i] = from_bf16(((const uint16_t *)job->x)[first + i]);
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = from_fp16(((const uint16_t *)job->x)[first + i]);
    for (int64_t i = n; i < padded; i++)
        out[i] = 0.0f;
}

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
        load(job, first, n, bs, x);
        float absmax = largest(x, bs);
        int exact;
        float r = reciprocal(absmax, &exact);
        job->absmax[first / bs] = absmax;
        for (int64_t i = 0; i < bs; i += 16) {
            floats q = divide(load_floats(x + i), absmax, r, exact);
            bytes b = ranks16(q, thresholds);
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
    float absmax = largest(x, SCALES_PER_BLOCK);
    int exact;
    float r = reciprocal(absmax, &exact);
    job->absmax2[index] = absmax;
    for (int64_t i = 0; i < n; i++) {
        float q = absmax == 0.0f ? 0.0f : exact ? x[i] / absmax : x[i] * r;
        int code = 0; /* how many of the 255 thresholds are below q: one bit after the other, and no jump to foresee */
        for (int bit = 128; bit; bit >>= 1)
            code += bit & -(q > job->thresholds[code + bit - 1]);
        job->codes[first + i] = (uint8_t)code;
    }
}

/* absmax [count] minus offset -> codes [count], absmax2 [ceil(count / 256)]. */
EXPORT void qloralab_quantize_scales(const float *absmax, int64_t count, float offset, const float *thresholds,
                                     uint8_t *codes, float *absmax2, int threads)
{
    scales_job job = {absmax, count, offset, thresholds, codes, absmax2};
    for_each(ceil_div(count, SCALES_PER_BLOCK), threads, quantize_scales_block, &job);
}
