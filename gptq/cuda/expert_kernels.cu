// Of a mixture: the choice of a token's experts, the gate of one family, and the sum of what they give.

// What the chosen experts of each token give, times their weights.
template <class T> DEVICE void combine(const CombineArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int token = blockIdx.y;
  const float* y = p.y + (size_t)token * p.choices * p.n;
  for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < p.n; at += gridDim.x * blockDim.x) {
    float sum = 0.f;
#pragma unroll 4
    for (int i = 0; i < p.choices; i++) {
      const int w = token * p.choices + i;
      const float bias = p.bias ? __ldg(p.bias + min(__ldcg(p.chosen + w), (u64)p.experts - 1) * p.n + at) : 0.f;
      sum += (__ldcg(y + (size_t)i * p.n + at) + bias) * (p.wide ? __ldcg((const float*)p.weights + w) : T::wide(__ldcg((const u16*)p.weights + w)));
    }
    p.out[(size_t)token * p.n + at] = T::narrow(sum);
  }
}

// The gate of GPT-OSS: ups are clamped, gates from above only; (up + 1) * gate * sigmoid(alpha * gate). The numbers are fp16.
template <class T> DEVICE void clamped_gate(const ClampedGateArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const size_t choice = blockIdx.y, expert = min(__ldcg(p.chosen + choice), (u64)p.experts - 1);
  for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < p.n; at += gridDim.x * blockDim.x) {
    const u32 both = __ldcg((const u32*)p.y + choice * p.n + at);
    float gate = to_float((u16)both), up = to_float((u16)(both >> 16));
    if (p.bias) {
      const float2 bias = __ldg((const float2*)p.bias + expert * p.n + at);
      gate += bias.x;
      up += bias.y;
    }
    gate = fminf(gate, p.limit);
    up = fminf(fmaxf(up, -p.limit), p.limit);
    p.out[choice * p.n + at] = to_half((up + 1.f) * gate / (1.f + __expf(-p.alpha * gate)));
  }
}

// A number whose bits are ordered as floats are; never 0 but for NaN.
DEVICE u32 ordered_bits(float v) {
  const u32 bits = __float_as_int(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE u32 warp_max(u32 v) {
#if __CUDA_ARCH__ >= 800
  u32 r; asm("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v)); return r;
#else
#pragma unroll
  for (int at = 16; at; at >>= 1) v = max(v, __shfl_xor_sync(FULL, v, at));
  return v;
#endif
}

// The experts of one token: logits, softmax, the highest `choices` of them. A warp computes the logit of an expert; the last block
// to finish chooses. At most 32 choices. With NORMED the token is normed first, by every block. WIDE: the weights are fp32.
template <class T, bool NORMED, bool WIDE> DEVICE void choose_experts(const RouteArguments& p) {
  float* logits = (float*)shared_words;  // [experts]
  float* scratch = logits + p.experts;   // 33
  u32* flag = (u32*)(scratch + 33);
  u16* normed = (u16*)(((u64)(flag + 1) + 15) / 16 * 16);  // [k], NORMED only
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, expert = blockIdx.x * (blockDim.x / 32) + warp;
  constexpr int BYTES = WIDE ? 4 : 2;  // of a weight
  const u8* row = (const u8*)p.weights + (size_t)min(expert, p.experts - 1) * p.k * BYTES;
  allow_next_kernel_to_start();
  for (int at = lane * 128; at < p.k * BYTES; at += 4096) prefetch_to_l2(row + at);
  if constexpr (NORMED) {
    RowNormArguments n = {};
    n.x = p.x; n.addend = p.addend; n.sum = p.sum; n.weight = p.norm; n.bias = p.norm_bias; n.k = p.k;
    n.centred = p.centred; n.eps = p.eps; n.offset = p.offset;
    uint4 held[ROUTE_RUNS];
    norm_row<T, ROUTE_RUNS, ROW>(n, 0, blockIdx.x == 0, scratch, held);
    write_runs<ROUTE_RUNS>(normed, p.k, held);
    if (blockIdx.x == 0) write_runs<ROUTE_RUNS>(p.normed, p.k, held);
    __syncthreads();
  } else wait_for_previous_kernel();
  float sum = 0.f;
#pragma unroll 4
  for (int at = lane * 8; at < p.k; at += 256) {
    const uint4 a = stream4(row + at * BYTES), b = NORMED ? *(const uint4*)(normed + at) : __ldcg((const uint4*)(p.x + at));
    const u16 *w = (const u16*)&a, *x = (const u16*)&b;
    if constexpr (WIDE) {
      const uint4 more = stream4(row + at * BYTES + 16);
      const float *low = (const float*)&a, *high = (const float*)&more;
#pragma unroll
      for (int j = 0; j < 4; j++) sum += low[j] * T::wide(x[j]) + high[j] * T::wide(x[j + 4]);
    } else {
#pragma unroll
      for (int j = 0; j < 8; j++) sum += T::wide(w[j]) * T::wide(x[j]);
    }
  }
  sum = warp_sum(sum);
  if (lane == 0 && expert < p.experts) {
    if (p.bias) sum += T::wide(p.bias[expert]);
    p.logits[expert] = p.wide ? sum : T::wide(T::narrow(sum));
  }
  __syncthreads();
  if (threadIdx.x == 0) *flag = count_arrival(p.done);
  __syncthreads();
  if (*flag != gridDim.x - 1) return;
  if (threadIdx.x == 0) *p.done = 0;

  if (warp) return;  // what is left is little, and a barrier costs more than the other warps would save
  float high = -INFINITY;
#pragma unroll 4
  for (int i = lane; i < p.experts; i += 32) {
    logits[i] = __ldcg(p.logits + i);
    high = fmaxf(high, logits[i]);
  }
#pragma unroll
  for (int at = 16; at; at >>= 1) high = fmaxf(high, __shfl_xor_sync(FULL, high, at));
  float total = 0.f;
#pragma unroll 4
  for (int i = lane; i < p.experts; i += 32) total += __expf(logits[i] - high);
  total = warp_sum(total);
  for (int i = lane; i < p.experts; i += 32) {
    const float v = p.probabilities ? __expf(logits[i] - high) / total : logits[i];
    if (p.wide) ((float*)p.all)[i] = v;
    else ((u16*)p.all)[i] = T::narrow(v);
  }
  __syncwarp();
  // A lane knows the highest of every 32nd logit; only the lane whose logit was chosen looks for its next one.
  float mine = 0.f;  // the score of choice `lane`
  u32 best = 0, at = 0;
  auto look = [&]() {
    best = 0;
    for (int i = lane; i < p.experts; i += 32) {
      const u32 own = ordered_bits(logits[i]);
      if (own > best) { best = own; at = i; }
    }
  };
  look();
  for (int c = 0; c < p.choices; c++) {
    const u32 top = warp_max(best), found = ~warp_max(best == top ? ~at : 0);  // of equal logits the first
    const u32 expert = min(found, (u32)p.experts - 1);
    if (lane == c) {
      mine = __expf(logits[expert] - high) / total;
      p.chosen[c] = expert;
    }
    __syncwarp();
    if (best == top && at == found) {
      logits[at] = -INFINITY;
      look();
    }
    __syncwarp();
  }
  const float all = warp_sum(mine);
  if (lane < p.choices) {
    const float score = (p.shared ? mine / all : mine) * p.scale;
    if (p.wide_scores) ((float*)p.scores)[lane] = score;
    else ((u16*)p.scores)[lane] = T::narrow(score);
  }
}

template <class T> DEVICE void route(const RouteArguments& p) { choose_experts<T, false, false>(p); }
template <class T> DEVICE void route_normed(const RouteArguments& p) { choose_experts<T, true, false>(p); }
template <class T> DEVICE void route_wide(const RouteArguments& p) { choose_experts<T, false, true>(p); }
