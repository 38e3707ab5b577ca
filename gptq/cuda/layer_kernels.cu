// Parts of transformers' own forward as single kernels: norms, rotation of heads, keeping keys and values, the choice of a
// token's experts and their sum, and attention of one token over a cache at a fixed address. Numbers are fp16 or bf16; the arithmetic is fp32.

struct Half {
  static METHOD float wide(u16 v) { return to_float(v); }
  static METHOD u16 narrow(float v) { return to_half(v); }
};
struct Bfloat {
  static METHOD float wide(u16 v) { return from_bfloat(v); }
  static METHOD u16 narrow(float v) { return to_bfloat(v); }
};

// RMSNorm or LayerNorm of rows of `k` numbers, a multiple of 8 and at most 32 for each thread, to which another row may be added
// first. A block takes a row.
template <class T> DEVICE void row_norm(const RowNormArguments& p) {
  float* scratch = (float*)shared_words;  // 33
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const size_t row = (size_t)blockIdx.x * p.k;
  float mine[4][8];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 8;
    if (at >= p.k) continue;
    uint4 v = __ldcg((const uint4*)(p.x + row + at));
    u16* m = (u16*)&v;
    if (p.addend) {
      const uint4 more = __ldcg((const uint4*)(p.addend + row + at));
      const u16* a = (const u16*)&more;
#pragma unroll
      for (int j = 0; j < 8; j++) m[j] = T::narrow(T::wide(m[j]) + T::wide(a[j]));
      *(uint4*)(p.sum + row + at) = v;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      mine[i][j] = T::wide(m[j]);
      sum += p.centred ? mine[i][j] : mine[i][j] * mine[i][j];
    }
  }
  if (!p.weight) return;
  sum = block_sum(sum, scratch);
  float mean = 0.f;
  if (p.centred) {
    mean = sum / p.k;
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if ((i * blockDim.x + threadIdx.x) * 8 >= p.k) continue;
#pragma unroll
      for (int j = 0; j < 8; j++) sum += (mine[i][j] - mean) * (mine[i][j] - mean);
    }
    sum = block_sum(sum, scratch);
  }
  const float scale = rsqrtf(sum / p.k + p.eps);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 8;
    if (at >= p.k) continue;
    const uint4 weight = __ldg((const uint4*)(p.weight + at));
    const uint4 bias = p.bias ? __ldg((const uint4*)(p.bias + at)) : make_uint4(0, 0, 0, 0);
    const u16 *w = (const u16*)&weight, *b = (const u16*)&bias;
    uint4 v;
    u16* m = (u16*)&v;
#pragma unroll
    for (int j = 0; j < 8; j++) m[j] = T::narrow((mine[i][j] - mean) * scale * (T::wide(w[j]) + p.offset) + T::wide(b[j]));
    *(uint4*)(p.out + row + at) = v;
  }
}

// The heads of one token's query and key, normed if they have a norm, and turned by their angles. A block takes a head.
template <class T> DEVICE void rotate(const RotateArguments& p) {
  float* row = (float*)shared_words;  // [d]
  float* scratch = row + p.d;         // 33
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int head = blockIdx.x, half = p.rotated / 2;
  const bool query = head < p.heads;
  const u16* from = query ? p.q + (size_t)head * p.q_stride : p.k + (size_t)(head - p.heads) * p.k_stride;
  const u16* norm = query ? p.q_norm : p.k_norm;
  u16* to = query ? p.q_out + (size_t)head * p.d : p.k_out + (size_t)(head - p.heads) * p.d;
  float sum = 0.f;
  for (int i = threadIdx.x; i < p.d; i += blockDim.x) {
    row[i] = T::wide(__ldcg(from + i));
    sum += row[i] * row[i];
  }
  if (norm) {
    const float scale = rsqrtf(block_sum(sum, scratch) / p.d + p.eps);
    for (int i = threadIdx.x; i < p.d; i += blockDim.x)
      row[i] = T::wide(T::narrow(row[i] * scale * (T::wide(__ldg(norm + i)) + p.offset)));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    const bool pairs = p.kind != 0;  // neighbours turn together
    const int a = pairs ? 2 * i : i, b = pairs ? 2 * i + 1 : i + half;
    const int angle = p.kind == 2 ? 2 * i : i, other = p.kind == 0 ? (i + half) % p.angles : p.kind == 2 ? 2 * i + 1 : i;
    const float first = row[a] * T::wide(__ldcg(p.cosines + angle)) - row[b] * T::wide(__ldcg(p.sines + angle));
    const float second = row[b] * T::wide(__ldcg(p.cosines + other)) + row[a] * T::wide(__ldcg(p.sines + other));
    const bool apart = p.kind == 3;  // neighbours turn together and then lie apart
    to[apart ? i : a] = T::narrow(first);
    to[apart ? i + half : b] = T::narrow(second);
  }
  for (int i = p.rotated + threadIdx.x; i < p.d; i += blockDim.x) to[i] = T::narrow(row[i]);
}

// The new token's keys and values into the cache. A block takes a head.
template <class T> DEVICE void keep(const KeepArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int head = blockIdx.x;
  const u64 count = __ldcg(p.count), at = (u64)head * p.capacity + (count < (u64)p.capacity ? count : p.capacity - 1);
  for (int i = threadIdx.x; i < p.d; i += blockDim.x) p.keys[at * p.d + i] = __ldcg(p.k + (size_t)head * p.k_stride + i);
  for (int i = threadIdx.x; i < p.dv; i += blockDim.x) p.values[at * p.dv + i] = __ldcg(p.v + (size_t)head * p.v_stride + i);
}

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

// The experts of one token: logits, softmax, the highest `choices` of them. A warp computes the logit of an expert; the last block
// to finish chooses. At most 32 choices.
template <class T> DEVICE void route(const RouteArguments& p) {
  float* logits = (float*)shared_words;  // [experts]
  float* scratch = logits + p.experts;   // 33
  u32* flag = (u32*)(scratch + 33);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, expert = blockIdx.x * (blockDim.x / 32) + warp;
  const u16* row = p.weights + (size_t)min(expert, p.experts - 1) * p.k;
  allow_next_kernel_to_start();
  for (int at = lane * 64; at < p.k; at += 2048) prefetch_to_l2(row + at);
  wait_for_previous_kernel();
  float sum = 0.f;
#pragma unroll 4
  for (int at = lane * 8; at < p.k; at += 256) {
    const uint4 a = stream4(row + at), b = __ldcg((const uint4*)(p.x + at));
    const u16 *w = (const u16*)&a, *x = (const u16*)&b;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += T::wide(w[j]) * T::wide(x[j]);
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

  float high = -INFINITY;
  for (int i = threadIdx.x; i < p.experts; i += blockDim.x) {
    logits[i] = __ldcg(p.logits + i);
    high = fmaxf(high, logits[i]);
  }
#pragma unroll
  for (int at = 16; at; at >>= 1) high = fmaxf(high, __shfl_xor_sync(FULL, high, at));
  if (lane == 0) scratch[warp] = high;
  __syncthreads();
  for (int i = 0; i < blockDim.x / 32; i++) high = fmaxf(high, scratch[i]);
  __syncthreads();
  float total = 0.f;
  for (int i = threadIdx.x; i < p.experts; i += blockDim.x) total += __expf(logits[i] - high);
  total = block_sum(total, scratch);
  for (int i = threadIdx.x; i < p.experts; i += blockDim.x) {
    const float v = p.probabilities ? __expf(logits[i] - high) / total : logits[i];
    if (p.wide) ((float*)p.all)[i] = v;
    else ((u16*)p.all)[i] = T::narrow(v);
  }
  __syncthreads();
  if (warp) return;
  float mine = 0.f;  // the score of choice `lane`
  for (int c = 0; c < p.choices; c++) {
    float best = -INFINITY;
    int at = p.experts;
    for (int i = lane; i < p.experts; i += 32)
      if (logits[i] > best) { best = logits[i]; at = i; }
#pragma unroll
    for (int step = 16; step; step >>= 1) {
      const float other = __shfl_xor_sync(FULL, best, step);
      const int there = __shfl_xor_sync(FULL, at, step);
      if (other > best || (other == best && there < at)) { best = other; at = there; }
    }
    if (lane == c) {
      mine = __expf(best - high) / total;
      p.chosen[c] = at;
    }
    if (lane == 0 && at < p.experts) logits[at] = -INFINITY;
    __syncwarp();
  }
  const float all = warp_sum(mine);
  if (lane < p.choices) {
    const float score = (p.shared ? mine / all : mine) * p.scale;
    if (p.wide_scores) ((float*)p.scores)[lane] = score;
    else ((u16*)p.scores)[lane] = T::narrow(score);
  }
}
