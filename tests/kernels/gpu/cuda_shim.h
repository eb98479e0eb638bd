// CUDA C++ on a CPU: what few_tokens.cu takes of it. A thread of a GPU is a thread here; CTAs run one after the other.
//
// __syncthreads is a barrier of a CTA's threads. What a warp does together (mma, what one lane has of another) passes
// through memory that its lanes share: each puts down its part, all meet, each takes what it needs. There are two such
// places, in turns, so that no lane overwrites what a slower one has yet to read.

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define DEVICE inline
#define __device__
#define __global__
#define __launch_bounds__(...)

using std::min;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct Index {
    unsigned x;
};

struct Warp {
    std::barrier<> meet{32};
    uint32_t left[2][32][6];
};

inline Index blockIdx, gridDim;
inline thread_local Index threadIdx;
inline thread_local Warp* own_warp;
inline thread_local unsigned turn;
inline std::barrier<>* own_block;
inline uint4* shared_memory;
inline thread_local bool has_waited, has_let_go;
inline std::atomic<bool> is_wrong;  // 16 bytes that begin anywhere, or x before the wait
inline unsigned products[32];       // mma of each warp, since the last launch

inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// To nearest, ties to even; a NaN becomes the one that hardware makes.
inline uint32_t to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline void __syncthreads() { own_block->arrive_and_wait(); }

template <class T>
T read(const void* at) {
    T to;
    std::memcpy(&to, at, sizeof to);
    return to;
}

// A GPU refuses 16 bytes that do not begin at a multiple of 16.
inline uint4 read_16(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 16) is_wrong = true;
    return read<uint4>(at);
}

inline uint4 load_weight(const unsigned char* at) { return read_16(at); }
inline uint32_t load_code(const unsigned char* at) { return *at; }
inline float load_scale(const float* at) { return *at; }

inline uint4 load_x(const unsigned short* at) {
    if (!has_waited) is_wrong = true;
    return read_16(at);
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t bytes) {
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t to = 0;
    for (int i = 0; i < 4; ++i) to |= uint32_t(both >> 8 * (bytes >> 4 * i & 7) & 255) << 8 * i;
    return to;
}

inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    const uint32_t low = to_bfloat16(__uint_as_float(a << 16) * __uint_as_float(b << 16));
    const uint32_t high = to_bfloat16(__uint_as_float(a & 0xffff0000) * __uint_as_float(b & 0xffff0000));
    return low | high << 16;
}

inline uint32_t round_pair(float low, float high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }

// What each lane of the warp has put down: 6 words.
inline uint32_t (*exchanged(std::initializer_list<uint32_t> own))[6] {
    auto place = own_warp->left[turn++ % 2];
    std::copy(own.begin(), own.end(), place[threadIdx.x % 32]);
    own_warp->meet.arrive_and_wait();
    return place;
}

inline uint32_t of_first_lane(uint32_t x) { return exchanged({x})[0][0]; }
inline uint32_t of_pair(uint32_t x, int which) { return exchanged({x})[(threadIdx.x % 32 & ~1) + which][0]; }

inline void mma(
    float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1
) {
    const auto of = exchanged({a0, a1, a2, a3, b0, b1});
    if (threadIdx.x % 32 == 0) ++products[threadIdx.x / 32];
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const auto half = [](uint32_t pair, int k) { return __uint_as_float(k % 2 ? pair & 0xffff0000 : pair << 16); };
    for (int i = 0; i < 4; ++i) {
        const int upper = i / 2, column = 2 * c + i % 2;  // row g or g + 8
        for (int k = 0; k < 16; ++k) {
            const int lane = k % 8 / 2;
            const float a = half(of[4 * g + lane][k / 8 * 2 + upper], k);
            sum[i] += a * half(of[4 * column + lane][4 + k / 8], k);
        }
    }
}

inline void wait_for_the_grid_before() { has_waited = true; }
inline void let_the_next_grid_begin() { has_let_go = true; }

template <class T>
void as_it_is(T) {}

// Run a kernel, with so many bytes of shared memory, poisoned for each CTA. Whether each thread has let the next grid
// begin, and nothing was wrong.
template <class Kernel>
bool launch(unsigned grid, unsigned threads, size_t shared, const Kernel& kernel) {
    std::barrier<> block(threads);
    std::vector<std::unique_ptr<Warp>> warps;
    for (unsigned i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<Warp>());
    own_block = &block;
    gridDim = {grid};
    is_wrong = false;
    std::fill_n(products, 32, 0);
    std::vector<char> let_go(threads, 1);
    for (unsigned cta = 0; cta < grid; ++cta) {
        blockIdx = {cta};
        shared_memory = static_cast<uint4*>(std::malloc(shared));
        std::memset(shared_memory, 0xff, shared);
        std::vector<std::thread> running;
        for (unsigned i = 0; i < threads; ++i)
            running.emplace_back([&, i] {
                threadIdx = {i};
                own_warp = warps[i / 32].get();
                kernel();
                let_go[i] &= has_let_go;
            });
        for (auto& one : running) one.join();
        std::free(shared_memory);
    }
    return !is_wrong && std::all_of(let_go.begin(), let_go.end(), [](char one) { return one; });
}
