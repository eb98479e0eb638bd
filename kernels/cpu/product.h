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
    layer l;
    dtype type;
    matrix x, grad, h;   /* [tokens, K], [tokens, N], [tokens, r] */
    matrix A, B, G;      /* float32 [r, K], [N, r]; backward: [tokens, r] */
    dropout drop;
    int panels;          /* of the weight, in a task */
    tiles left;          /* forward: x, then h; backward: dy */
    tiles left_r;        /* backward: G, the contraction being r */
    tiles G_t, h_t;      /* backward: G' and h', the contraction being the tokens */
    uint32_t *adapter;   /* panels. Forward: A by rows; backward: B by columns; NR of r at a time */
} layer_job;

static inline const dropout *dropping(const layer_job *job) { return job->l.r && job->l.threshold ? &job->drop : NULL; }

/* C [mr, NR] += L R, or = L R, mr being one of 1 ... MR. */
static void multiply(int mr, const uint32_t *l, const uint32_t *r, int64_t steps, float *c, int add)
{
#define CASE(n) \
    case n: \
        if (n <= MR) \
            multiply_n(n < MR ? n : MR, l, r, steps, c, add); \
        break;
    switch (mr) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

/* Columns index * COLUMNS ... of A, for the contraction over K. */
static void pack_A(void *data, int64_t index)
{
    layer_job *job = data;
    int64_t K = job->w->columns, k = index * COLUMNS, end = min64(K, k + COLUMNS);
    for (int64_t r = 0; r < job->l.r; r += NR)
        float_rows(&job->A, job->type, r, k, end, job->adapter + (r / NR * steps_of(K) + k / STEP) * NR);
}

/* Rows index * COLUMNS ... of B, for the contraction over N. */
static void pack_B(void *data, int64_t index)
{
    layer_job *job = data;
    int64_t N = job->w->rows, n = index * COLUMNS, end = min64(N, n + COLUMNS);
    for (int64_t r = 0; r < job->l.r; r += NR)
        float_columns(&job->B, job->type, r, n, end, job->adapter + (r / NR * steps_of(N) + n / STEP) * NR);
}

/* The rows of one tile times the panels of A or B: out [tokens, r] = scale L R. */
static void multiply_r(layer_job *job, int64_t tile, const uint32_t *rows, int64_t steps, void *out)
{
    float c[MR * NR];
    int mr = tile_rows(&job->left, tile);
    for (int64_t r = 0; r < job->l.r; r += NR) {
        multiply(mr, rows, job->adapter + r / NR * steps * NR, steps, c, 0);
        for (int i = 0; i < mr * NR; i++)
            c[i] *= job->l.scale;
        for (int m = 0; m < mr; m++)
            store(out, job->type, (first_row(&job->left, tile) + m) * job->l.r + r, c + m * NR, job->l.r - r);
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
    if (job->l.r) {
        multiply_r(job, tile, own, steps, (void *)job->h.data);
        if (job->l.threshold) /* the weight takes all of x */
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
    int64_t K = job->w->columns, N = job->w->rows, M = job->l.tokens, extra = steps_of(job->l.r), part = part_of(K);
    int64_t n = index * job->panels * NR, count = min64(job->panels, ceil_div(N - n, NR));
    int64_t stride = (part / STEP + extra) * NR;
    uint32_t *panels = scratch((size_t)(count * (stride + M * NR)) * 4);
    float *c = (float *)(panels + count * stride);
    for (int64_t k = 0; k == 0 || k < K; k += part) { /* K may be 0: then c is 0 */
        int64_t end = min64(K, k + part), steps = steps_of(end - k);
        for (int64_t p = 0; p < count; p++)
            weight_rows(job->w, job->type, n + p * NR, k, end, panels + p * stride);
        if (end == K && job->l.r) { /* the adapter follows the weight */
            for (int64_t p = 0; p < count; p++)
                float_rows(&job->B, job->type, n + p * NR, 0, job->l.r, panels + p * stride + steps * NR);
            steps += extra;
        }
        multiply_panels(&job->left, k / STEP, panels, stride, steps, count, c, k > 0);
    }
    float bias[WIDEST * NR] = {0};
    for (int i = 0; job->l.bias && i < min64(count * NR, N - n); i++)
        bias[i] = number(job->l.bias, job->type, n + i);
    for (int64_t m = 0; m < M; m++)
        for (int64_t p = 0; p < count; p++) {
            float *sum = c + (p * M + m) * NR;
            for (int i = 0; job->l.bias && i < NR; i++)
                sum[i] += bias[p * NR + i];
            store(job->l.y, job->type, m * N + n + p * NR, sum, N - n - p * NR);
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
    if (job->l.dx)
        memcpy(tile_data(&job->left, tile), own, (size_t)(mr * steps) * 4);
    if (!job->l.r)
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

/* A few panels of dA = G' keep(x), of [r, K], or of dB' = h' dy. */
static void adapter_gradient(layer_job *job, int is_A, int64_t first, int64_t count, uint32_t *panels)
{
    const matrix *x = is_A ? &job->x : &job->grad;
    const tiles *left = is_A ? &job->G_t : &job->h_t;
    int64_t stride = steps_of(x->rows) * NR;
    float c[MR * NR];
    x_columns(x, first, count, is_A ? dropping(job) : NULL, panels, stride);
    for (int64_t p = 0; p < count; p++)
        for (int64_t t = 0; t < left->tiles; t++) {
            int mr = tile_rows(left, t);
            int64_t row = first_row(left, t), column = first + p * NR, inside = x->columns - column;
            multiply(mr, tile_data(left, t), panels + p * stride, left->steps, c, 0);
            for (int m = 0; is_A && m < mr; m++)
                store(job->l.dA, FLOAT32, (row + m) * x->columns + column, c + m * NR, inside);
            for (int64_t i = 0; !is_A && i < min64(NR, inside); i++)
                for (int m = 0; m < mr; m++)
                    job->l.dB[(column + i) * job->l.r + row + m] = c[m * NR + i];
        }
}

/* What the adapter gives to NR columns of dx: c [tokens, NR] = keep(G A). */
static void adapter_of_dx(layer_job *job, int64_t k, float *c, uint32_t *panel)
{
    const dropout *drop = dropping(job);
    float_columns(&job->A, job->type, k, 0, job->l.r, panel);
    for (int64_t t = 0; t < job->left.tiles; t++) {
        int mr = tile_rows(&job->left, t);
        int64_t row = first_row(&job->left, t);
        multiply(mr, tile_data(&job->left_r, t), panel, job->left_r.steps, c + row * NR, 0);
        for (int m = 0; drop && m < mr; m++)
            for (uint32_t keep = kept(drop, row + m, k / 32) >> k % 32, j = 0; j < NR; j += LANE) {
                float *at = c + (row + m) * NR + j;
                store_lane(at, where(keep >> j, load_lane(at)));
            }
    }
}

/* A few panels of dx and of dA; behind them, of dB. */
static void backward_panels(void *data, int64_t index)
{
    layer_job *job = data;
    int64_t K = job->w->columns, N = job->w->rows, M = job->l.tokens, part = part_of(N);
    int64_t tasks = ceil_div(K, NR * job->panels), k = index * job->panels * NR;
    if (index >= tasks) {
        int64_t n = (index - tasks) * job->panels * NR, count = min64(job->panels, ceil_div(N - n, NR));
        adapter_gradient(job, 0, n, count, scratch((size_t)(count * steps_of(M) * NR) * 4));
        return;
    }
    int64_t count = min64(job->panels, ceil_div(K - k, NR)), stride = part / STEP * NR;
    int64_t of_x = job->l.r ? count * steps_of(M) * NR : 0, of_r = steps_of(job->l.r) * NR, words = count * stride;
    words = of_x > words ? of_x : words;
    words = of_r > words ? of_r : words;
    uint32_t *panels = scratch((size_t)(words + count * M * NR) * 4);
    float *c = (float *)(panels + words);
    if (job->l.r)
        adapter_gradient(job, 1, k, count, panels);
    if (!job->l.dx)
        return;
    for (int64_t p = 0; job->l.r && p < count; p++)
        adapter_of_dx(job, k + p * NR, c + p * M * NR, panels);
    for (int64_t n = 0; n == 0 || n < N; n += part) { /* N may be 0: then the weight gives 0 */
        int64_t end = min64(N, n + part);
        weight_columns(job->w, job->type, k, count, n, end, panels, stride);
        multiply_panels(&job->left, n / STEP, panels, stride, steps_of(end - n), count, c, n > 0 || job->l.r);
    }
    for (int64_t m = 0; m < M; m++)
        for (int64_t p = 0; p < count; p++)
            store(job->l.dx, job->type, m * K + k + p * NR, c + (p * M + m) * NR, K - k - p * NR);
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

static tiles tiles_at(char **at, int64_t rows, int64_t steps)
{
    tiles t = {NULL, rows, ceil_div(rows, MR), steps};
    /* Stores write a vector where a row of a tile has less: one vector more at the end. */
    t.data = aligned(at, (size_t)(rows * steps) * 4 + 64);
    return t;
}

/* What both directions share. The result has `columns` columns, whose panels are divided into tasks; the adapter is packed
   for a contraction over `contraction` numbers. */
static layer_job make_job(const weight *w, const layer *l, int64_t columns, int64_t contraction, int threads, char **at)
{
    int64_t K = w->columns, N = w->rows, r = l->r, tokens = l->tokens;
    layer_job job = {.w = w, .l = *l, .type = (dtype)l->type, .panels = panels_per_task(ceil_div(columns, NR), threads)};
    job.x = (matrix){l->x, tokens, K, job.type};
    job.grad = (matrix){l->grad, tokens, N, job.type};
    job.h = (matrix){l->h, tokens, r, job.type};
    job.A = (matrix){l->A, r, K, FLOAT32};
    job.B = (matrix){l->B, N, r, FLOAT32};
    job.drop = (dropout){(uint64_t)l->seed, (uint32_t)l->threshold, ceil_div(K, 32)};
    job.adapter = aligned(at, (size_t)(ceil_div(r, NR) * NR * steps_of(contraction)) * 4);
    return job;
}

/* The adapter is packed on one thread where it is small. */
static void pack_adapter(layer_job *job, int64_t contraction, int threads, task pack)
{
    if (job->l.r)
        for_each(ceil_div(contraction, COLUMNS), contraction * job->l.r < (1 << 16) ? 1 : threads, pack, job);
}

/* y and h, of x. */
EXPORT void NAME(forward)(const weight *w, const layer *l, int threads)
{
    int64_t K = w->columns;
    char *at = l->workspace;
    layer_job job = make_job(w, l, w->rows, K, threads, &at);
    job.left = tiles_at(&at, l->tokens, steps_of(K) + steps_of(l->r));
    pack_adapter(&job, K, threads, pack_A);
    for_each(job.left.tiles, threads, forward_tile, &job);
    for_each(ceil_div(ceil_div(w->rows, NR), job.panels), threads, forward_panels, &job);
}

/* dx if it is not NULL, dA and dB, of grad, x and h. With r = 0, only dx = grad W. */
EXPORT void NAME(backward)(const weight *w, const layer *l, int threads)
{
    int64_t K = w->columns, N = w->rows, r = l->r, tokens = l->tokens;
    char *at = l->workspace;
    layer_job job = make_job(w, l, K, N, threads, &at);
    job.left = tiles_at(&at, tokens, steps_of(N));
    job.left_r = tiles_at(&at, tokens, steps_of(r));
    job.G_t = tiles_at(&at, r, steps_of(tokens));
    job.h_t = tiles_at(&at, r, steps_of(tokens));
    job.G = (matrix){aligned(&at, (size_t)(tokens * r * size_of(job.type))), tokens, r, job.type};
    pack_adapter(&job, N, threads, pack_B);
    for_each(job.left.tiles, threads, backward_tile, &job);
    if (r) {
        pack_transposed(&job.G, &job.G_t);
        pack_transposed(&job.h, &job.h_t);
    }
    int64_t tasks = ceil_div(ceil_div(K, NR), job.panels) + (r ? ceil_div(N, NR * job.panels) : 0);
    for_each(tasks, threads, backward_panels, &job);
}
