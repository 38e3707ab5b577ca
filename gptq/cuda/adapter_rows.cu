// LoRA adapters beside packed products, y += s B (A x): each row has its own adapter or none. What is computed for a row depends
// on its adapter alone, so it is the same in a batch and alone.
//
// These kernels are short, so what counts is how often they wait for memory one after the other: what does not depend on the previous
// kernel (the adapter's numbers) is on its way into registers before they wait for it. AdapterEntry is in adapted_gemv.cu.

#define ADAPTER_THREADS 512
#define A_RUNS 4   // runs of 8 numbers of A that a thread has in registers
#define B_RANKS 16  // ranks of B that a thread has in registers

DEVICE AdapterEntry entry_of(const u64* adapters, int entry) {
  const u64 table = __ldcg(adapters + blockIdx.y);
  AdapterEntry none = {};
  return table ? ((const AdapterEntry*)table)[entry] : none;
}

DEVICE void multiply_run(const uint4& va, const uint4& vx, const uint4* vn, float& sum, float& squares) {
  const u32 *pa = &va.x, *px = &vx.x;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float low = low_of(px[j]), high = high_of(px[j]);
    if (vn) {
      squares += low * low + high * high;
      low *= low_of((&vn->x)[j]);
      high *= high_of((&vn->x)[j]);
    }
    sum += low_of(pa[j]) * low + high_of(pa[j]) * high;
  }
}

// t = s A x, of x as it is or after its RMSNorm. A block takes a rank at a time.
template <bool NORM> DEVICE void adapter_in(const AdapterInArguments& p) {
  float* scratch = (float*)shared_words;  // 2 * 16
  allow_next_kernel_to_start();
  // Adapters are written before the step begins, so they may be read before the previous kernel has ended.
  const AdapterEntry e = entry_of(p.adapters, p.entry);
  const u16* a = (const u16*)e.a + (size_t)blockIdx.x * p.padded;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint4 held[A_RUNS], norm[A_RUNS];
  if (blockIdx.x < e.rank) {
#pragma unroll
    for (int run = 0; run < A_RUNS; run++) {
      const int at = (run * ADAPTER_THREADS + threadIdx.x) * 8;
      if (at < p.padded) {
        held[run] = stream4(a + at);
        if (NORM) norm[run] = stream4(p.norm + at);
      }
    }
  }
  wait_for_previous_kernel();
  const u16* x = p.x + (size_t)blockIdx.y * p.padded;
  for (int r = blockIdx.x; r < e.rank; r += gridDim.x, a += (size_t)gridDim.x * p.padded) {
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int run = 0; run < A_RUNS; run++) {
      const int at = (run * ADAPTER_THREADS + threadIdx.x) * 8;
      if (at < p.padded) {
        const uint4 va = r == blockIdx.x ? held[run] : stream4(a + at);
        multiply_run(va, *(const uint4*)(x + at), NORM ? &norm[run] : nullptr, sum, squares);
      }
    }
    for (int at = (A_RUNS * ADAPTER_THREADS + threadIdx.x) * 8; at < p.padded; at += ADAPTER_THREADS * 8) {
      uint4 vn;
      if (NORM) vn = stream4(p.norm + at);
      multiply_run(stream4(a + at), *(const uint4*)(x + at), NORM ? &vn : nullptr, sum, squares);
    }
    sum = warp_sum(sum);
    if (NORM) squares = warp_sum(squares);
    if (lane == 0) scratch[warp] = sum, scratch[16 + warp] = squares;
    __syncthreads();
    if (warp == 0) {
      sum = warp_sum(lane < 16 ? scratch[lane] : 0.f);
      if (NORM) sum *= rsqrtf(warp_sum(lane < 16 ? scratch[16 + lane] : 0.f) / p.k + p.eps);
      if (lane == 0) p.t[(size_t)blockIdx.y * p.most + r] = sum * e.scale;
    }
    __syncthreads();
  }
}
extern "C" __global__ void __launch_bounds__(512) adapter_in_plain(AdapterInArguments p) { adapter_in<false>(p); }
extern "C" __global__ void __launch_bounds__(512) adapter_in_norm(AdapterInArguments p) { adapter_in<true>(p); }

// B of two neighbouring outputs, the first ranks of them. `b` is that of the first output.
DEVICE void load_outputs(const u16* b, int most, uint4 (&held)[2][B_RANKS / 8]) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int r = 0; r < B_RANKS / 8; r++) held[i][r] = r * 8 < most ? __ldg((const uint4*)(b + (size_t)i * most) + r) : make_uint4(0, 0, 0, 0);
}

DEVICE float eight_ranks(const uint4& b, const float* t) {
  float y = 0.f;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const u32 w = (&b.x)[j];
    y += low_of(w) * t[2 * j] + high_of(w) * t[2 * j + 1];
  }
  return y;
}

// Those outputs of B t. `t` is that of the first rank of their layer.
DEVICE float2 two_outputs(const u16* b, const uint4 (&held)[2][B_RANKS / 8], const float* t, int most) {
  float y[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    y[i] = 0.f;
#pragma unroll
    for (int r = 0; r < B_RANKS / 8; r++)
      if (r * 8 < most) y[i] += eight_ranks(held[i][r], t + r * 8);
#pragma unroll 2
    for (int r = B_RANKS; r < most; r += 8) y[i] += eight_ranks(__ldg((const uint4*)(b + (size_t)i * most + r)), t + r);
  }
  return make_float2(y[0], y[1]);
}

DEVICE void load_ranks(const float* from, const AdapterEntry& e, float* t) {
  // a layer of fewer ranks than the largest reads zeros of B with what follows: numbers, at least
  for (int r = threadIdx.x; r < e.rank + e.most; r += blockDim.x) t[r] = r < e.rank ? __ldcg(from + r) : 0.f;
  __syncthreads();
}

// Adds B t to what a product has left. A thread takes two outputs.
extern "C" __global__ void __launch_bounds__(256) adapter_out(AdapterOutArguments p) {
  float* t = (float*)shared_words;
  allow_next_kernel_to_start();
  const AdapterEntry e = entry_of(p.adapters, p.entry);
  const int n = (blockIdx.x * 256 + threadIdx.x) * 2, at = n < p.n ? n : 0;
  const u16* b = (const u16*)e.b + (size_t)at * e.most;
  uint4 held[2][B_RANKS / 8];
  int2 next = {0, 0};
  if (e.rank) {
    load_outputs(b, e.most, held);
    if (p.residual && p.out) next = *(const int2*)(p.permutation + at);
  }
  wait_for_previous_kernel();
  if (e.rank == 0) return;
  load_ranks(p.t + (size_t)blockIdx.y * p.most, e, t);
  if (n >= p.n) return;
  const float2 y = two_outputs(b, held, t + e.first[(n >= e.ends[0]) + (n >= e.ends[1])], e.most);
  if (p.residual) {
    float2* to = (float2*)(p.residual + (size_t)blockIdx.y * p.n + n);
    const float2 sum = {to->x + y.x, to->y + y.y};
    *to = sum;
    if (p.out) {
      u16* out = p.out + (size_t)blockIdx.y * p.padded;
      out[next.x] = to_half(sum.x);
      out[next.y] = to_half(sum.y);
    }
  } else {
    u32* to = (u32*)(p.out + (size_t)blockIdx.y * p.n + n);
    *to = to_half2(low_of(*to) + y.x, high_of(*to) + y.y);
  }
}

// SiLU(gate + B t) * (up + B t), also of rows without an adapter. Gates and ups lie eight by eight.
extern "C" __global__ void __launch_bounds__(256) adapter_silu(AdapterSiluArguments p) {
  float* t = (float*)shared_words;
  allow_next_kernel_to_start();
  const AdapterEntry e = entry_of(p.adapters, p.entry);
  const int output = (blockIdx.x * 256 + threadIdx.x) * 2, at = output < p.padded ? output : 0, gate_at = at / 8 * 16 + at % 8;
  const u16 *b = (const u16*)e.b + (size_t)gate_at * e.most, *b_ups = b + 8 * e.most;
  uint4 gates_held[2][B_RANKS / 8], ups_held[2][B_RANKS / 8];
  if (e.rank) {
    load_outputs(b, e.most, gates_held);
    load_outputs(b_ups, e.most, ups_held);
  }
  wait_for_previous_kernel();
  load_ranks(p.t + (size_t)blockIdx.y * p.most, e, t);
  if (output >= p.padded) return;
  const u16* from = p.gate_up + (size_t)blockIdx.y * p.padded * 2 + gate_at;
  const u32 gates = *(const u32*)from, ups = *(const u32*)(from + 8);
  float2 gate = {low_of(gates), high_of(gates)}, up = {low_of(ups), high_of(ups)};
  if (e.rank) {
    const float2 g = two_outputs(b, gates_held, t + e.first[0], e.most);
    const float2 u = two_outputs(b_ups, ups_held, t + e.first[1], e.most);
    gate.x += g.x, gate.y += g.y, up.x += u.x, up.y += u.y;
  }
  *(u32*)(p.out + (size_t)blockIdx.y * p.padded + at) =
      to_half2(gate.x / (1.f + __expf(-gate.x)) * up.x, gate.y / (1.f + __expf(-gate.y)) * up.y);
}
