// The choice of a token's experts. SHOWN: a kernel that does not wait for this one's end reads the logits, see expert_ahead.cu.

// The row that gives logit `row`: of an expert; behind the last one of what opens those that every token takes.
DEVICE const u8* router_row(const RouteArguments& p, int row, int bytes) {
  return row == p.experts && p.open ? (const u8*)p.open : (const u8*)p.weights + (size_t)min(row, p.experts - 1) * p.k * bytes;
}
// Writes it, with its bias and rounded.
template <class T, bool SHOWN> DEVICE void write_row(const RouteArguments& p, int row, float sum) {
  if (row < p.experts) {
    if (p.bias) sum += T::wide(p.bias[row]);
    if constexpr (SHOWN) write_logit(p.shown + row, p.wide ? sum : T::wide(T::narrow(sum)));
    write_logit(p.logits + row, p.wide ? sum : T::wide(T::narrow(sum)));
  } else if (row == p.experts && p.open) write_logit(p.logits + row, T::wide(T::narrow(sum)));
}

// The eight weights of each row that a lane multiplies, which are two steps of the matrix unit.
struct RouterWeights { uint4 run[ROUTE_RUNS][8]; };

DEVICE void load_router(const RouteArguments& p, RouterWeights& w) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u16* row = (const u16*)router_row(p, blockIdx.x * 8 + lane / 4, 2);
#pragma unroll
  for (int i = 0; i < ROUTE_RUNS; i++) {
    if (i * 2048 >= p.k) break;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int at = i * 2048 + warp * 256 + j * 32 + lane % 4 * 8;
      w.run[i][j] = at < p.k ? stream4(row + at) : make_uint4(0, 0, 0, 0);
    }
  }
}

// The eight logits of a block of eight warps, whose token is normed first. A warp takes the numbers that it normed itself.
template <class T, bool SHOWN> DEVICE void normed_logits(const RouteArguments& p, const RouterWeights& w, u16* normed, float* scratch, float* parts, bool real) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  RowNormArguments n = {};
  n.x = p.x; n.addend = p.addend; n.sum = p.sum; n.weight = p.norm; n.bias = p.norm_bias; n.k = p.k;
  n.centred = p.centred; n.eps = p.eps; n.offset = p.offset;
  uint4 held[ROUTE_RUNS];
  norm_row<T, ROUTE_RUNS, ROW>(n, 0, real && blockIdx.x == 0, scratch, held, real);
  write_runs<ROUTE_RUNS>(normed, p.k, held);
  if (real && blockIdx.x == 0) write_runs<ROUTE_RUNS>(p.normed, p.k, held);
  __syncwarp();
  float low[4] = {}, high[4] = {};
#pragma unroll
  for (int i = 0; i < ROUTE_RUNS; i++) {
    if (i * 2048 >= p.k) break;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int at = i * 2048 + warp * 256 + j * 32 + c * 8;
      const uint4 x = at < p.k ? *(const uint4*)(normed + at) : make_uint4(0, 0, 0, 0), own = w.run[i][j];
      const u32 first[4] = {own.x, 0, own.y, 0}, second[4] = {own.z, 0, own.w, 0};
      multiply(T(), low, first, x.x, x.y);
      multiply(T(), high, second, x.z, x.w);
    }
  }
  if (c == 0) parts[warp * 8 + g] = low[0] + high[0];
  __syncthreads();
  if (threadIdx.x < 8) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += parts[i * 8 + threadIdx.x];
    if (real) write_row<T, SHOWN>(p, blockIdx.x * 8 + threadIdx.x, sum);
  }
}

template <class T> DEVICE void write_score(const RouteArguments& p, int choice, float score) {
  if (p.wide_scores) ((float*)p.scores)[choice] = score; else ((u16*)p.scores)[choice] = T::narrow(score);
}
template <class T> DEVICE void put_score(const RouteArguments& p, int choice, float score) { write_score<T>(p, choice, score * p.scale); }

// The scores of experts that every token takes, as far as they open. One thread.
template <class T> DEVICE void open_experts(const RouteArguments& p) {
  const float score = T::wide(T::narrow(1.f / (1.f + __expf(-take_logit(p.logits + p.experts)))));
  for (int i = 0; i < p.opened; i++) write_score<T>(p, p.choices + i, score);
}

// At most RANKED experts, all ranked at once. Not `real`: only its instructions are wanted.
template <class T> DEVICE void choose_by_rank(const RouteArguments& p, float* logits, u32* keys, int* ranks, bool real) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  keys[threadIdx.x] = ranks[threadIdx.x] = 0;
  if (threadIdx.x < p.experts) {
    const float logit = real ? take_logit(p.logits + threadIdx.x) : 0.f;
    logits[threadIdx.x] = logit;
    keys[threadIdx.x] = ordered_bits(logit);
  }
  __syncthreads();
  // as many threads as there are compare each expert with a part of the others
  const int shares = RANKED / p.experts, i = threadIdx.x % p.experts, share = threadIdx.x / p.experts;
  const int each = ((p.experts + shares - 1) / shares + 3) / 4 * 4, first = share * each, end = min(first + each, p.experts);
  if (share < shares) {
    const u32 own = keys[i];
    int above = 0;
#pragma unroll 1
    for (int j = first; j < end; j += 4) {
      const uint4 four = *(const uint4*)(keys + j);
      const u32* key = &four.x;
#pragma unroll
      for (int n = 0; n < 4; n++) above += key[n] >= (j + n < i ? own : own + 1);  // of equal logits the first
    }
    atomicAdd(ranks + i, above);
  }
  float high = -INFINITY, total = 0.f;
  if (warp == 0) {  // what is left is little
#pragma unroll 1
    for (int j = lane; j < p.experts; j += 32) high = fmaxf(high, logits[j]);
#pragma unroll
    for (int at = 16; at; at >>= 1) high = fmaxf(high, __shfl_xor_sync(FULL, high, at));
#pragma unroll 1
    for (int j = lane; j < p.experts; j += 32) total += __expf(logits[j] - high);
    total = warp_sum(total);
  }
  __syncthreads();
  if (warp) return;
  float all = 1.f;
  if (p.shared) {
    all = 0.f;
#pragma unroll 1
    for (int j = lane; j < p.experts; j += 32) all += ranks[j] < p.choices ? __expf(logits[j] - high) / total : 0.f;
    all = warp_sum(all);
  }
#pragma unroll 1
  for (int j = lane; j < p.experts && real; j += 32) {
    const float share_of_all = __expf(logits[j] - high) / total, v = p.probabilities ? share_of_all : logits[j];
    if (ranks[j] < p.choices) {
      p.chosen[ranks[j]] = j;
      put_score<T>(p, ranks[j], share_of_all / all);
    }
    if (p.wide) ((float*)p.all)[j] = v; else ((u16*)p.all)[j] = T::narrow(v);
  }
}

// The highest of up to 32 * ROUTE_HELD logits, which a warp holds in registers: writes who they are, and returns the score of choice
// `lane`. `high` is the highest of all, `total` the sum of their exponentials.
DEVICE float choose_held(const RouteArguments& p, const float* logits, float high, float total) {
  const int lane = threadIdx.x;
  u32 bits[ROUTE_HELD];
#pragma unroll
  for (int j = 0; j < ROUTE_HELD; j++) bits[j] = lane + 32 * j < p.experts ? ordered_bits(logits[lane + 32 * j]) : 0;
  float mine = 0.f;
#pragma unroll 1
  for (int c = 0; c < p.choices; c++) {
    u32 best = 0, at = 0;
#pragma unroll
    for (int j = 0; j < ROUTE_HELD; j++) {
      const bool more = bits[j] > best;
      best = more ? bits[j] : best; at = more ? lane + 32 * j : at;
    }
    const u32 top = warp_max(best), found = ~warp_max(best == top ? ~at : 0);  // of equal logits the first
    if (lane == c) {
      mine = __expf(logit_of(top) - high) / total;
      p.chosen[c] = min(found, (u32)p.experts - 1);
    }
#pragma unroll
    for (int j = 0; j < ROUTE_HELD; j++) bits[j] = found == lane + 32 * j ? 0 : bits[j];
  }
  return mine;
}
// The same of any number, in shared memory.
DEVICE float choose_many(const RouteArguments& p, float* logits, float high, float total) {
  const int lane = threadIdx.x;
  // A lane knows the highest of every 32nd logit; only the lane whose logit was chosen looks for its next one.
  float mine = 0.f;  // the score of choice `lane`
  u32 best = 0, at = 0;
  auto look = [&]() {
    best = 0;
    for (int i = lane; i < p.experts; i += 32) {
      const u32 own = ordered_bits(logits[i]);
      if (own > best) { best = own; at = i; }
    }
  }; look();
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
  return mine;
}

// More than those, one choice after the other by one warp.
template <class T> DEVICE void choose_in_turn(const RouteArguments& p, float* logits) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.experts; i += blockDim.x) logits[i] = take_logit(p.logits + i);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  float high = -INFINITY;
#pragma unroll 1
  for (int i = lane; i < p.experts; i += 32) high = fmaxf(high, logits[i]);
#pragma unroll
  for (int at = 16; at; at >>= 1) high = fmaxf(high, __shfl_xor_sync(FULL, high, at));
  float total = 0.f;
#pragma unroll 1
  for (int i = lane; i < p.experts; i += 32) total += __expf(logits[i] - high);
  total = warp_sum(total);
#pragma unroll 1
  for (int i = lane; i < p.experts; i += 32) {
    const float v = p.probabilities ? __expf(logits[i] - high) / total : logits[i];
    if (p.wide) ((float*)p.all)[i] = v; else ((u16*)p.all)[i] = T::narrow(v);
  }
  __syncwarp();
  const float mine = p.experts <= 32 * ROUTE_HELD ? choose_held(p, logits, high, total) : choose_many(p, logits, high, total);
  const float all = warp_sum(mine);
  if (lane < p.choices) put_score<T>(p, lane, p.shared ? mine / all : mine);
}

// The experts of one token: logits, softmax, the highest `choices` of them. A block of eight warps computes the logits of eight
// experts; the last one waits for all of them, and chooses. At most 32 choices. With NORMED the token is normed first, by every
// block, and all is done twice: first with whatever lies there, so that the instructions are there when the previous kernel has ended.
// WIDE: the weights are fp32.
// Experts that every token takes follow the chosen ones.
template <class T, bool NORMED, bool WIDE, bool SHOWN = false> DEVICE void choose_experts(const RouteArguments& p) {
  float* logits = (float*)shared_words;                                        // [experts]
  float* scratch = logits + p.experts;                                         // 33
  float* parts = scratch + 33;                                                 // [8][8], NORMED only
  u32* keys = (u32*)(((u64)(parts + 64) + 15) / 16 * 16);                      // [RANKED]: ordered_bits, 0 behind the last
  int* ranks = (int*)(keys + RANKED);                                          // [RANKED]
  u16* normed = (u16*)(ranks + RANKED);                                        // [k], NORMED only
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, expert = blockIdx.x * 8 + warp;
  const bool last = blockIdx.x == gridDim.x - 1, ranked = p.experts <= RANKED;
  if constexpr (SHOWN) {  // what the last token's were must be gone when the next kernel starts
    const int row = blockIdx.x * 8 + threadIdx.x;
    if (threadIdx.x < 8 && row < p.experts) ((volatile u32*)p.shown)[row] = NO_LOGIT;
    __threadfence();
    __syncthreads();
  }
  allow_next_kernel_to_start();
  if constexpr (NORMED) {
    RouterWeights w;
    load_router(p, w);
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
      normed_logits<T, SHOWN>(p, w, normed, scratch, parts, turn == 1);
      if (last && ranked) choose_by_rank<T>(p, logits, keys, ranks, turn == 1);
      __syncthreads();
    }
  } else {
    constexpr int BYTES = WIDE ? 4 : 2;  // of a weight
    const u8* row = router_row(p, expert, BYTES);
    for (int at = lane * 128; at < p.k * BYTES; at += 4096) prefetch_to_l2(row + at);
    wait_for_previous_kernel();
    float sum = 0.f;
#pragma unroll 4
    for (int at = lane * 8; at < p.k; at += 256) {
      const uint4 a = stream4(row + at * BYTES), b = __ldcg((const uint4*)(p.x + at));
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
    if (lane == 0) write_row<T, SHOWN>(p, expert, sum);
    if (last && ranked) choose_by_rank<T>(p, logits, keys, ranks, true);
  }
  if (last && !ranked) choose_in_turn<T>(p, logits);
  if (last && p.open && threadIdx.x == blockDim.x - 1) open_experts<T>(p);
}

template <class T> DEVICE void route(const RouteArguments& p) { choose_experts<T, false, false>(p); }
template <class T> DEVICE void route_normed(const RouteArguments& p) { choose_experts<T, true, false>(p); }
template <class T> DEVICE void route_wide(const RouteArguments& p) { choose_experts<T, false, true>(p); }
template <class T> DEVICE void route_shown(const RouteArguments& p) { choose_experts<T, false, false, true>(p); }
template <class T> DEVICE void route_normed_shown(const RouteArguments& p) { choose_experts<T, true, false, true>(p); }
template <class T> DEVICE void route_wide_shown(const RouteArguments& p) { choose_experts<T, false, true, true>(p); }
