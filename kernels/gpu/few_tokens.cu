// y = x W'^T + bias + h B'^T for 1 to 16 tokens. few_tokens.py says how, and compiles this with the constants
//
//   TOKEN_TILES   of 8 tokens: 1 or 2
//   DOUBLE        whether the scales are quantized too
//   BLOCKS        of 64 columns in a row of W: K / 64
//   SHIFT         log2 of block size / 64
//
// The functions between #ifdef and #endif are PTX. For a CPU another file defines them, and the tests run the rest.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#ifdef __CUDACC_RTC__
#define DEVICE __device__ __forceinline__

// A weight is read once: it is not to drive x out of the cache.
DEVICE uint4 load_weight(const u8* at) {
    uint4 to;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                 : "l"(at));
    return to;
}

DEVICE u32 load_code(const u8* at) {
    u16 to;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=h"(to) : "l"(at));
    return to;
}

DEVICE float load_scale(const float* at) {
    float to;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(to) : "l"(at));
    return to;
}

// Not .nc: the grid before may have written x just now.
DEVICE uint4 load_x(const u16* at) {
    uint4 to;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(at));
    return to;
}

DEVICE u32 permute(u32 a, u32 b, u32 bytes) {
    u32 to;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(to) : "r"(a), "r"(b), "r"(bytes));
    return to;
}

// Two products of bfloat16, each rounded once. sm_80 multiplies only with a sum; that with -0 changes nothing.
DEVICE u32 multiply_pairs(u32 a, u32 b) {
    u32 to;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(to) : "r"(a), "r"(b), "r"(0x80008000));
    return to;
}

DEVICE u32 round_pair(float low, float high) {
    u32 to;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(to) : "f"(high), "f"(low));
    return to;
}

DEVICE u32 of_first_lane(u32 x) { return __shfl_sync(~0u, x, 0); }

// What the even (0) or the odd lane (1) of two neighbours has.
DEVICE u32 of_pair(u32 x, int which) { return __shfl_sync(~0u, x, which, 2); }

// sum += a b. Lane 4 g + c has of a the rows g and g + 8, of b the column g, and of sum those rows in columns 2 c and
// 2 c + 1.
DEVICE void mma(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE void wait_for_the_grid_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void let_the_next_grid_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <class T>
DEVICE void as_it_is(T*& pointer) { asm volatile("" : "+l"(pointer)); }

extern __shared__ uint4 shared_memory[];
#endif

constexpr u32 WARPS = 16;
constexpr u32 ROWS = 16;   // of a row tile: those of an mma
constexpr u32 TILES = 2;   // row tiles of a group, multiplied by the same x
constexpr u32 AHEAD = 2;   // units of a warp whose bytes are on their way
constexpr u32 GROUP = TILES * ROWS;
constexpr u32 UNITS = (BLOCKS + 1) / 2;  // of 128 columns; the last may be half of one
constexpr bool HALF = BLOCKS % 2;
constexpr u32 BYTES = 32 * BLOCKS;  // of a row
constexpr u32 SCALES = 256;         // that have a scale of the second level together

// Shared memory: the pair of byte b at 256 b, 32 times, and after each 128 bytes that hold sums; the map of the scales'
// codes; the scales of the second level.
constexpr u32 SUMS_AT = 128, MAP_AT = 256 * 256, LEVELS_AT = MAP_AT + 4 * SCALES;

DEVICE float float_of(u32 bfloat16) { return __uint_as_float(bfloat16 << 16); }
DEVICE u16 bfloat16_of(float x) { return u16(round_pair(x, x)); }
DEVICE u32 word(const uint4& of, int i) { return i < 2 ? i ? of.y : of.x : i == 2 ? of.z : of.w; }

// The scale of block + more.
DEVICE u32 scale_of(u32 block, u32 more) {
    return more % (1 << SHIFT) ? (block + more) >> SHIFT : (block >> SHIFT) + (more >> SHIFT);
}

// Where a warp is among the units of its CTA.
struct Place {
    u32 row, unit;  // the first row of the group, and of two units the first
    u32 slot;       // unit % WARPS of all units that the warp has of the group

    // Go on, while the group has no such unit.
    DEVICE void settle(u32 end) {
        while (unit >= UNITS && row < end) {
            row += GROUP;
            slot = (slot - UNITS) % WARPS;
            unit = slot;
        }
    }
};

// What a lane reads of a place: 16 bytes of its first row, and the block of its scale.
struct Source {
    const u8* words;
    const u8* scales;
    u32 block;
};

// The first row of a group that is read: its own, or an earlier one, so that the last row is one of the matrix.
DEVICE u32 first_row(u32 row, u32 end, u32 N) { return min(row, N - min(end - row, GROUP)); }

// The term of the bias and the adapter, rows of which begin at row: what the sums of a group start with.
DEVICE void start(
    float (&sums)[TILES][TOKEN_TILES][4], const u16* bias, const u16* h, const float* B, u32 r, u32 row, u32 tiles,
    u32 M, u32 g, u32 c
) {
    for (u32 tile = 0; tile < TILES; ++tile) {
        if (tile >= tiles) break;
        const u32 n = row + tile * ROWS + g;
        if (bias)
            for (u32 t = 0; t < TOKEN_TILES; ++t)
                for (u32 i = 0; i < 4; ++i) sums[tile][t][i] = float_of(bias[n + i / 2 * 8]);
        for (u32 first = 0; first < r; first += 16) {
            const u32 j = first + 4 * c;
            auto pair_of_B = [&](u32 n, u32 j) {
                const float* from = B + u64(n) * r;
                return round_pair(j < r ? from[j] : 0, j + 1 < r ? from[j + 1] : 0);
            };
            const u32 a0 = pair_of_B(n, j), a1 = pair_of_B(n + 8, j);
            const u32 a2 = pair_of_B(n, j + 2), a3 = pair_of_B(n + 8, j + 2);
            for (u32 t = 0; t < TOKEN_TILES; ++t) {
                const u16* from = h + u64(min(g + 8 * t, M - 1)) * r;
                auto pair_of_h = [&](u32 j) { return (j < r ? from[j] : 0u) | (j + 1 < r ? from[j + 1] : 0u) << 16; };
                mma(sums[tile][t], a0, a1, a2, a3, pair_of_h(j), pair_of_h(j + 2));
            }
        }
    }
}

// The 16 values of two bytes are the planes t0 to t3, the high bytes, and t4 to t7, the low ones.
DEVICE u32 value_of(u32 code, u32 t0, u32 t1, u32 t2, u32 t3, u32 t4, u32 t5, u32 t6, u32 t7) {
    const u32 high = permute(code < 8 ? t0 : t2, code < 8 ? t1 : t3, code % 8);
    const u32 low = permute(code < 8 ? t4 : t6, code < 8 ? t5 : t7, code % 8);
    return (high & 0xff) << 8 | (low & 0xff);
}

// x bfloat16 [M, K]; packed uint8 [N, K / 2]; scales uint8 or float32; bias bfloat16 [N] or null; out bfloat16 [M, N];
// h bfloat16 [M, r] and B float32 [N, r], or r is 0.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) few_tokens(
    const u16* x, const u8* packed, const u8* scales, const float* absmax2, const float* offset, const float* scale_map,
    const u16* bias, u16* out, const u16* h, const float* B, u32 M, u32 N, u32 r, float inverse, u32 t0, u32 t1, u32 t2,
    u32 t3, u32 t4, u32 t5, u32 t6, u32 t7
) {
    u8* const shared = reinterpret_cast<u8*>(shared_memory);
    const u32 thread = threadIdx.x, lane = thread % 32, g = lane / 4, c = lane % 4, lane4 = 4 * lane;
    const u32 warp = of_first_lane(thread / 32);
    const u64 row_tiles = (N + ROWS - 1) / ROWS;
    const u32 first = row_tiles * blockIdx.x / gridDim.x * ROWS;
    const u32 end = row_tiles * (blockIdx.x + 1) / gridDim.x * ROWS;
    const u8* const weights = packed + (g * BYTES + 16 * c);
    const u32 block_of_lane = (g + 8 * (c % 2)) * BLOCKS + c / 2;

    // A lane loads 16 bytes of rows g and g + 8 of each row tile, and the scale of row g + 8 (c % 2), block c / 2.
    uint4 words[AHEAD][TILES][2] = {};
    u32 codes[AHEAD][TILES] = {};
    float whole_scales[AHEAD][TILES] = {};
    const auto is_one = [&](u32 unit, u32 v) { return UNITS % (AHEAD * WARPS) == 0 || unit + v * WARPS < UNITS; };
    const auto lacks = [&](u32 unit) { return HALF && unit == UNITS - 1 && c >= 2; };
    const auto source_of = [&](const Place& at) {
        const u32 row = first_row(at.row, end, N);
        const u32 block = row * BLOCKS + 2 * at.unit + block_of_lane;
        const u8* scale = scales + (block >> SHIFT) * (DOUBLE ? 1 : 4);
        Source source = {weights + u64(row) * BYTES + at.unit * 64, scale, block};
        as_it_is(source.words), as_it_is(source.scales);
        return source;
    };
    const auto fetch = [&](u32 v, const Place& at, const Source& from) {
        if (at.row >= end || !is_one(at.unit, v)) return;
        const u32 back = lacks(at.unit + v * WARPS);
#pragma unroll
        for (u32 tile = 0; tile < TILES; ++tile) {
            if (at.row + tile * ROWS < end) {
                const u8* to = from.words - 32 * back + v * WARPS * 64 + tile * ROWS * BYTES;
                words[v][tile][0] = load_weight(to);
                words[v][tile][1] = load_weight(to + 8 * BYTES);
                const u32 scale = scale_of(from.block - back, tile * ROWS * BLOCKS + v * WARPS * 2);
                const int more = scale - (from.block >> SHIFT);
                if (DOUBLE)
                    codes[v][tile] = load_code(from.scales + more);
                else
                    whole_scales[v][tile] = load_scale(reinterpret_cast<const float*>(from.scales) + more);
            }
        }
    };
    Place at = {first, warp, warp};
    at.settle(end);
    Source from = source_of(at);
#pragma unroll
    for (u32 v = 0; v < AHEAD; ++v) fetch(v, at, from);

    const u32 first_level = scale_of(first_row(first, end, N) * BLOCKS, 0) / SCALES, before = 0 - first_level;
    float* const levels = reinterpret_cast<float*>(shared + LEVELS_AT);
    float divided_offset = 0;
    if (DOUBLE) {
        const u32 last_level = scale_of(min(end, N) * BLOCKS - 1, 0) / SCALES;
        for (u32 i = thread; first_level + i <= last_level; i += 32 * WARPS)
            levels[i] = __fmul_rn(absmax2[first_level + i], inverse);
        if (thread < SCALES) reinterpret_cast<float*>(shared + MAP_AT)[thread] = scale_map[thread];
        divided_offset = __fmul_rn(*offset, inverse);
    }
    for (u32 byte = thread / 8; byte < 256; byte += 4 * WARPS) {
        const u32 pair = value_of(byte / 16, t0, t1, t2, t3, t4, t5, t6, t7) |
                         value_of(byte % 16, t0, t1, t2, t3, t4, t5, t6, t7) << 16;
        *reinterpret_cast<uint4*>(shared + 256 * byte + thread % 8 * 16) = uint4{pair, pair, pair, pair};
    }
    __syncthreads();
    wait_for_the_grid_before();

    const u16* x_of_lane[TOKEN_TILES];
    for (u32 t = 0; t < TOKEN_TILES; ++t) x_of_lane[t] = x + u64(min(g + 8 * t, M - 1)) * (64 * BLOCKS) + 32 * c;
    const auto sums_of = [&](u32 slot, u32 token) {
        return reinterpret_cast<float*>(shared + (slot * TOKEN_TILES * 8 + token) * 256 + SUMS_AT);
    };

    // A row tile that the last group lacks is multiplied, too, whatever is in its registers, and not stored.
    for (u32 row = first; row < end; row += GROUP) {
        float sums[TILES][TOKEN_TILES][4] = {};
        const bool has_a_unit = at.row == row;
        const u32 slot = at.slot, group_row = first_row(row, end, N);
        if (has_a_unit && slot == 0) start(sums, bias, h, B, r, group_row, (end - row) / ROWS, M, g, c);
        while (at.row == row) {
            Place next = {at.row, at.unit + AHEAD * WARPS, at.slot};
            next.settle(end);
            const Source ahead = source_of(next);
            const u32 block = from.block;
            const u16* x_unit[TOKEN_TILES];
            for (u32 t = 0; t < TOKEN_TILES; ++t) x_unit[t] = x_of_lane[t] + at.unit * 128, as_it_is(x_unit[t]);
#pragma unroll
            for (u32 v = 0; v < AHEAD; ++v) {
                if (is_one(at.unit, v)) {
                    const bool back = lacks(at.unit + v * WARPS);
                    u32 scale[TILES][2];
#pragma unroll
                    for (u32 tile = 0; tile < TILES; ++tile) {
                        float own;
                        if (DOUBLE) {
                            const u32 level = scale_of(block - back, tile * ROWS * BLOCKS + v * WARPS * 2) / SCALES;
                            own = reinterpret_cast<float*>(shared + MAP_AT)[codes[v][tile]];
                            own = __fmaf_rn(own, levels[level + before], divided_offset);
                        } else {
                            own = __fmul_rn(whole_scales[v][tile], inverse);
                        }
                        const u32 pair = round_pair(own, own);
                        scale[tile][0] = of_pair(pair, 0);
                        scale[tile][1] = of_pair(pair, 1);
                    }
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) {
                        uint4 xs[TOKEN_TILES];
#pragma unroll
                        for (u32 t = 0; t < TOKEN_TILES; ++t) {
                            xs[t] = load_x(x_unit[t] - (back ? 64 : 0) + v * WARPS * 128 + 8 * i);
                            if (back) xs[t] = uint4{0, 0, 0, 0};
                        }
#pragma unroll
                        for (u32 tile = 0; tile < TILES; ++tile) {
                            const u32 low = word(words[v][tile][0], i), high = word(words[v][tile][1], i);
                            const auto pair = [&](u32 bytes, u32 byte, u32 s) {
                                const u32 where = permute(bytes, lane4, 0x7604 | byte << 4);
                                return multiply_pairs(*reinterpret_cast<u32*>(shared + where), s);
                            };
#pragma unroll
                            for (u32 j = 0; j < 2; ++j) {
                                const u32 a0 = pair(low, 2 * j, scale[tile][0]), a1 = pair(high, 2 * j, scale[tile][1]);
                                const u32 a2 = pair(low, 2 * j + 1, scale[tile][0]);
                                const u32 a3 = pair(high, 2 * j + 1, scale[tile][1]);
#pragma unroll
                                for (u32 t = 0; t < TOKEN_TILES; ++t)
                                    mma(sums[tile][t], a0, a1, a2, a3, word(xs[t], 2 * j), word(xs[t], 2 * j + 1));
                            }
                        }
                    }
                }
                fetch(v, next, ahead);
            }
            at = next;
            from = ahead;
        }
        if (row + GROUP >= end) let_the_next_grid_begin();

        __syncthreads();  // the sums of the group before were read
        if (has_a_unit) {
            for (u32 tile = 0; tile < TILES; ++tile)
                for (u32 t = 0; t < TOKEN_TILES; ++t)
                    for (u32 i = 0; i < 4; ++i)
                        sums_of(slot, 8 * t + 2 * c + i % 2)[tile * ROWS + i / 2 * 8 + g ^ 8 * c] = sums[tile][t][i];
        }
        __syncthreads();  // and those of this group are there
        if (warp < M) {
            float sum = 0;
            for (u32 slot = 0; slot < min(UNITS, WARPS); ++slot) sum += sums_of(slot, warp)[lane ^ warp / 2 % 4 * 8];
            const u32 n = group_row + lane;
            if (n >= row && lane < end - row) out[u64(warp) * N + n] = bfloat16_of(sum);
        }
    }
}
