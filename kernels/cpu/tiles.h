/* What the matrix products of a layer have in common, whatever arithmetic they use.

   A product is built from one step,

       C [MR, NR] += L [MR, steps] R [steps, NR]

   whose sums stay in registers. The contraction goes by words of 32 bits: STEP numbers, two bfloat16 or one float32.

       L, a tile of up to MR rows     word [step][row]
       R, a panel of NR columns       word [step][column]    the weight is decoded straight into it

   A matrix whose contraction runs along its rows' length has to be transposed by words.

   tiles_bf16.h and tiles_f32.h have the arithmetic: MR, NR, STEP, `multiply`, and functions that make tiles and panels of
   what a layer multiplies: the packed weight, float32 adapters, activations. product.h is the walk over them. */
#ifndef QLORALAB_TILES_H
#define QLORALAB_TILES_H

#include "dropout.h"
#include "lanes.h"

/* Numbers of a dtype, row after row. */
typedef struct {
    const void *data;
    int64_t rows, columns;
    dtype type;
} matrix;

/* A layer and its operands; kernels/cpu/library.py has the same structure. All but A, B and their gradients are of the dtype
   `type`. r = 0: there is no adapter. */
typedef struct {
    int64_t tokens, r;
    int32_t type;
    float scale;                 /* of h */
    int64_t threshold, seed;     /* threshold 0: no dropout */
    const void *x, *grad, *bias; /* [tokens, K], [tokens, N], [N] or NULL */
    const float *A, *B;          /* [r, K], [N, r] */
    void *y, *h, *dx;            /* [tokens, N], [tokens, r], [tokens, K] or NULL */
    float *dA, *dB;              /* [r, K], [N, r] */
    void *workspace;
} layer;

/* The words of a contraction over n numbers. */
static inline int64_t steps_of(int64_t n) { return ceil_div(n, STEP); }

/* L: tiles of rows as even as they can be, each [steps][its rows]. */
typedef struct {
    uint32_t *data;
    int64_t rows, tiles, steps;
} tiles;

static inline int64_t first_row(const tiles *t, int64_t tile) { return t->rows * tile / t->tiles; }

static inline int tile_rows(const tiles *t, int64_t tile) { return (int)(first_row(t, tile + 1) - first_row(t, tile)); }

static inline uint32_t *tile_data(const tiles *t, int64_t tile) { return t->data + first_row(t, tile) * t->steps; }

/* The first n of 32 bits; n may be negative or above 32. */
static inline uint32_t first_bits(int64_t n) { return n <= 0 ? 0 : n >= 32 ? ~0u : (1u << n) - 1; }

#endif
