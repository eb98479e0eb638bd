/* The products of an adapted 4-bit linear layer, for AVX512-BF16 (QLoRA, equation 5; the formulas of nf4/adapter.py):

       forward    h  = s keep(x) A'              backward    G  = s dy B
                  y  = x W' + h B' + bias                    dx = dy W + keep(G A)
                                                             dA = G' keep(x)
                                                             dB = dy' h

   All are built from one step, which tiles.h describes.

   The weight is decoded once per call, 32 rows or columns at a time, into the L2 cache: no copy of it in bfloat16 is
   larger than one panel, and a matrix library would have to rearrange that copy once more. The adapter is r more steps of
   the same contraction: x is followed by h and W by B, so y is written once. */
#include "tiles.h"

#if HAVE_AVX512 && defined(__AVX512BF16__)

enum { MAX_PAIRS = 2048 /* of a panel: 256 KB */, COLUMNS = 512 /* per packing task */ };

typedef struct {
    const weight *w;
    const uint16_t *x, *bias, *grad;
    const float *A, *B;
    uint16_t *y, *h, *dx;
    float *dA, *dB;
    int64_t tokens, r;
    float scale;
    dropout drop;
    int drops;
    tiles left;       /* forward: x, then h; backward: dy */
    tiles left_r;     /* backward: G, the contraction being r */
    tiles G_t, h_t;   /* backward: G' and h', the contraction being the tokens */
    uint32_t *panels; /* forward: A by rows; backward: B by columns; 32 of r at a time */
    uint16_t *G;      /* backward: [tokens, r] */
} layer_job;

static int64_t even_pairs(int64_t n) { return (n + 1) / 2; }

/* Columns index * COLUMNS ... of A, for the contraction over K. */
static void pack_A(void *data, int64_t index)
{
    layer_job *job = data;
    int64_t K = job->w->columns, k = index * COLUMNS, end = min64(K, k + COLUMNS);
    for (int64_t r = 0; r < job->r; r += NR)
        float_rows(job->A, job->r, K, r, k, end, job->panels + (r / NR * even_pairs(K) + k / 2) * NR);
}

/* Rows index * COLUMNS ... of B, for the contraction over N. */
static void pack_B(void *data, int64_t index)
{
    layer_job *job = data;
    int64_t N = job->w->rows, n = index * COLUMNS, end = min64(N, n + COLUMNS);
    for (int64_t r = 0; r < job->r; r += NR)
        float_columns(job->B, job->r, r, n, end, job->panels + (r / NR * even_pairs(N) + n / 2) * NR);
}

/* The rows of one tile times the panels of A or B: out [tokens, r] = scale L R, rounded to bfloat16. */
static void multiply_r(layer_job *job, int64_t tile, const uint32_t *rows, int64_t pairs, uint16_t *out)
{
    float c[MR * NR];
    int mr = tile_rows(&job->left, tile);
    __m512 scale = _mm512_set1_ps(job->scale);
    for (int64_t r = 0; r < job->r; r += NR) {
        multiply(mr, rows, job->panels + r / NR * pairs * NR, pairs, c, 0);
        for (int m = 0; m < mr; m++)
            store_bf16(out + (first_row(&job->left, tile) + m) * job->r + r,
                       _mm512_mul_ps(_mm512_loadu_ps(c + m * NR), scale),
                       _mm512_mul_ps(_mm512_loadu_ps(c + m * NR + 16), scale), first_bits(job->r - r));
    }
}

/* A tile of x, and of h beside it. */
static void forward_tile(void *data, int64_t tile)
{
    layer_job *job = data;
    int64_t K = job->w->columns, pairs = even_pairs(K);
    int mr = tile_rows(&job->left, tile);
    int64_t row = first_row(&job->left, tile);
    uint32_t *packed = tile_data(&job->left, tile);
    uint32_t *own = scratch(((size_t)(mr * (pairs + even_pairs(job->r))) * 4 + 64)); /* stores overlap the next tile */
    pack_rows(job->x, K, row, mr, job->r && job->drops ? &job->drop : NULL, own);
    if (job->r) {
        multiply_r(job, tile, own, pairs, job->h);
        if (job->drops) /* the weight takes all of x */
            pack_rows(job->x, K, row, mr, NULL, own);
        pack_rows(job->h, job->r, row, mr, NULL, own + pairs * mr);
    }
    memcpy(packed, own, (size_t)(mr * job->left.pairs) * 4);
}

/* 32 columns of y. */
static void forward_panel(void *data, int64_t index)
{
    layer_job *job = data;
    int64_t K = job->w->columns, N = job->w->rows, n = index * NR, M = job->tokens;
    int64_t extra = even_pairs(job->r);
    uint32_t *panel = scratch((size_t)(MAX_PAIRS + extra) * NR * 4 + (size_t)M * NR * 4);
    float *c = (float *)(panel + (MAX_PAIRS + extra) * NR);
    for (int64_t k = 0; k == 0 || k < K; k += 2 * MAX_PAIRS) { /* K may be 0: then c is 0 */
        int64_t end = min64(K, k + 2 * MAX_PAIRS), pairs = even_pairs(end - k);
        weight_rows(job->w, n, k, end, panel);
        if (end == K && job->r) { /* the adapter follows the weight */
            float_rows(job->B, N, job->r, n, 0, job->r, panel + pairs * NR);
            pairs += extra;
        }
        for (int64_t t = 0; t < job->left.tiles; t++) {
            int mr = tile_rows(&job->left, t);
            multiply(mr, tile_data(&job->left, t) + k / 2 * mr, panel, pairs, c + first_row(&job->left, t) * NR, k > 0);
        }
    }
    uint32_t inside = first_bits(N - n);
    __m512 b0 = _mm512_setzero_ps(), b1 = b0;
    if (job->bias) {
        __m512i b = load_bf16(job->bias + n, inside);
        b0 = bf16_to_float(_mm512_castsi512_si256(b));
        b1 = bf16_to_float(_mm512_extracti64x4_epi64(b, 1));
    }
    for (int64_t m = 0; m < M; m++)
        store_bf16(job->y + m * N + n, _mm512_add_ps(_mm512_load_ps(c + m * NR), b0),
                   _mm512_add_ps(_mm512_load_ps(c + m * NR + 16), b1), inside);
}

/* A tile of dy, and of G beside it. */
static void backward_tile(void *data, int64_t tile)
{
    layer_job *job = data;
    int64_t N = job->w->rows, pairs = even_pairs(N), row = first_row(&job->left, tile);
    int mr = tile_rows(&job->left, tile);
    uint32_t *own = scratch((size_t)(mr * (pairs + even_pairs(job->r))) * 4 + 64);
    pack_rows(job->grad, N, row, mr, NULL, own);
    if (job->dx)
        memcpy(tile_data(&job->left, tile), own, (size_t)(mr * pairs) * 4);
    if (!job->r)
        return;
    multiply_r(job, tile, own, pairs, job->G);
    pack_rows(job->G, job->r, row, mr, NULL, own);
    memcpy(tile_data(&job->left_r, tile), own, (size_t)(mr * job->left_r.pairs) * 4);
}

/* Words (m, m + 1) of a column of x [tokens, r], for each column: rows r of the transposed tiles. */
static void pack_transposed(const uint16_t *x, const layer_job *job, tiles *t)
{
    for (int64_t tile = 0; tile < t->tiles; tile++) {
        int mr = tile_rows(t, tile);
        uint32_t *out = tile_data(t, tile);
        const uint16_t *from = x + first_row(t, tile);
        for (int64_t m = 0; m < job->tokens; m += 2)
            for (int i = 0; i < mr; i++) {
                uint32_t second = m + 1 < job->tokens ? from[(m + 1) * job->r + i] : 0;
                *out++ = from[m * job->r + i] | second << 16;
            }
    }
}

/* 32 columns of dx and of dA; behind them, 32 rows of dB. */
static void backward_panel(void *data, int64_t index)
{
    layer_job *job = data;
    int64_t K = job->w->columns, N = job->w->rows, M = job->tokens, r = job->r;
    int64_t panels_x = ceil_div(K, NR), extra = even_pairs(r);
    size_t panel_words = (size_t)(MAX_PAIRS > even_pairs(M) ? MAX_PAIRS : even_pairs(M)) * NR;
    uint32_t *panel = scratch((panel_words + (size_t)(extra * NR + M * NR)) * 4);
    uint32_t *panel_r = panel + panel_words;
    float *c = (float *)(panel_r + extra * NR), c_r[MR * NR];
    if (index >= panels_x) {
        int64_t n = (index - panels_x) * NR, columns = min64(NR, N - n);
        bf16_columns(job->grad, M, N, n, NULL, panel);
        for (int64_t t = 0; t < job->h_t.tiles; t++) {
            int mr = tile_rows(&job->h_t, t);
            multiply(mr, tile_data(&job->h_t, t), panel, job->h_t.pairs, c_r, 0);
            for (int m = 0; m < mr; m++)
                for (int64_t i = 0; i < columns; i++)
                    job->dB[(n + i) * r + first_row(&job->h_t, t) + m] = c_r[m * NR + i];
        }
        return;
    }
    int64_t k = index * NR;
    uint32_t inside = first_bits(K - k);
    const dropout *drop = job->drops ? &job->drop : NULL;
    if (r) {
        bf16_columns(job->x, M, K, k, drop, panel);
        for (int64_t t = 0; t < job->G_t.tiles; t++) {
            int mr = tile_rows(&job->G_t, t);
            multiply(mr, tile_data(&job->G_t, t), panel, job->G_t.pairs, c_r, 0);
            for (int m = 0; m < mr; m++) {
                float *out = job->dA + (first_row(&job->G_t, t) + m) * K + k;
                _mm512_mask_storeu_ps(out, (__mmask16)inside, _mm512_loadu_ps(c_r + m * NR));
                _mm512_mask_storeu_ps(out + 16, (__mmask16)(inside >> 16), _mm512_loadu_ps(c_r + m * NR + 16));
            }
        }
    }
    if (!job->dx)
        return;
    for (int64_t n = 0; n == 0 || n < N; n += 2 * MAX_PAIRS) { /* N may be 0: then c is 0 */
        int64_t end = min64(N, n + 2 * MAX_PAIRS);
        weight_columns(job->w, k, n, end, panel);
        for (int64_t t = 0; t < job->left.tiles; t++) {
            int mr = tile_rows(&job->left, t);
            multiply(mr, tile_data(&job->left, t) + n / 2 * mr, panel, even_pairs(end - n),
                     c + first_row(&job->left, t) * NR, n > 0);
        }
    }
    if (r)
        float_columns(job->A, K, k, 0, r, panel_r);
    for (int64_t t = 0; t < job->left.tiles; t++) {
        int mr = tile_rows(&job->left, t);
        int64_t row = first_row(&job->left, t);
        if (r)
            multiply(mr, tile_data(&job->left_r, t), panel_r, extra, c_r, 0);
        for (int m = 0; m < mr; m++) {
            __m512 low = _mm512_load_ps(c + (row + m) * NR), high = _mm512_load_ps(c + (row + m) * NR + 16);
            if (r) {
                uint32_t keep = drop ? kept(drop, row + m, index) : ~0u;
                low = _mm512_mask_add_ps(low, (__mmask16)keep, low, _mm512_loadu_ps(c_r + m * NR));
                high = _mm512_mask_add_ps(high, (__mmask16)(keep >> 16), high, _mm512_loadu_ps(c_r + m * NR + 16));
            }
            store_bf16(job->dx + (row + m) * K + k, low, high, inside);
        }
    }
}

static void *aligned(char **at, size_t bytes)
{
    void *here = *at;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

/* Bytes of work memory that the two functions below need. */
EXPORT int64_t qloralab_product_workspace(int64_t rows, int64_t columns, int64_t tokens, int64_t r)
{
    int64_t longest = rows > columns ? rows : columns, rp = ceil_div(r, NR) * NR;
    int64_t left = tokens * (even_pairs(longest) + even_pairs(r)) * 4, panels = rp * even_pairs(longest) * 4;
    return left + panels + tokens * even_pairs(r) * 4 + 2 * r * even_pairs(tokens) * 4 + tokens * r * 2 + 16 * 128;
}

/* bfloat16 x [tokens, K], bias [N] or NULL; float32 A [r, K], B [N, r] -> bfloat16 y [tokens, N], h [tokens, r].
   r = 0: no adapter. threshold 0: no dropout. scale: of h. */
EXPORT void qloralab_adapted_linear(const weight *w, const uint16_t *x, int64_t tokens, const uint16_t *bias,
                                    const float *A, const float *B, int64_t r, float scale, int threshold, int64_t seed,
                                    uint16_t *y, uint16_t *h, void *workspace, int threads)
{
    int64_t K = w->columns;
    char *at = workspace;
    layer_job job = {.w = w, .x = x, .bias = bias, .A = A, .B = B, .r = r, .scale = scale, .y = y, .h = h};
    job.tokens = tokens;
    job.drops = threshold > 0;
    job.drop = (dropout){(uint64_t)seed, (uint32_t)threshold, ceil_div(K, 32)};
    job.left = make_tiles(tokens, even_pairs(K) + even_pairs(r));
    job.left.data = aligned(&at, tiles_bytes(job.left));
    job.panels = aligned(&at, (size_t)(ceil_div(r, NR) * NR * even_pairs(K)) * 4);
    if (r)
        for_each(ceil_div(K, COLUMNS), K * r < (1 << 16) ? 1 : threads, pack_A, &job);
    for_each(job.left.tiles, threads, forward_tile, &job);
    for_each(ceil_div(w->rows, NR), threads, forward_panel, &job);
}

/* bfloat16 grad [tokens, N], x [tokens, K], h [tokens, r]; float32 A, B -> bfloat16 dx [tokens, K] or NULL, float32
   dA [r, K], dB [N, r]. With r = 0, only dx = grad W. */
EXPORT void qloralab_adapted_linear_backward(const weight *w, const uint16_t *grad, const uint16_t *x, const uint16_t *h,
                                             int64_t tokens, const float *A, const float *B, int64_t r, float scale,
                                             int threshold, int64_t seed, uint16_t *dx, float *dA, float *dB,
                                             void *workspace, int threads)
{
    int64_t K = w->columns, N = w->rows;
    char *at = workspace;
    layer_job job = {.w = w, .grad = grad, .x = x, .A = A, .B = B, .r = r, .scale = scale, .dx = dx, .dA = dA, .dB = dB};
    job.tokens = tokens;
    job.drops = threshold > 0;
    job.drop = (dropout){(uint64_t)seed, (uint32_t)threshold, ceil_div(K, 32)};
    job.left = make_tiles(tokens, even_pairs(N));
    job.left_r = make_tiles(tokens, even_pairs(r));
    job.G_t = job.h_t = make_tiles(r, even_pairs(tokens));
    job.left.data = aligned(&at, tiles_bytes(job.left));
    job.left_r.data = aligned(&at, tiles_bytes(job.left_r));
    job.G_t.data = aligned(&at, tiles_bytes(job.G_t));
    job.h_t.data = aligned(&at, tiles_bytes(job.h_t));
    job.panels = aligned(&at, (size_t)(ceil_div(r, NR) * NR * even_pairs(N)) * 4);
    job.G = aligned(&at, (size_t)(tokens * r) * 2);
    if (r)
        for_each(ceil_div(N, COLUMNS), N * r < (1 << 16) ? 1 : threads, pack_B, &job);
    for_each(job.left.tiles, threads, backward_tile, &job);
    if (r) {
        pack_transposed(job.G, &job, &job.G_t);
        pack_transposed(h, &job, &job.h_t);
    }
    for_each(ceil_div(K, NR) + (r ? ceil_div(N, NR) : 0), threads, backward_panel, &job);
}

EXPORT int qloralab_has_product(void) { return 1; }

#else

EXPORT int qloralab_has_product(void) { return 0; }

#endif
