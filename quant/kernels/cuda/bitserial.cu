// Products of codes of any width, one pair of bit planes at a time, by binary mma.m16n8k256.
//
// sum_k a[m, k] w[n, k] = sum_{i, j} 2^(i + j) popc(A_i[m] & W_j[n]) for unsigned codes, whose zero points the caller takes
// off; with XOR every bit stands for +1 or -1, and the result is (2^p - 1)(2^q - 1) K - 2 sum_{i, j} 2^(i + j) popc(A_i ^ W_j).
// Planes (p, M, K' / 8) and (q, N, K' / 8) bytes, K' = K padded with zero bits to a multiple of 256; out (M, N) int32.
// A block of 2 x 4 warps makes 64 x 64 results, a warp 32 x 16. All planes of a step are in shared memory together.
#include "device.cuh"

namespace {
constexpr int BLOCK = 64, WARPS_M = 2, MAX_BITS = 8, TILES_M = 2, TILES_N = 2;

template <bool XOR>
__global__ void __launch_bounds__(THREADS) bitserial(const uint8_t* a, const uint8_t* w, int* out, int m, int n, int k, int bytes,
                                                     int p, int q) {
    alignas(16) __shared__ uint8_t tile[2 * MAX_BITS * BLOCK * STRIDE];
    uint8_t *const tile_a = tile, *const tile_w = tile + p * BLOCK * STRIDE;
    const int first_m = blockIdx.y * BLOCK, first_n = blockIdx.x * BLOCK;
    const int warp = threadIdx.x / 32, warp_m = warp % WARPS_M * TILES_M * 16, warp_n = warp / WARPS_M * TILES_N * 8;

    int sum[TILES_M][TILES_N][4] = {};
    for (int from = 0; from < bytes; from += ROW) {
        for (int i = 0; i < p; ++i)
            copy_tile(tile_a + i * BLOCK * STRIDE, a + int64_t(i) * m * bytes, BLOCK, first_m, m, bytes, from);
        for (int j = 0; j < q; ++j)
            copy_tile(tile_w + j * BLOCK * STRIDE, w + int64_t(j) * n * bytes, BLOCK, first_n, n, bytes, from);
        end_copies();
        wait_for_copies<0>();
        __syncthreads();
        for (int i = 0; i < p; ++i) {
            uint32_t fa[TILES_M][4];
#pragma unroll
            for (int r = 0; r < TILES_M; ++r) load_a(fa[r], tile_a + (i * BLOCK + warp_m + r * 16) * STRIDE);
            for (int j = 0; j < q; ++j)
#pragma unroll
                for (int s = 0; s < TILES_N; ++s) {
                    uint32_t fw[2];
                    load_b(fw, tile_w + (j * BLOCK + warp_n + s * 8) * STRIDE);
#pragma unroll
                    for (int r = 0; r < TILES_M; ++r) {
                        int count[4] = {};
                        mma_b1<XOR>(count, fa[r], fw);
#pragma unroll
                        for (int c = 0; c < 4; ++c) sum[r][s][c] += count[c] << (i + j);
                    }
                }
        }
        __syncthreads();
    }
    const int all = ((1 << p) - 1) * ((1 << q) - 1) * k;
    each_result<TILES_M, TILES_N>(first_m + warp_m, first_n + warp_n, [&](int r, int s, int c, int y, int x) {
        if (y < m && x < n) out[int64_t(y) * n + x] = XOR ? all - 2 * sum[r][s][c] : sum[r][s][c];
    });
}
}  // namespace

// Returns CUDA's error code, 0 for none.
extern "C" int fewstep_bitserial(const uint8_t* a, const uint8_t* w, int* out, int m, int n, int k, int bytes, int p, int q,
                                 int bipolar, void* stream) {
    const dim3 grid((n + BLOCK - 1) / BLOCK, (m + BLOCK - 1) / BLOCK);
    if (bipolar)
        LAUNCH((bitserial<true>), grid, THREADS, stream, a, w, out, m, n, k, bytes, p, q);
    else
        LAUNCH((bitserial<false>), grid, THREADS, stream, a, w, out, m, n, k, bytes, p, q);
    return static_cast<int>(cudaGetLastError());
}
