// One row of activations times a packed weight: y = x W, the whole of decoding.
//
// A warp multiplies tiles of 16 outputs with the matrix unit, fp32 sums. KS warps share a tile (each takes a range of
// chunks) and their sums are added in a fixed order: no atomics, the same bits every time. Weights of the first
// batch are on their way before the kernel waits for the one ahead, which hides the start of the kernel.

struct GemvArguments {
  const u8* weights;     // [tiles][chunks][chunk_bytes]
  const u32* scales;     // [tiles][groups][8]: see load_scale
  const u16* x;          // fp16 [chunks * 64], engine order
  const u16* norm;       // fp16 [chunks * 64], engine order: weight of the RMSNorm before, NORM only
  const u16* bias;       // fp16 [tiles * 16] in the order of the rows, or null
  void* out;             // fp16 [n] (PLAIN), fp32 [n] (FLOAT), fp16 [n / 2] (SILU), fp16 engine order of the next input (RESIDUAL)
  float* residual;       // fp32 [n], RESIDUAL only
  const int* places;     // [n]: where row n stands in the next input, RESIDUAL only
  int n, tiles, chunks, groups;
  u32 unit_to_group;     // group of unit u is u * unit_to_group >> 16; 0 for one group
  int k;                 // inputs without padding
  float eps;
};

enum { PLAIN, FLOAT, SILU, RESIDUAL };

// x, normed if asked for, into shared memory. `threads` a multiple of 32; up to 4 * 8 * threads inputs.
template <bool NORM> DEVICE void stage(const u16* x, const u16* norm, u16* shared, int padded, int k, float eps, float* scratch) {
  const int threads = blockDim.x, tid = threadIdx.x;
  if constexpr (!NORM) {
    for (int at = tid * 8; at < padded; at += threads * 8) *(uint4*)(shared + at) = __ldcg((const uint4*)(x + at));
    __syncthreads();
    return;
  }
  uint4 mine[4], weight[4];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = (i * threads + tid) * 8;
    if (at < padded) {
      mine[i] = __ldcg((const uint4*)(x + at));
      weight[i] = __ldg((const uint4*)(norm + at));
      const u32* m = &mine[i].x;
#pragma unroll
      for (int j = 0; j < 4; j++) { float a = low_of(m[j]), b = high_of(m[j]); sum += a * a + b * b; }
    }
  }
  const float scale = rsqrtf(block_sum(sum, scratch) / k + eps);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = (i * threads + tid) * 8;
    if (at < padded) {
      u32 *m = &mine[i].x, *w = &weight[i].x;
#pragma unroll
      for (int j = 0; j < 4; j++)
        m[j] = to_half2(low_of(m[j]) * scale * low_of(w[j]), high_of(m[j]) * scale * high_of(w[j]));
      *(uint4*)(shared + at) = mine[i];
    }
  }
  __syncthreads();
}

template <int BITS, bool SYM, int UNITS, int KS, int BATCH, int EPILOGUE, bool NORM>  // UNITS: changes of scale possible within a chunk
DEVICE void gemv(const GemvArguments& p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int team = warp / KS, teams = warps / KS, part = warp % KS;
  u16* xs = (u16*)shared_words;                                   // [chunks * 64]
  float* scratch = (float*)(xs + p.chunks * 64);                  // 36
  float* sums = scratch + 36 + team * 2 * KS * 16;                // [2][KS][16] of this team
  const int per = (p.chunks + KS - 1) / KS, first = min(part * per, p.chunks), end = min(first + per, p.chunks);
  const int stride = gridDim.x * teams;

  Words<BITS> now[BATCH], next[BATCH];
  Scale<SYM> scale_now[BATCH * UNITS], scale_next[BATCH * UNITS];
  auto fetch = [&](Words<BITS>(&words)[BATCH], Scale<SYM>(&scale)[BATCH * UNITS], int tile, int chunk) {
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      if (chunk + i < end && tile < p.tiles) {
        words[i] = load_words<BITS>(p.weights + ((size_t)tile * p.chunks + chunk + i) * chunk_bytes<BITS>(), lane);
#pragma unroll
        for (int u = 0; u < UNITS; u++)
          scale[i * UNITS + u] = load_scale<BITS, SYM>(
              p.scales, (tile * p.groups + (int)(((chunk + i) * UNITS + u) * p.unit_to_group >> 16)) * 8 + lane / 4);
      }
    }
  };

  int tile = blockIdx.x * teams + team;
  fetch(now, scale_now, tile, first);
  let_the_next_kernel_start();
  wait_for_the_kernel_ahead();
  stage<NORM>(p.x, p.norm, xs, p.chunks * 64, p.k, p.eps, scratch);

  for (int parity = 0; tile < p.tiles; tile += stride, parity ^= 1) {
    float row = 0.f, row8 = 0.f;
    for (int chunk = first; chunk < end; chunk += BATCH) {
      const bool last = chunk + BATCH >= end;
      fetch(next, scale_next, last ? tile + stride : tile, last ? first : chunk + BATCH);
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        if (chunk + i < end) {
          u32 b[8] = {0, 0, 0, 0, 0, 0, 0, 0};
          if (lane < 4) {  // the one column that is not zero
            *(uint4*)b = *(const uint4*)(xs + (chunk + i) * 64 + lane * 16);
            *(uint4*)(b + 4) = *(const uint4*)(xs + (chunk + i) * 64 + lane * 16 + 8);
          }
          float c[4];
#pragma unroll
          for (int s = 0; s < 4; s++) {
            const Scale<SYM>& scale = scale_now[i * UNITS + s * UNITS / 4];
            if (s * UNITS % 4 == 0) c[0] = c[1] = c[2] = c[3] = 0.f;
            u32 a[4];
            fragment<BITS>(now[i], s, twice_low(scale.z), twice_high(scale.z), a);
            mma(c, a, b[2 * s], b[2 * s + 1]);
            if ((s + 1) * UNITS % 4 == 0) {
              row += low_of(scale.s) * c[0];
              row8 += high_of(scale.s) * c[2];
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < BATCH; i++) now[i] = next[i];
#pragma unroll
      for (int i = 0; i < BATCH * UNITS; i++) scale_now[i] = scale_next[i];
    }
    float* mine = sums + parity * KS * 16;
    if (lane % 4 == 0) {
      mine[part * 16 + lane / 4] = row;
      mine[part * 16 + lane / 4 + 8] = row8;
    }
    if (KS == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "r"(KS * 32) : "memory");
    if (part == 0) {
      const int at = lane % 16, n = tile * 16 + at;
      float y = 0.f;
#pragma unroll
      for (int i = 0; i < KS; i++) y += mine[i * 16 + at];
      if (p.bias) y += to_float(p.bias[n]);
      if constexpr (EPILOGUE == SILU) {
        const float up = __shfl_sync(FULL, y, at | 8);
        if (lane < 8) ((u16*)p.out)[tile * 8 + lane] = to_half(y / (1.f + __expf(-y)) * up);
      } else if (lane < 16 && n < p.n) {
        if constexpr (EPILOGUE == PLAIN) ((u16*)p.out)[n] = to_half(y);
        if constexpr (EPILOGUE == FLOAT) ((float*)p.out)[n] = y;
        if constexpr (EPILOGUE == RESIDUAL) {
          const float h = p.residual[n] + y;
          p.residual[n] = h;
          ((u16*)p.out)[p.places[n]] = to_half(h);
        }
      }
    }
  }
}
