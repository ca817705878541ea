// CUDA's part of the kernels for a host compiler: a block's threads as fibers on one core, in lockstep from barrier to
// barrier, and the matrix instructions by the fragment tables of the PTX ISA, written down again here and not shared with
// the kernels. It proves the kernels' own source: indices, masks, pipeline stages, scales. Not fast, and no proof of a race.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

struct dim3 {
    int x, y, z;
    dim3(int x = 1, int y = 1, int z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx;
inline int cudaGetLastError() { return 0; }

namespace emulation {
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 << 10);
    bool done = false;
};
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline uint32_t registers[32][32][6];  // [warp][lane]: four of A, two of B

inline void start() {
    body();
    fibers[threadIdx.x].done = true;
    swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

// Every thread runs up to here before any goes on: all of them meet the same barriers in the same order.
inline void barrier() {
    const int me = threadIdx.x;
    swapcontext(&fibers[me].context, &scheduler);
}

// Copies arrive as late as they may: when they are waited for.
struct Copy {
    void* to;
    const void* from;
    bool inside;
};
inline std::vector<std::vector<Copy>> queues[1024];  // [thread]: groups, the open one last
inline std::vector<std::vector<Copy>>& queue() {
    auto& mine = queues[threadIdx.x];
    if (mine.empty()) mine.emplace_back();
    return mine;
}
inline void run(dim3 grid, int threads, std::function<void()> kernel) {
    body = std::move(kernel);
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
            fibers = std::vector<Fiber>(threads);
            for (auto& groups : queues) groups.clear();
            for (Fiber& fiber : fibers) {
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.data();
                fiber.context.uc_stack.ss_size = fiber.stack.size();
                makecontext(&fiber.context, start, 0);
            }
            while (!fibers[0].done)
                for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
                    swapcontext(&scheduler, &fibers[threadIdx.x].context);
        }
}

// c[i] += sum over the row of A and the column of B of what `dot` makes of two 32-bit words. PTX ISA, "Matrix Fragments for
// mma.m16n8k64" and ".m16n8k256": the word of A at (row, word) is register (row / 8) + 2 (word / 4) of lane
// 4 (row % 8) + word % 4; that of B at (word, column) is register word / 4 of lane 4 column + word % 4; c[i] is at row
// lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2.
template <typename Dot>
void mma(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Dot dot) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto& all = registers[warp];
    std::memcpy(all[lane], a, sizeof a);
    std::memcpy(all[lane] + 4, b, sizeof b);
    barrier();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (int word = 0; word < 8; ++word)
            c[i] += dot(all[4 * (row % 8) + word % 4][row / 8 + 2 * (word / 4)], all[4 * column + word % 4][4 + word / 4]);
    }
    barrier();
}
}  // namespace emulation

#define LAUNCH(kernel, grid, threads, stream, ...) emulation::run(grid, threads, [=] { kernel(__VA_ARGS__); })
inline void __syncthreads() { emulation::barrier(); }

template <bool A_SIGNED>
void mma_s4(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::mma(c, a, b, [](uint32_t x, uint32_t y) {
        int sum = 0;
        for (int i = 0; i < 8; ++i) {
            const int p = x >> 4 * i & 15, q = y >> 4 * i & 15;
            sum += (A_SIGNED && p > 7 ? p - 16 : p) * (q > 7 ? q - 16 : q);
        }
        return sum;
    });
}

template <bool XOR>
void mma_b1(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::mma(c, a, b, [](uint32_t x, uint32_t y) { return __builtin_popcount(XOR ? x ^ y : x & y); });
}

inline void copy16(void* shared, const void* global, bool inside) { emulation::queue().back().push_back({shared, global, inside}); }
inline void end_copies() { emulation::queue().emplace_back(); }

template <int STILL_ON_THEIR_WAY>
void wait_for_copies() {
    auto& groups = emulation::queue();
    while (groups.size() > STILL_ON_THEIR_WAY + 1) {
        for (const auto& copy : groups.front()) {
            if (copy.inside)
                std::memcpy(copy.to, copy.from, 16);
            else
                std::memset(copy.to, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

// 16-bit floats only as far as the kernels make them: rounded to nearest, ties to even.
struct __half {
    _Float16 value;
    explicit __half(float x) : value(static_cast<_Float16>(x)) {}
};
struct __nv_bfloat16 {
    uint16_t bits;
    explicit __nv_bfloat16(float x) {
        uint32_t wide;
        std::memcpy(&wide, &x, 4);
        bits = static_cast<uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
    }
};
