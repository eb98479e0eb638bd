/* The products of an adapted 4-bit linear layer (QLoRA, equation 5; the formulas of lora/ops.py):

       forward    h  = s keep(x) A'              backward    G  = s dy B
                  y  = x W' + h B' + bias                    dx = dy W + keep(G A)
                                                             dA = G' keep(x)
                                                             dB = dy' h

   All are built from one step, which tiles.h describes. A file that includes this one has included an arithmetic before,
   and says with NAME what the functions are called.

   The weight is decoded once per call, a few panels at a time, into the L2 cache: no copy of it is larger than that, and a
   matrix library would have to rearrange that copy once more. The adapter is r more steps of the same contraction: x is
   followed by h and W by B, so y is written once.

   x, y, h, dy and dx are of one dtype, and so are the weights that they meet, each rounded to it as dequantize does:
   forward and backward use the same. A and B are float32, and rounded to that dtype too. Sums are float32. */

enum { COLUMNS = 512 /* per packing task */ };

typedef struct {
    const weight *w;
    dtype type;
    matrix x, grad, h; /* [tokens, K], [tokens, N], [tokens, r] */
    const void *bias;
    matrix A, B;       /* float32 [r, K], [N, r] */
    void *y, *dx;
    float *dA, *dB;
    int64_t tokens, r;
    float scale;
    dropout drop;
    int drops, panels;   /* of the weight, in a task */
    tiles left;          /* forward: x, then h; backward: dy */
    tiles left_r;        /* backward: G, the contraction being r */
    tiles G_t, h_t;      /* backward: G' and h', the contraction being the tokens */
    uint32_t *adapter;   /* panels. Forward: A by rows; backward: B by columns; NR of r at a time */
    matrix G;            /* backward: [tokens, r] */
} layer_job;

static inline const dropout *dropping(const layer_job *job) { return job->r && job->drops ? &job->drop : NULL; }

/* Columns index * COLUMNS ... of A, for the contraction over K. */
static void pack_A(void *data, int64_t index)
{
    layer_job *job = data;
    int64_t K = job->w->columns, k = index * COLUMNS, end = min64(K, k + COLUMNS);
    for (int64_t r = 0; r < job->r; r += NR)
        float_rows(&job->A, job->type, r, k, end, job->adapter + (r / NR * steps_of(K) + k / STEP) * NR);
}

/* Rows index * COLUMNS ... of B, for the contraction over N. */
static void pack_B(void *data, int64_t index)
{
    layer_job *job = data;
    int64_t N = job->w->rows, n = index * COLUMNS, end = min64(N, n + COLUMNS);
    for (int64_t r = 0; r < job->r; r += NR)
        float_columns(&job->B, job->type, r, n, end, job->adapter + (r / NR * steps_of(N) + n / STEP) * NR);
}

/* The rows of one tile times the panels of A or B: out [tokens, r] = scale L R. */
static void multiply_r(layer_job *job, int64_t tile, const uint32_t *rows, int64_t steps, void *out)
{
    float c[MR * NR];
    int mr = tile_rows(&job->left, tile);
    for (int64_t r = 0; r < job->r; r += NR) {
        multiply(mr, rows, job->adapter + r / NR * steps * NR, steps, c, 0);
        for (int i = 0; i < mr * NR; i++)
            c[i] *= job->scale;
        for (int m = 0; m < mr; m++)
            store(out, job->type, (first_row(&job->left, tile) + m) * job->r + r, c + m * NR, job->r - r);
    }
}

/* A tile of x, and of h beside it. */
static void forward_tile(void *data, int64_t tile)
{
    layer_job *job = data;
    int64_t steps = steps_of(job->w->columns), row = first_row(&job->left, tile);
    int mr = tile_rows(&job->left, tile);
    uint32_t *own = scratch((size_t)(mr * job->left.steps) * 4 + 64); /* stores overlap the next tile */
    pack_rows(&job->x, row, mr, dropping(job), own);
    if (job->r) {
        multiply_r(job, tile, own, steps, (void *)job->h.data);
        if (job->drops) /* the weight takes all of x */
            pack_rows(&job->x, row, mr, NULL, own);
        pack_rows(&job->h, row, mr, NULL, own + steps * mr);
    }
    memcpy(tile_data(&job->left, tile), own, (size_t)(mr * job->left.steps) * 4);
}

/* How much of a contraction over n numbers a panel has: parts as even as they can be, of at most MAX_STEPS steps. */
static int64_t part_of(int64_t n)
{
    int64_t parts = n > MAX_STEPS * STEP ? ceil_div(n, MAX_STEPS * STEP) : 1;
    return n > 0 ? ceil_div(ceil_div(n, parts), DIVISOR) * DIVISOR : DIVISOR;
}

/* The tiles from word `at` on, times panels that follow each other every `stride` words, onto the sums c: [rows, NR] for
   each panel. */
static void multiply_panels(const tiles *left, int64_t at, const uint32_t *panels, int64_t stride, int64_t steps,
                            int64_t count, float *c, int add)
{
    for (int64_t t = 0; t < left->tiles; t++) {
        int mr = tile_rows(left, t);
        for (int64_t p = 0; p < count; p++)
            multiply(mr, tile_data(left, t) + at * mr, panels + p * stride, steps,
                     c + (p * left->rows + first_row(left, t)) * NR, add);
    }
}

/* A few panels of y. */
static void forward_panels(void *data, int64_t index)
{
    layer_job *job = data;
    int64_t K = job->w->columns, N = job->w->rows, M = job->tokens, extra = steps_of(job->r), part = part_of(K);
    int64_t n = index * job->panels * NR, count = min64(job->panels, ceil_div(N - n, NR));
    int64_t stride = (part / STEP + extra) * NR;
    uint32_t *panels = scratch((size_t)(count * (stride + M * NR)) * 4);
    float *c = (float *)(panels + count * stride);
    for (int64_t k = 0; k == 0 || k < K; k += part) { /* K may be 0: then c is 0 */
        int64_t end = min64(K, k + part), steps = steps_of(end - k);
        for (int64_t p = 0; p < count; p++)
            weight_rows(job->w, job->type, n + p * NR, k, end, panels + p * stride);
        if (end == K && job->r) { /* the adapter follows the weight */
            for (int64_t p = 0; p < count; p++)
                float_rows(&job->B, job->type, n + p * NR, 0, job->r, panels + p * stride + steps * NR);
            steps += extra;
        }
        multiply_panels(&job->left, k / STEP, panels, stride, steps, count, c, k > 0);
    }
    float bias[WIDEST * NR] = {0};
    for (int i = 0; job->bias && i < min64(count * NR, N - n); i++)
        bias[i] = number(job->bias, job->type, n + i);
    for (int64_t m = 0; m < M; m++)
        for (int64_t p = 0; p < count; p++) {
            float *sum = c + (p * M + m) * NR;
            for (int i = 0; job->bias && i < NR; i++)
                sum[i] += bias[p * NR + i];
            store(job->y, job->type, m * N + n + p * NR, sum, N - n - p * NR);
        }
}

/* A tile of dy, and of G beside it. */
static void backward_tile(void *data, int64_t tile)
{
    layer_job *job = data;
    int64_t steps = steps_of(job->w->rows), row = first_row(&job->left, tile);
    int mr = tile_rows(&job->left, tile);
    int64_t longest = steps > job->left_r.steps ? steps : job->left_r.steps;
    uint32_t *own = scratch((size_t)(mr * longest) * 4 + 64);
    pack_rows(&job->grad, row, mr, NULL, own);
    if (job->dx)
        memcpy(tile_data(&job->left, tile), own, (size_t)(mr * steps) * 4);
    if (!job->r)
        return;
    multiply_r(job, tile, own, steps, (void *)job->G.data);
    pack_rows(&job->G, row, mr, NULL, own);
    memcpy(tile_data(&job->left_r, tile), own, (size_t)(mr * job->left_r.steps) * 4);
}

/* A column of x [tokens, r] for each row of the transposed tiles; a word has STEP tokens. */
static void pack_transposed(const matrix *x, tiles *t)
{
    for (int64_t tile = 0; tile < t->tiles; tile++) {
        int mr = tile_rows(t, tile);
        int64_t column = first_row(t, tile);
        uint32_t *out = tile_data(t, tile);
        for (int64_t m = 0; m < x->rows; m += STEP)
            for (int i = 0; i < mr; i++)
                *out++ = word_of_column(x, m, column + i);
    }
}

/* A few panels of rows of dB. */
static void dB_panels(layer_job *job, int64_t n)
{
    int64_t N = job->w->rows, r = job->r, count = min64(job->panels, ceil_div(N - n, NR));
    int64_t stride = steps_of(job->tokens) * NR;
    float c[MR * NR];
    uint32_t *panels = scratch((size_t)(count * stride) * 4);
    x_columns(&job->grad, n, count, NULL, panels, stride);
    for (int64_t p = 0; p < count; p++)
        for (int64_t t = 0; t < job->h_t.tiles; t++) {
            int mr = tile_rows(&job->h_t, t);
            float *out = job->dB + (n + p * NR) * r + first_row(&job->h_t, t);
            multiply(mr, tile_data(&job->h_t, t), panels + p * stride, job->h_t.steps, c, 0);
            for (int64_t i = 0; i < min64(NR, N - n - p * NR); i++)
                for (int m = 0; m < mr; m++)
                    out[i * r + m] = c[m * NR + i];
        }
}

/* A few panels of columns of dA. */
static void dA_panels(layer_job *job, int64_t k, int64_t count, uint32_t *panels)
{
    int64_t K = job->w->columns, stride = steps_of(job->tokens) * NR;
    float c[MR * NR];
    x_columns(&job->x, k, count, dropping(job), panels, stride);
    for (int64_t p = 0; p < count; p++)
        for (int64_t t = 0; t < job->G_t.tiles; t++) {
            int mr = tile_rows(&job->G_t, t);
            int64_t at = first_row(&job->G_t, t) * K + k + p * NR;
            multiply(mr, tile_data(&job->G_t, t), panels + p * stride, job->G_t.steps, c, 0);
            for (int m = 0; m < mr; m++)
                store(job->dA, FLOAT32, at + m * K, c + m * NR, K - k - p * NR);
        }
}

/* What the adapter gives to NR columns of dx: c [tokens, NR] = keep(G A). */
static void adapter_of_dx(layer_job *job, int64_t k, float *c, uint32_t *panel)
{
    const dropout *drop = dropping(job);
    float_columns(&job->A, job->type, k, 0, job->r, panel);
    for (int64_t t = 0; t < job->left.tiles; t++) {
        int mr = tile_rows(&job->left, t);
        int64_t row = first_row(&job->left, t);
        multiply(mr, tile_data(&job->left_r, t), panel, job->left_r.steps, c + row * NR, 0);
        for (int m = 0; drop && m < mr; m++)
            clear_dropped(c + (row + m) * NR, kept(drop, row + m, k / 32) >> k % 32);
    }
}

/* A few panels of dx and of dA; behind them, of dB. */
static void backward_panels(void *data, int64_t index)
{
    layer_job *job = data;
    int64_t K = job->w->columns, N = job->w->rows, M = job->tokens, part = part_of(N);
    int64_t tasks = ceil_div(K, NR * job->panels), k = index * job->panels * NR;
    if (index >= tasks) {
        dB_panels(job, (index - tasks) * job->panels * NR);
        return;
    }
    int64_t count = min64(job->panels, ceil_div(K - k, NR)), stride = part / STEP * NR;
    int64_t of_x = job->r ? count * steps_of(M) * NR : 0, of_r = steps_of(job->r) * NR, words = count * stride;
    words = of_x > words ? of_x : words;
    words = of_r > words ? of_r : words;
    uint32_t *panels = scratch((size_t)(words + count * M * NR) * 4);
    float *c = (float *)(panels + words);
    if (job->r)
        dA_panels(job, k, count, panels);
    if (!job->dx)
        return;
    for (int64_t p = 0; job->r && p < count; p++)
        adapter_of_dx(job, k + p * NR, c + p * M * NR, panels);
    for (int64_t n = 0; n == 0 || n < N; n += part) { /* N may be 0: then the weight gives 0 */
        int64_t end = min64(N, n + part);
        weight_columns(job->w, job->type, k, count, n, end, panels, stride);
        multiply_panels(&job->left, n / STEP, panels, stride, steps_of(end - n), count, c, n > 0 || job->r);
    }
    for (int64_t m = 0; m < M; m++)
        for (int64_t p = 0; p < count; p++)
            store(job->dx, job->type, m * K + k + p * NR, c + (p * M + m) * NR, K - k - p * NR);
}

/* Panels per task: as many as WIDEST, for the tiles to be read less often; fewer where the threads would not all have as
   much to do. */
static int panels_per_task(int64_t panels, int threads)
{
    int best = 1;
    for (int p = 2; p <= WIDEST; p++)
        if (ceil_div(ceil_div(panels, p), threads) * p <= ceil_div(ceil_div(panels, best), threads) * best)
            best = p;
    return best;
}

static void *aligned(char **at, size_t bytes)
{
    void *here = *at;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

/* Bytes of work memory that the two functions below need. */
EXPORT int64_t NAME(workspace)(int64_t rows, int64_t columns, int64_t tokens, int64_t r)
{
    int64_t longest = rows > columns ? rows : columns, rp = ceil_div(r, NR) * NR;
    int64_t left = tokens * (steps_of(longest) + steps_of(r)) * 4, panels = rp * steps_of(longest) * 4;
    return left + panels + tokens * steps_of(r) * 4 + 2 * r * steps_of(tokens) * 4 + tokens * r * 4 + 16 * 128;
}

static layer_job make_job(const weight *w, dtype type, int64_t tokens, const float *A, const float *B, int64_t r,
                          float scale, int threshold, int64_t seed)
{
    layer_job job = {.w = w, .type = type, .tokens = tokens, .r = r, .scale = scale, .drops = threshold > 0};
    job.A = (matrix){A, r, w->columns, FLOAT32};
    job.B = (matrix){B, w->rows, r, FLOAT32};
    job.drop = (dropout){(uint64_t)seed, (uint32_t)threshold, ceil_div(w->columns, 32)};
    return job;
}

/* x [tokens, K], bias [N] or NULL; float32 A [r, K], B [N, r] -> y [tokens, N], h [tokens, r]; x, bias, y and h of the
   dtype `type`. r = 0: no adapter. threshold 0: no dropout. scale: of h. */
EXPORT void NAME(forward)(const weight *w, int type, const void *x, int64_t tokens, const void *bias, const float *A,
                          const float *B, int64_t r, float scale, int threshold, int64_t seed, void *y, void *h,
                          void *workspace, int threads)
{
    int64_t K = w->columns, panels = ceil_div(w->rows, NR);
    char *at = workspace;
    layer_job job = make_job(w, (dtype)type, tokens, A, B, r, scale, threshold, seed);
    job.x = (matrix){x, tokens, K, job.type};
    job.h = (matrix){h, tokens, r, job.type};
    job.bias = bias;
    job.y = y;
    job.left = make_tiles(tokens, steps_of(K) + steps_of(r));
    job.left.data = aligned(&at, tiles_bytes(job.left));
    job.adapter = aligned(&at, (size_t)(ceil_div(r, NR) * NR * steps_of(K)) * 4);
    job.panels = panels_per_task(panels, threads);
    if (r)
        for_each(ceil_div(K, COLUMNS), K * r < (1 << 16) ? 1 : threads, pack_A, &job);
    for_each(job.left.tiles, threads, forward_tile, &job);
    for_each(ceil_div(panels, job.panels), threads, forward_panels, &job);
}

/* grad [tokens, N], x [tokens, K], h [tokens, r]; float32 A, B -> dx [tokens, K] or NULL, float32 dA [r, K], dB [N, r].
   With r = 0, only dx = grad W. */
EXPORT void NAME(backward)(const weight *w, int type, const void *grad, const void *x, const void *h, int64_t tokens,
                           const float *A, const float *B, int64_t r, float scale, int threshold, int64_t seed, void *dx,
                           float *dA, float *dB, void *workspace, int threads)
{
    int64_t K = w->columns, N = w->rows, panels = ceil_div(K, NR);
    char *at = workspace;
    layer_job job = make_job(w, (dtype)type, tokens, A, B, r, scale, threshold, seed);
    job.grad = (matrix){grad, tokens, N, job.type};
    job.x = (matrix){x, tokens, K, job.type};
    job.h = (matrix){h, tokens, r, job.type};
    job.dx = dx;
    job.dA = dA;
    job.dB = dB;
    job.left = make_tiles(tokens, steps_of(N));
    job.left_r = make_tiles(tokens, steps_of(r));
    job.G_t = job.h_t = make_tiles(r, steps_of(tokens));
    job.left.data = aligned(&at, tiles_bytes(job.left));
    job.left_r.data = aligned(&at, tiles_bytes(job.left_r));
    job.G_t.data = aligned(&at, tiles_bytes(job.G_t));
    job.h_t.data = aligned(&at, tiles_bytes(job.h_t));
    job.adapter = aligned(&at, (size_t)(ceil_div(r, NR) * NR * steps_of(N)) * 4);
    job.G = (matrix){aligned(&at, (size_t)(tokens * r * size_of(job.type))), tokens, r, job.type};
    job.panels = panels_per_task(panels, threads);
    if (r)
        for_each(ceil_div(N, COLUMNS), N * r < (1 << 16) ? 1 : threads, pack_B, &job);
    for_each(job.left.tiles, threads, backward_tile, &job);
    if (r) {
        pack_transposed(&job.G, &job.G_t);
        pack_transposed(&job.h, &job.h_t);
    }
    for_each(ceil_div(panels, job.panels) + (r ? ceil_div(N, NR * job.panels) : 0), threads,
             backward_panels, &job);
}
