// What is not a packed product: the embedding, norms, activations, and the output head with its dense fp16 weights.

// y = norm(x) W^T, one row. A warp takes two outputs at a time; the sums are fp32. The block stages the whole input, so it
// must have enough threads: NORM_RUNS * 8 * threads >= k. `k` is a multiple of 8.
extern "C" __global__ void __launch_bounds__(1024, 1) head(HeadArguments p) {
  u16* xs = (u16*)shared_words;
  float* scratch = (float*)(xs + (p.k + 7) / 8 * 8);
  allow_next_kernel_to_start();
  const NormWeight<NORM_RUNS> norm = load_norm_weight<NORM_RUNS>(p.norm, p.k);
  wait_for_previous_kernel();
  stage_input<NORM_RUNS>(p.x, norm, xs, p.k, p.k, p.eps, scratch);
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int n = (blockIdx.x * warps + threadIdx.x / 32) * 2; n < p.n; n += gridDim.x * warps * 2) {
    const bool two = n + 1 < p.n;
    const u16* w0 = p.weights + (size_t)n * p.k;
    const u16* w1 = two ? w0 + p.k : w0;
    float y0 = 0.f, y1 = 0.f;
#pragma unroll 4
    for (int at = lane * 8; at < p.k; at += 256) {
      uint4 a = stream4(w0 + at), b = stream4(w1 + at), v = *(const uint4*)(xs + at);
      const u32 *pa = &a.x, *pb = &b.x, *pv = &v.x;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float low = low_of(pv[j]), high = high_of(pv[j]);
        y0 += low_of(pa[j]) * low + high_of(pa[j]) * high;
        y1 += low_of(pb[j]) * low + high_of(pb[j]) * high;
      }
    }
    y0 = warp_sum(y0);
    y1 = warp_sum(y1);
    if (lane == 0) p.out[n] = y0;
    if (lane == 1 && two) p.out[n + 1] = y1;
  }
}

// The same of up to ROWS rows, the columns of the matrix unit (octet.cu). A warp takes 16 outputs at a time. A lane reads 8
// inputs in a run, so steps take the inputs in another order than their own: x and weights in the same one. `k` is a multiple of 32.
template <int ROWS, int NORM> DEVICE void head_of_rows(const HeadArguments& p) {
  constexpr int AHEAD = 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4, pitch = p.k + 32;
  const int tiles = (p.n + TILE - 1) / TILE, stride = blockDim.x / 32 * gridDim.x, first_tile = warp * gridDim.x + blockIdx.x;
  u16* xs = (u16*)shared_words;              // [ROWS][pitch]
  float* scratch = (float*)(xs + ROWS * pitch);  // [32][ROWS], and the rows' factors
  for (int at = lane; at < TILE * 8; at += 32) {
    const int n = first_tile * TILE + at / 8, k = at % 8 * 64;
    if (n < p.n && k < p.k) prefetch_to_l2(p.weights + (size_t)n * p.k + k);
  }
  allow_next_kernel_to_start();
  const NormWeight<NORM> norm = load_norm_weight<NORM>(p.norm, p.k);
  wait_for_previous_kernel();
  norm_rows_of_input<NORM, ROWS, 16>(p.x, norm, xs, pitch, p.k, p.rows, p.k, p.eps, scratch, [] {});
  __syncthreads();
  const u16* column = xs + r % ROWS * pitch + c * 8;
  const float factors[2] = {scratch[32 * ROWS + c * 2 % ROWS], scratch[32 * ROWS + (c * 2 + 1) % ROWS]};
  for (int tile = first_tile; tile < tiles; tile += stride) {
    const int n = tile * TILE + r;
    const u16* low = p.weights + (size_t)min(n, p.n - 1) * p.k + c * 8;
    const u16* high = p.weights + (size_t)min(n + 8, p.n - 1) * p.k + c * 8;
    uint4 a[AHEAD][2];
    auto load = [&](int i, int at) {
      if (at < p.k) { a[i][0] = stream4(low + at); a[i][1] = stream4(high + at); }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) load(i, i * 32);
    float y[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int at = 0; at < p.k; at += AHEAD * 32) {
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        if (at + i * 32 < p.k) {
          const uint4 b = *(const uint4*)(column + at + i * 32);
          const u32 even[4] = {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y}, odd[4] = {a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w};
          mma(y, even, b.x, b.y);
          mma(y, odd, b.z, b.w);
        }
        load(i, at + (AHEAD + i) * 32);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int row = c * 2 + e % 2, output = n + e / 2 * 8;
      if (row < p.rows && output < p.n) p.out[(size_t)row * p.n + output] = y[e] * factors[e % 2];
    }
  }
}
extern "C" __global__ void __launch_bounds__(512) head_2_4(HeadArguments p) { head_of_rows<2, 4>(p); }
extern "C" __global__ void __launch_bounds__(512) head_4_2(HeadArguments p) { head_of_rows<4, 2>(p); }
extern "C" __global__ void __launch_bounds__(512) head_8_1(HeadArguments p) { head_of_rows<8, 1>(p); }
extern "C" __global__ void __launch_bounds__(512) head_8_2(HeadArguments p) { head_of_rows<8, 2>(p); }

// The embedding of each row's id, as the residual and as the first layer's input. A block for 256 numbers of a row.
extern "C" __global__ void embed(EmbedArguments p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int row = blockIdx.y;
  const u16* from = p.table + (size_t)p.ids[row] * p.k;
  for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < p.k; at += gridDim.x * blockDim.x) {
    p.residual[(size_t)row * p.k + at] = to_float(from[at]);
    p.out[(size_t)row * p.padded + p.permutation[at]] = from[at];
  }
}

// RMSNorm of many rows, into the order that the next weight is stored in. A block takes a row and keeps it in shared memory.
// `k` is a multiple of 4, `padded` of 2.
extern "C" __global__ void norm_rows(NormArguments p) {
  constexpr int EARLY = 4;  // pairs of a thread whose places and weights are loaded before the previous kernel has ended
  float* row = (float*)shared_words;
  float* scratch = row + p.k;  // 33
  allow_next_kernel_to_start();
  int2 places[EARLY];
  u32 weights[EARLY];
#pragma unroll
  for (int i = 0; i < EARLY; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 2;
    if (at < p.padded) { places[i] = __ldg((const int2*)(p.order + at)); weights[i] = __ldg((const u32*)(p.norm + at)); }
  }
  wait_for_previous_kernel();
  float* from = p.residual + (size_t)blockIdx.x * p.k;
  const u16* addend = p.addend ? p.addend + (size_t)blockIdx.x * p.k : nullptr;
  float sum = 0.f;
#pragma unroll 4
  for (int at = threadIdx.x * 4; at < p.k; at += blockDim.x * 4) {
    float4 v = *(const float4*)(from + at);
    if (addend) {
      const uint2 more = *(const uint2*)(addend + at);
      v.x += low_of(more.x); v.y += high_of(more.x); v.z += low_of(more.y); v.w += high_of(more.y);
      *(float4*)(from + at) = v;
    }
    *(float4*)(row + at) = v;
    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  const float scale = rsqrtf(block_sum(sum, scratch) / p.k + p.eps);
  u16* to = p.out + (size_t)blockIdx.x * p.padded;
  auto write = [&](int at, int2 k, u32 w) {
    *(u32*)(to + at) = to_half2(k.x < 0 ? 0.f : row[k.x] * scale * low_of(w), k.y < 0 ? 0.f : row[k.y] * scale * high_of(w));
  };
#pragma unroll
  for (int i = 0; i < EARLY; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 2;
    if (at < p.padded) write(at, places[i], weights[i]);
  }
#pragma unroll 2
  for (int at = (EARLY * blockDim.x + threadIdx.x) * 2; at < p.padded; at += blockDim.x * 2)
    write(at, __ldg((const int2*)(p.order + at)), __ldg((const u32*)(p.norm + at)));
}

// The same in the model's own order: a thread keeps NATURAL_RUNS runs of 4 numbers. `k` is a multiple of 4.
extern "C" __global__ void __launch_bounds__(1024) norm_rows_natural(NormArguments p) {
  float* scratch = (float*)shared_words;  // 33
  allow_next_kernel_to_start();
  uint2 weights[NATURAL_RUNS], more[NATURAL_RUNS];
  float4 v[NATURAL_RUNS];
#pragma unroll
  for (int i = 0; i < NATURAL_RUNS; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 4;
    weights[i] = at < p.k ? __ldg((const uint2*)(p.norm + at)) : make_uint2(0, 0);
  }
  wait_for_previous_kernel();
  float* from = p.residual + (size_t)blockIdx.x * p.k;
  const u16* addend = p.addend ? p.addend + (size_t)blockIdx.x * p.k : nullptr;
#pragma unroll
  for (int i = 0; i < NATURAL_RUNS; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 4;
    v[i] = at < p.k ? *(const float4*)(from + at) : make_float4(0.f, 0.f, 0.f, 0.f);
    more[i] = addend && at < p.k ? *(const uint2*)(addend + at) : make_uint2(0, 0);
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < NATURAL_RUNS; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 4;
    if (addend) {
      v[i].x += low_of(more[i].x); v[i].y += high_of(more[i].x); v[i].z += low_of(more[i].y); v[i].w += high_of(more[i].y);
      if (at < p.k) *(float4*)(from + at) = v[i];
    }
    sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
  }
  const float scale = rsqrtf(block_sum(sum, scratch) / p.k + p.eps);
  u16* to = p.out + (size_t)blockIdx.x * p.k;
#pragma unroll
  for (int i = 0; i < NATURAL_RUNS; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 4;
    const uint2 w = weights[i];
    if (at < p.k)
      *(uint2*)(to + at) = make_uint2(to_half2(v[i].x * scale * low_of(w.x), v[i].y * scale * high_of(w.x)),
                                      to_half2(v[i].z * scale * low_of(w.y), v[i].w * scale * high_of(w.y)));
  }
}

// Inputs of many rows in the order that the next weight is stored in. A block keeps `together` rows in shared memory.
// `k` is a multiple of 8, `padded` of 2.
extern "C" __global__ void order_rows(OrderArguments p) {
  u16* rows = (u16*)shared_words;
  const int first = blockIdx.x * p.together, count = min(p.together, p.rows - first);
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  for (int at = threadIdx.x * 8; at < count * p.k; at += blockDim.x * 8) *(uint4*)(rows + at) = *(const uint4*)(p.x + (size_t)first * p.k + at);
  __syncthreads();
  for (int at = threadIdx.x * 2; at < p.padded; at += blockDim.x * 2) {
    const int2 k = *(const int2*)(p.order + at);
    for (int row = 0; row < count; row++) {
      const u16* from = rows + row * p.k;
      *(u32*)(p.out + (size_t)(first + row) * p.padded + at) = pair(k.x < 0 ? 0 : from[k.x], k.y < 0 ? 0 : from[k.y]);
    }
  }
}

// SiLU(gate) * up of many rows, eight outputs a thread. Blocks share a row. `inner` and `padded` are multiples of 8.
extern "C" __global__ void silu_rows(SiluArguments p) {
  const uint4* from = (const uint4*)(p.gate_up + (size_t)blockIdx.y * (p.inner * 2));
  uint4* to = (uint4*)(p.out + (size_t)blockIdx.y * p.padded);
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < p.padded / 8; at += gridDim.x * blockDim.x) {
    uint4 y = make_uint4(0, 0, 0, 0);
    if (at < p.inner / 8) {
      const uint4 gates = from[at * 2], ups = from[at * 2 + 1];
      const u32 *gate = &gates.x, *up = &ups.x;
      u32* out = &y.x;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float low = low_of(gate[i]), high = high_of(gate[i]);
        out[i] = to_half2(low / (1.f + __expf(-low)) * low_of(up[i]), high / (1.f + __expf(-high)) * high_of(up[i]));
      }
    }
    to[at] = y;
  }
}
