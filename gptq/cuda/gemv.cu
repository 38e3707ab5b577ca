// One row of activations times a packed weight: y = x W, the whole of decoding.
//
// A warp multiplies tiles of 16 outputs with the matrix unit, fp32 sums. KS warps share a tile (each takes a range of
// chunks) and their sums are added in a fixed order: no atomics, the same bits every time. The first weights are on
// their way before the kernel waits for the one ahead, which hides the start of the kernel.

struct GemvArguments {
  const u8* weights;     // [tiles][chunks][chunk_bytes]
  const u32* scales;     // [tiles][groups][8]: see load_scale
  const u16* x;          // fp16 [chunks * 64], engine order
  const u16* norm;       // fp16 [chunks * 64], engine order: weight of the RMSNorm before, NORM only
  const u16* bias;       // fp16 [tiles * 16] in the order of the rows, or null
  void* out;             // fp16 [n] (PLAIN), fp32 [n] (FLOAT), fp16 [n / 2] (SILU), fp16 engine order of the next input (RESIDUAL)
  float* residual;       // fp32 [n], RESIDUAL only
  const int* permutation;     // [n]: where row n stands in the next input, RESIDUAL only
  int n, tiles, chunks, groups;
  u32 unit_to_group;     // group of unit u is u * unit_to_group >> 16; 0 for one group
  int k;                 // inputs without padding
  float eps;
};

enum { PLAIN, FLOAT, SILU, RESIDUAL };

// x into shared memory, normed if NORM, which is how many runs of 8 inputs a thread takes. Its weight is asked for ahead.
// (Kernels are small on purpose: code that runs once is read from memory as the weights are.)
template <int NORM> struct Norm { uint4 weight[NORM]; };
template <> struct Norm<0> {};

template <int NORM> DEVICE Norm<NORM> norm_weight(const u16* norm, int padded) {
  Norm<NORM> r;
  if constexpr (NORM > 0) {
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      const int at = (i * blockDim.x + threadIdx.x) * 8;
      if (at < padded) r.weight[i] = __ldg((const uint4*)(norm + at));
    }
  }
  return r;
}

template <int NORM> DEVICE void stage(const u16* x, const Norm<NORM>& norm, u16* shared, int padded, int k, float eps, float* scratch) {
  const int threads = blockDim.x, tid = threadIdx.x;
  if constexpr (NORM == 0) {
#pragma unroll 4
    for (int at = tid * 8; at < padded; at += threads * 8) *(uint4*)(shared + at) = __ldcg((const uint4*)(x + at));
  } else {
    uint4 mine[NORM];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      const int at = (i * threads + tid) * 8;
      mine[i] = at < padded ? __ldcg((const uint4*)(x + at)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      const u32* m = &mine[i].x;
#pragma unroll
      for (int j = 0; j < 4; j++) { float a = low_of(m[j]), b = high_of(m[j]); sum += a * a + b * b; }
    }
    sum = warp_sum(sum);
    if (tid % 32 == 0) scratch[tid / 32] = sum;
    __syncthreads();
    sum = 0.f;
    for (int i = 0; i < threads / 32; i++) sum += scratch[i];
    const float scale = rsqrtf(sum / k + eps);
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      const int at = (i * threads + tid) * 8;
      if (at < padded) {
        u32* m = &mine[i].x;
        const u32* w = &norm.weight[i].x;
#pragma unroll
        for (int j = 0; j < 4; j++)
          m[j] = to_half2(low_of(m[j]) * scale * low_of(w[j]), high_of(m[j]) * scale * high_of(w[j]));
        *(uint4*)(shared + at) = mine[i];
      }
    }
  }
  __syncthreads();
}

// BATCH chunks travel together, STAGES batches are on their way or being multiplied; each lane copies and reads its own
// bytes (the scales its warp's), so nobody waits for another warp. UNITS: changes of scale possible within a chunk. EVEN: every warp has
// whole batches.
template <int BITS, bool SYM, int UNITS, int KS, int BATCH, int STAGES, int EPILOGUE, int NORM, bool EVEN>
DEVICE void gemv(const GemvArguments& p) {
  constexpr int SCALE_BYTES = SYM ? 32 : 64, CHUNK_BYTES = BITS * 128, SLOT = BATCH * (CHUNK_BYTES + UNITS * SCALE_BYTES);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int team = warp / KS, teams = warps / KS, part = warp % KS;
  u8* ring = (u8*)shared_words + warp * STAGES * SLOT;            // of this warp
  u16* xs = (u16*)((u8*)shared_words + warps * STAGES * SLOT);    // [chunks * 64]
  float* scratch = (float*)(xs + p.chunks * 64);                  // 36
  float* sums = scratch + 36 + team * 2 * KS * 16;                // [2][KS][16] of this team
  const int per = (p.chunks + KS - 1) / KS, first = min(part * per, p.chunks), end = min(first + per, p.chunks);
  const int stride = gridDim.x * teams;

  int next_tile = blockIdx.x * teams + team, next_chunk = first, next_slot = 0;
  auto fetch = [&]() {  // the next batch into the next slot
    u8* to = ring + next_slot * SLOT;
    if (next_tile < p.tiles) {
      const u8* from = p.weights + ((size_t)next_tile * p.chunks + next_chunk) * CHUNK_BYTES;
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        if (EVEN || next_chunk + i < end) {
          copy_words<BITS>(from + i * CHUNK_BYTES, to + i * CHUNK_BYTES, lane);
          if (lane < UNITS * SCALE_BYTES / 16) {  // 16 bytes a lane
            const int unit = (next_chunk + i) * UNITS + lane / (SCALE_BYTES / 16);
            const u8* scale = (const u8*)p.scales + (next_tile * p.groups + (int)(unit * p.unit_to_group >> 16)) * SCALE_BYTES;
            copy_async<16>(scale + lane % (SCALE_BYTES / 16) * 16, to + BATCH * CHUNK_BYTES + i * UNITS * SCALE_BYTES + lane * 16);
          }
        }
      }
    }
    commit_copies();
    next_slot = next_slot + 1 == STAGES ? 0 : next_slot + 1;
    next_chunk += BATCH;
    if (next_chunk >= end) { next_chunk = first; next_tile += stride; }
  };

#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) fetch();
  let_the_next_kernel_start();
  const Norm<NORM> norm = norm_weight<NORM>(p.norm, p.chunks * 64);
  wait_for_the_kernel_ahead();
  stage<NORM>(p.x, norm, xs, p.chunks * 64, p.k, p.eps, scratch);

  // x as the matrix unit takes it: one column, which the first four lanes hold. The others stay zero and are never written.
  uint4 column[2][2] = {{{0, 0, 0, 0}, {0, 0, 0, 0}}, {{0, 0, 0, 0}, {0, 0, 0, 0}}};
  int slot = 0, adder = 0;
  for (int tile = blockIdx.x * teams + team, parity = 0; tile < p.tiles; tile += stride, parity ^= 1) {
    float row = 0.f, row8 = 0.f;
    // what the sums are added to is on its way while they are made
    const int at = lane % 16, n = tile * 16 + at;
    float before = 0.f;
    int place = 0;
    if (part == adder) {
      if (p.bias) before = to_float(p.bias[n]);
      if (EPILOGUE == RESIDUAL && n < p.n) {
        before += __ldcg(p.residual + n);
        place = p.permutation[n];
      }
    }
    for (int chunk = first; chunk < end; chunk += BATCH) {
      wait_for_copies<STAGES - 2>();
      __syncwarp();  // scales were copied by other lanes
      fetch();
      const u8* words = ring + slot * SLOT;
      const u8* scales = words + BATCH * CHUNK_BYTES;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        if (EVEN || chunk + i < end) {
          uint4 (&b)[2] = column[i % 2];
          if (lane < 4) {
            const uint4* from = (const uint4*)(xs + (chunk + i) * 64 + lane * 16);
            b[0] = from[0]; b[1] = from[1];
          }
          const u32 *bs = &b[0].x, *bt = &b[1].x;
          const Words<BITS> now = read_words<BITS>(words + i * CHUNK_BYTES, lane);
          Scale<SYM> scale[UNITS];
#pragma unroll
          for (int u = 0; u < UNITS; u++) scale[u] = read_scale<BITS, SYM>(scales + (i * UNITS + u) * SCALE_BYTES, lane);
          float c[4];
#pragma unroll
          for (int s = 0; s < 4; s++) {
            const Scale<SYM>& own = scale[s * UNITS / 4];
            if (s * UNITS % 4 == 0) c[0] = c[1] = c[2] = c[3] = 0.f;
            u32 a[4];
            fragment<BITS>(now, s, twice_low(own.z), twice_high(own.z), a);
            mma(c, a, s < 2 ? bs[2 * s] : bt[2 * s - 4], s < 2 ? bs[2 * s + 1] : bt[2 * s - 3]);
            if ((s + 1) * UNITS % 4 == 0) {
              row += low_of(own.s) * c[0];
              row8 += high_of(own.s) * c[2];
            }
          }
        }
      }
    }
    float* mine = sums + parity * KS * 16;
    if (lane % 4 == 0) {
      mine[part * 16 + lane / 4] = row;
      mine[part * 16 + lane / 4 + 8] = row8;
    }
    if (KS == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "r"(KS * 32) : "memory");
    if (part == adder) {  // the warps take turns at this
      float y = before;
#pragma unroll
      for (int i = 0; i < KS; i++) y += mine[i * 16 + at];
      if constexpr (EPILOGUE == SILU) {
        const float up = __shfl_sync(FULL, y, at | 8);
        if (lane < 8) ((u16*)p.out)[tile * 8 + lane] = to_half(y / (1.f + __expf(-y)) * up);
      } else if (lane < 16 && n < p.n) {
        if constexpr (EPILOGUE == PLAIN) ((u16*)p.out)[n] = to_half(y);
        if constexpr (EPILOGUE == FLOAT) ((float*)p.out)[n] = y;
        if constexpr (EPILOGUE == RESIDUAL) {
          p.residual[n] = y;
          ((u16*)p.out)[place] = to_half(y);
        }
      }
    }
    adder = adder + 1 == KS ? 0 : adder + 1;
  }
}
