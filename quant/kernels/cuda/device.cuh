// What both kernels use, and the only place that knows whether nvcc or a host compiler reads them.
//
// A tile in shared memory has rows of 32 bytes, 64 values of 4 bits or 256 of one, and STRIDE bytes from row to row: with
// 12 words the 8 x 4 words that the lanes of a warp read together lie in 32 different banks.
#pragma once

#include <cstdint>

#ifdef FEWSTEP_EMULATE
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

template <bool A_SIGNED>
__device__ inline void mma_s4(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (A_SIGNED)
        asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <bool XOR>
__device__ inline void mma_b1(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (XOR)
        asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from global to shared memory, or zeros; arrives with the next wait_for_copies.
__device__ inline void copy16(void* shared, const void* global, bool inside) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(inside ? 16 : 0));
}

__device__ inline void end_copies() { asm volatile("cp.async.commit_group;"); }

template <int STILL_ON_THEIR_WAY>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(STILL_ON_THEIR_WAY));
}
#endif

constexpr int ROW = 32, STRIDE = 48, THREADS = 256;

template <typename T>
__device__ inline T to(float value) { return static_cast<T>(value); }

// Start to copy `count` rows of 32 bytes from row `first` and byte `from` on; rows at or beyond `rows` become zeros.
__device__ inline void copy_tile(uint8_t* tile, const uint8_t* matrix, int count, int first, int rows, int64_t pitch, int64_t from) {
    for (int i = threadIdx.x; i < count * 2; i += THREADS) {
        const int row = i / 2, half = i % 2 * 16;
        const bool inside = first + row < rows;
        copy16(tile + row * STRIDE + half, inside ? matrix + (first + row) * pitch + from + half : matrix, inside);
    }
}

// The part of a 16 x 32-byte tile of A that this lane holds: rows g and g + 8, words t and t + 4 (PTX ISA, mma.m16n8k64
// and .m16n8k256: g = lane / 4, t = lane % 4; the same words in both).
__device__ inline void load_a(uint32_t (&a)[4], const uint8_t* tile) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        a[i] = *reinterpret_cast<const uint32_t*>(tile + (g + i % 2 * 8) * STRIDE + (t + i / 2 * 4) * 4);
}

// The same of an 8 x 32-byte tile of B, stored by columns of the product: column g, words t and t + 4.
__device__ inline void load_b(uint32_t (&b)[2], const uint8_t* tile) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) b[i] = *reinterpret_cast<const uint32_t*>(tile + g * STRIDE + (t + i * 4) * 4);
}

// Row and column within its 16 x 8 tile of the result c[i] that this lane holds.
__device__ inline int row_of(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
__device__ inline int column_of(int i) { return threadIdx.x % 4 * 2 + i % 2; }

// f(i, j, c, y, x) for every result that this lane holds: number c of tile (i, j), at row y and column x of the product.
template <int TILES_M, int TILES_N, typename F>
__device__ inline void each_result(int first_m, int first_n, F f) {
#pragma unroll
    for (int i = 0; i < TILES_M; ++i)
#pragma unroll
        for (int j = 0; j < TILES_N; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) f(i, j, c, first_m + i * 16 + row_of(c), first_n + j * 8 + column_of(c));
}
