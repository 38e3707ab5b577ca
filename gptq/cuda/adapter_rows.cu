// LoRA adapters beside packed products, y += s B (A x): each row has its own adapter or none. What is computed for a row depends
// on its adapter alone, so it is the same in a batch and alone.

struct AdapterEntry {  // of a layer's product, see cuda_adapter.py
  u64 a;  // fp16 [rank][padded], fragment order of the product's input
  u64 b;  // fp16 [rank][n], the outputs in the order of the product's rows
  int rank;
  float scale;
};

DEVICE AdapterEntry entry_of(const u64* adapters, int entry) {
  const u64 table = __ldcg(adapters + blockIdx.y);
  AdapterEntry none = {};
  return table ? ((const AdapterEntry*)table)[entry] : none;
}

// t = s A x, of x as it is or after its RMSNorm. A block takes a rank at a time.
extern "C" __global__ void __launch_bounds__(256) adapter_in(AdapterInArguments p) {
  float* scratch = (float*)shared_words;  // 33
  allow_next_kernel_to_start();
  // Adapters are written before the step begins, so they may be read before the previous kernel has ended.
  const AdapterEntry e = entry_of(p.adapters, p.entry);
  const u16* a = (const u16*)e.a + (size_t)blockIdx.x * p.padded;
  if (blockIdx.x < e.rank)
    for (int at = threadIdx.x * 64; at < p.padded; at += 256 * 64) prefetch_to_l2(a + at);
  wait_for_previous_kernel();
  const u16* x = p.x + (size_t)blockIdx.y * p.padded;
  for (int r = blockIdx.x; r < e.rank; r += gridDim.x, a += (size_t)gridDim.x * p.padded) {
    float sum = 0.f, squares = 0.f;
#pragma unroll 4
    for (int at = threadIdx.x * 8; at < p.padded; at += 256 * 8) {
      const uint4 va = stream4(a + at), vx = *(const uint4*)(x + at);
      const u32 *pa = &va.x, *px = &vx.x;
      if (p.norm) {
        const uint4 vn = stream4(p.norm + at);
        const u32* pn = &vn.x;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float low = low_of(px[j]), high = high_of(px[j]);
          sum += low_of(pa[j]) * (low * low_of(pn[j])) + high_of(pa[j]) * (high * high_of(pn[j]));
          squares += low * low + high * high;
        }
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) sum += low_of(pa[j]) * low_of(px[j]) + high_of(pa[j]) * high_of(px[j]);
      }
    }
    sum = block_sum(sum, scratch);
    if (p.norm) sum *= rsqrtf(block_sum(squares, scratch) / p.k + p.eps);
    if (threadIdx.x == 0) p.t[(size_t)blockIdx.y * p.most + r] = sum * e.scale;
  }
}

DEVICE void load_ranks(const float* from, int rank, float* t) {
  for (int r = threadIdx.x; r < rank; r += blockDim.x) t[r] = __ldcg(from + r);
  __syncthreads();
}

// Two neighbouring outputs of B t. `b` is that of the first one; a rank is `n` numbers.
DEVICE float2 two_outputs(const u16* b, const float* t, int rank, int n) {
  float2 y = {0.f, 0.f};
#pragma unroll 8
  for (int r = 0; r < rank; r++) {
    const u32 w = stream1(b + (size_t)r * n);
    y.x += low_of(w) * t[r];
    y.y += high_of(w) * t[r];
  }
  return y;
}

// Adds B t to what a product has left. A thread takes two outputs.
extern "C" __global__ void __launch_bounds__(256) adapter_out(AdapterOutArguments p) {
  float* t = (float*)shared_words;
  allow_next_kernel_to_start();
  const AdapterEntry e = entry_of(p.adapters, p.entry);
  const int n = (blockIdx.x * 256 + threadIdx.x) * 2;
  wait_for_previous_kernel();
  if (e.rank == 0) return;
  load_ranks(p.t + (size_t)blockIdx.y * p.most, e.rank, t);
  if (n >= p.n) return;
  const float2 y = two_outputs((const u16*)e.b + n, t, e.rank, p.n);
  if (p.residual) {
    float2* at = (float2*)(p.residual + (size_t)blockIdx.y * p.n + n);
    const float2 sum = {at->x + y.x, at->y + y.y};
    *at = sum;
    if (p.out) {
      u16* out = p.out + (size_t)blockIdx.y * p.padded;
      out[p.permutation[n]] = to_half(sum.x);
      out[p.permutation[n + 1]] = to_half(sum.y);
    }
  } else {
    u32* at = (u32*)(p.out + (size_t)blockIdx.y * p.n + n);
    *at = to_half2(low_of(*at) + y.x, high_of(*at) + y.y);
  }
}

// SiLU(gate + B t) * (up + B t), also of rows without an adapter. Gates and ups lie eight by eight.
extern "C" __global__ void __launch_bounds__(256) adapter_silu(AdapterSiluArguments p) {
  float* t = (float*)shared_words;
  allow_next_kernel_to_start();
  const AdapterEntry e = entry_of(p.adapters, p.entry);
  const int at = (blockIdx.x * 256 + threadIdx.x) * 2, gate_at = at / 8 * 16 + at % 8;
  wait_for_previous_kernel();
  load_ranks(p.t + (size_t)blockIdx.y * p.most, e.rank, t);
  if (at >= p.padded) return;
  const u16* from = p.gate_up + (size_t)blockIdx.y * p.padded * 2 + gate_at;
  const u32 gates = *(const u32*)from, ups = *(const u32*)(from + 8);
  float2 gate = {low_of(gates), high_of(gates)}, up = {low_of(ups), high_of(ups)};
  if (e.rank) {
    const float2 g = two_outputs((const u16*)e.b + gate_at, t, e.rank, p.padded * 2);
    const float2 u = two_outputs((const u16*)e.b + gate_at + 8, t, e.rank, p.padded * 2);
    gate.x += g.x, gate.y += g.y, up.x += u.x, up.y += u.y;
  }
  *(u32*)(p.out + (size_t)blockIdx.y * p.padded + at) =
      to_half2(gate.x / (1.f + __expf(-gate.x)) * up.x, gate.y / (1.f + __expf(-gate.y)) * up.y);
}
