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
  float* row = (float*)shared_words;
  float* scratch = row + p.k;  // 33
  allow_next_kernel_to_start();
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
#pragma unroll 4
  for (int at = threadIdx.x * 2; at < p.padded; at += blockDim.x * 2) {
    const int2 k = *(const int2*)(p.order + at);
    const u32 w = *(const u32*)(p.norm + at);
    *(u32*)(to + at) = to_half2(k.x < 0 ? 0.f : row[k.x] * scale * low_of(w), k.y < 0 ? 0.f : row[k.y] * scale * high_of(w));
  }
}

// SiLU(gate) * up of many rows. Blocks share a row.
extern "C" __global__ void silu_rows(SiluArguments p) {
  const u16* from = p.gate_up + (size_t)blockIdx.y * (p.inner * 2);
  u16* to = p.out + (size_t)blockIdx.y * p.padded;
  for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < p.padded; at += gridDim.x * blockDim.x) {
    float y = 0.f;
    if (at < p.inner) {
      const float gate = to_float(from[at / 8 * 16 + at % 8]);
      y = gate / (1.f + __expf(-gate)) * to_float(from[at / 8 * 16 + at % 8 + 8]);
    }
    to[at] = to_half(y);
  }
}
