// Y[m, n] = sum_g s_a[m, g] s_w[n, g] sum_{k in g} a[m, k] w[n, k] + bias[n] on 4-bit codes, by mma.m16n8k64.s4.
//
// A (M, K / 2) and W (N, K / 2) bytes, two codes each, the even k in the low nibble; scales (M, K / group), (N, K / group)
// float32; K a multiple of group, group a multiple of 64. A block of 4 x 2 warps makes 128 x 64 results, a warp 32 x 32.
#include "device.cuh"

namespace {
constexpr int BLOCK_M = 128, BLOCK_N = 64, WARPS_M = 4, STEP = 64, STAGES = 3, TILES_M = 2, TILES_N = 4;

template <bool A_SIGNED, typename T>
__global__ void __launch_bounds__(THREADS) w4a4(const uint8_t* a, const float* sa, const uint8_t* w, const float* sw,
                                                const float* bias, T* out, int m, int n, int k, int group) {
    alignas(16) __shared__ uint8_t tile_a[STAGES][BLOCK_M * STRIDE];
    alignas(16) __shared__ uint8_t tile_w[STAGES][BLOCK_N * STRIDE];
    const int first_m = blockIdx.y * BLOCK_M, first_n = blockIdx.x * BLOCK_N, steps = k / STEP, groups = k / group;
    const int warp = threadIdx.x / 32, warp_m = warp % WARPS_M * TILES_M * 16, warp_n = warp / WARPS_M * TILES_N * 8;

    auto load = [&](int step) {
        if (step < steps) {
            copy_tile(tile_a[step % STAGES], a, BLOCK_M, first_m, m, k / 2, step * ROW);
            copy_tile(tile_w[step % STAGES], w, BLOCK_N, first_n, n, k / 2, step * ROW);
        }
        end_copies();  // also without copies, so that the count of groups on their way stays right
    };

    float sum[TILES_M][TILES_N][4] = {};
    int products[TILES_M][TILES_N][4] = {};
    for (int step = 0; step < STAGES - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();  // the copies of all threads have arrived, and nobody reads the tile that is loaded next
        load(step + STAGES - 1);
        uint32_t fa[TILES_M][4], fb[TILES_N][2];
        for (int i = 0; i < TILES_M; ++i) load_a(fa[i], tile_a[step % STAGES] + (warp_m + i * 16) * STRIDE);
        for (int j = 0; j < TILES_N; ++j) load_b(fb[j], tile_w[step % STAGES] + (warp_n + j * 8) * STRIDE);
#pragma unroll
        for (int i = 0; i < TILES_M; ++i)
#pragma unroll
            for (int j = 0; j < TILES_N; ++j) mma_s4<A_SIGNED>(products[i][j], fa[i], fb[j]);
        if ((step + 1) * STEP % group != 0) continue;
        const int g = step * STEP / group;
        each_result<TILES_M, TILES_N>(first_m + warp_m, first_n + warp_n, [&](int i, int j, int c, int y, int x) {
            const float scale = y < m && x < n ? sa[int64_t(y) * groups + g] * sw[int64_t(x) * groups + g] : 0.0f;
            sum[i][j][c] += scale * static_cast<float>(products[i][j][c]);
            products[i][j][c] = 0;
        });
    }
    each_result<TILES_M, TILES_N>(first_m + warp_m, first_n + warp_n, [&](int i, int j, int c, int y, int x) {
        if (y < m && x < n) out[int64_t(y) * n + x] = to<T>(sum[i][j][c] + (bias ? bias[x] : 0.0f));
    });
}

template <typename T>
int run(const uint8_t* a, const float* sa, const uint8_t* w, const float* sw, const float* bias, void* out, int m, int n, int k,
        int group, int a_signed, void* stream) {
    const dim3 grid((n + BLOCK_N - 1) / BLOCK_N, (m + BLOCK_M - 1) / BLOCK_M);
    if (a_signed)
        LAUNCH((w4a4<true, T>), grid, THREADS, stream, a, sa, w, sw, bias, static_cast<T*>(out), m, n, k, group);
    else
        LAUNCH((w4a4<false, T>), grid, THREADS, stream, a, sa, w, sw, bias, static_cast<T*>(out), m, n, k, group);
    return static_cast<int>(cudaGetLastError());
}
}  // namespace

// kind: 0 float32, 1 float16, 2 bfloat16. Returns CUDA's error code, 0 for none.
extern "C" int fewstep_w4a4(const uint8_t* a, const float* sa, const uint8_t* w, const float* sw, const float* bias, void* out,
                            int m, int n, int k, int group, int a_signed, int kind, void* stream) {
    if (kind == 0) return run<float>(a, sa, w, sw, bias, out, m, n, k, group, a_signed, stream);
    if (kind == 1) return run<__half>(a, sa, w, sw, bias, out, m, n, k, group, a_signed, stream);
    return run<__nv_bfloat16>(a, sa, w, sw, bias, out, m, n, k, group, a_signed, stream);
}
