// few_tokens.cu for a CPU: behind one function; and with MAIN a program that calls it, for sanitizers.
#include <cstdlib>

#include "cuda_shim.h"

#include "few_tokens.cu"

extern "C" __attribute__((visibility("default"))) int run(
    unsigned grid, size_t shared, const u16* x, const u8* packed, const u8* scales, const float* absmax2,
    const float* offset, const float* scale_map, const u16* bias, u16* out, const u16* h, const float* B, u32 M, u32 N,
    u32 r, float inverse, const u32* t
) {
    return launch(grid, 32 * WARPS, shared, [&] {
        few_tokens(
            x, packed, scales, absmax2, offset, scale_map, bias, out, h, B, M, N, r, inverse, t[0], t[1], t[2], t[3],
            t[4], t[5], t[6], t[7]
        );
    });
}

extern "C" __attribute__((visibility("default"))) unsigned products_of(unsigned warp) { return products[warp]; }

#ifdef MAIN
// Operands of exactly their size, of whole numbers: every grid gives the same bits.
template <class T>
struct Operand {
    T* data;
    size_t size;
    Operand(size_t size, T of) : data(static_cast<T*>(std::malloc(size * sizeof(T)))), size(size) {
        for (size_t i = 0; i < size; ++i) data[i] = of;
    }
    ~Operand() { std::free(data); }
};

int main(int, char** arguments) {
    const u32 M = std::atoi(arguments[1]), N = std::atoi(arguments[2]), r = 5, K = 64 * BLOCKS;
    const u32 blocks = (N * BLOCKS + (1 << SHIFT) - 1) >> SHIFT, levels = (blocks + SCALES - 1) / SCALES;
    Operand<u16> x(M * K, 0x3f80), bias(N, 0x3f80), h(M * r, 0x3f80), first(M * N, 0), out(M * N, 0);
    Operand<u8> packed(N * K / 2, 0), scales(blocks * (DOUBLE ? 1 : 4), 0);
    Operand<float> absmax2(levels, 1), offset(1, 1), map(SCALES, 1), B(N * r, 1);
    for (size_t i = 0; i < packed.size; ++i) packed.data[i] = i * 37 % 251;
    const u32 t[8] = {0x3f3f3f3f, 0x40404040, 0x3f3f3f3f, 0, 0x80808080, 0, 0x80808080, 0};
    for (u32 grid : {1, 3}) {
        Operand<u16>& to = grid == 1 ? first : out;
        if (!run(
                grid, LEVELS_AT + 4 * ((N + 2 * ROWS) * BLOCKS / SCALES + 2), x.data, packed.data, scales.data,
                absmax2.data, offset.data, map.data, bias.data, to.data, h.data, B.data, M, N, r, 1, t
            ))
            return 1;
    }
    return std::memcmp(first.data, out.data, out.size * 2) ? 2 : 0;
}
#endif
