// One token of a gated delta rule (linear attention): the convolution with its SiLU, query and key at length 1, decay and beta, the
// state, the gated norm. Numbers are fp16 or bf16, the state and the arithmetic fp32; what transformers rounds is rounded.

// `COUNT` numbers side by side, of an address that a run of that many keeps aligned.
template <int COUNT> DEVICE void load_run(const u16* from, u16 (&to)[COUNT]) {
  if constexpr (COUNT == 4) *(uint2*)to = __ldcg((const uint2*)from);
  else if constexpr (COUNT == 8) *(uint4*)to = __ldcg((const uint4*)from);
  else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i] = __ldcg(from + i);
  }
}
template <int COUNT> DEVICE void store_run(u16* to, const u16 (&from)[COUNT]) {
  if constexpr (COUNT == 4) *(uint2*)to = *(const uint2*)from;
  else if constexpr (COUNT == 8) *(uint4*)to = *(const uint4*)from;
  else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i] = from[i];
  }
}

// What a head gives, times a gate: eight or fewer numbers of a row of DV whose squares sum up to `squares`.
template <class T, int COUNT> DEVICE void gated_run(const DeltaArguments& p, int head, int at, int dv, float squares, const float (&y)[COUNT]) {
  const float scale = rsqrtf(squares / dv + p.eps);
  const u16* z = p.z + (size_t)(head / p.group) * p.z_stride + (size_t)(head % p.group) * dv + at;
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const float gate = T::wide(__ldcg(z + j)), normed = T::wide(T::narrow(y[j] * scale));
    const float open = 1.f / (1.f + __expf(-gate));
    p.out[(size_t)head * dv + at + j] = T::narrow(T::wide(T::narrow(T::wide(__ldg(p.norm + at + j)) * normed)) * (p.sigmoid ? open : gate * open));
  }
}

// A block takes COLUMNS columns of a head's state [DK][DV], which do not depend on the others; the blocks of a head are a cluster if
// TOGETHER, and tell each other the squares of what they give. Else the last block of the heads that share a key norms them. The state,
// its kept inputs and all weights are read before the previous kernel has ended: the step before wrote them.
template <class T, int DK, int DV, int COLUMNS, int WIDTH, bool TOGETHER> DEVICE void delta_rule(const DeltaArguments& p) {
  constexpr int THREADS = DELTA_THREADS, WARPS = THREADS / 32, SPLITS = DV / COLUMNS, QUADS = COLUMNS / 4;
  constexpr int AT_ONCE = THREADS / QUADS, ROWS = (DK + AT_ONCE - 1) / AT_ONCE;  // of the state
  constexpr int CHANNELS = 2 * DK + COLUMNS, TURNS = (CHANNELS + THREADS - 1) / THREADS;
  static_assert(QUADS <= 32 && 32 % QUADS == 0 && SPLITS <= 8 && DK % 2 == 0, "a warp takes whole rows");
  float* inputs = (float*)shared_words;        // [CHANNELS]: query, key, the columns' values
  float* sums = inputs + CHANNELS;             // [WARPS][2][COLUMNS]
  float* squares = sums + WARPS * 2 * COLUMNS;  // [8]
  u32* flag = (u32*)(squares + 8);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = threadIdx.x % QUADS, first = threadIdx.x / QUADS;
  const int head = blockIdx.x / SPLITS, part = blockIdx.x % SPLITS, key_head = head / p.group;
  allow_next_kernel_to_start();
  if constexpr (TOGETHER) arrive_at_cluster();

  float4* state = (float4*)(p.state + (size_t)head * DK * DV + part * COLUMNS + quad * 4);
  float4 held[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = first + i * AT_ONCE;
    held[i] = row < DK ? __ldcg(state + row * (DV / 4)) : make_float4(0.f, 0.f, 0.f, 0.f);
  }
  // of channel t: where it lies in the convolution, and its token
  auto channel = [&](int t) {
    return t < DK ? key_head * DK + t : t < 2 * DK ? (p.key_heads + key_head) * DK + t - DK : 2 * p.key_heads * DK + head * DV + part * COLUMNS + t - 2 * DK;
  };
  alignas(16) u16 kept[TURNS][WIDTH], taps[TURNS][WIDTH];
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int t = threadIdx.x + i * THREADS;
    if (t >= CHANNELS) continue;
    load_run<WIDTH>(p.kept + (size_t)channel(t) * WIDTH, kept[i]);
    load_run<WIDTH>(p.taps + (size_t)channel(t) * WIDTH, taps[i]);
  }
  const float decay_rate = __ldg(p.decay + head), dt_bias = __ldg(p.dt_bias + head);
  wait_for_previous_kernel();

  const size_t member = head % p.group;
  const float beta = T::wide(T::narrow(1.f / (1.f + __expf(-T::wide(__ldcg(p.b + key_head * p.ba_stride + member)))))) * p.beta_scale;
  const float dt = T::wide(__ldcg(p.a + key_head * p.ba_stride + member)) + dt_bias;
  const float decay = __expf(decay_rate * (dt > 20.f ? dt : log1pf(__expf(dt))));
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int t = threadIdx.x + i * THREADS;
    if (t >= CHANNELS) continue;
    const u16* from = t < DK ? p.q + (size_t)key_head * p.qk_stride + t
        : t < 2 * DK ? p.k + (size_t)key_head * p.qk_stride + t - DK : p.v + (size_t)key_head * p.v_stride + member * DV + part * COLUMNS + t - 2 * DK;
    const u16 own = __ldcg(from);
    float sum = p.bias ? T::wide(__ldg(p.bias + channel(t))) : 0.f;
#pragma unroll
    for (int j = 1; j < WIDTH; j++) {
      kept[i][j - 1] = kept[i][j];
      sum += T::wide(kept[i][j]) * T::wide(taps[i][j - 1]);
    }
    kept[i][WIDTH - 1] = own;
    sum = T::wide(T::narrow(sum + T::wide(own) * T::wide(taps[i][WIDTH - 1])));
    inputs[t] = T::wide(T::narrow(sum / (1.f + __expf(-sum))));
    if (t >= 2 * DK) store_run<WIDTH>(p.kept + (size_t)channel(t) * WIDTH, kept[i]);
  }
  __syncthreads();
  // Every block of these heads has the same query and key; the last one that has read what is kept of them writes it.
  u32 before = 0;
  if (TOGETHER && threadIdx.x == 0) asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(p.done + key_head) : "memory");

  float qq = 0.f, kk = 0.f, qk = 0.f;
#pragma unroll
  for (int at = lane; at < DK; at += 32) {
    const float q = inputs[at], k = inputs[DK + at];
    qq += q * q; kk += k * k; qk += q * k;
  }
  qq = warp_sum(qq); kk = warp_sum(kk); qk = warp_sum(qk);
  const float q_scale = rsqrtf(qq + 1e-6f) * rsqrtf((float)DK), k_scale = rsqrtf(kk + 1e-6f);
  float4 met_k = make_float4(0.f, 0.f, 0.f, 0.f), met_q = met_k;  // the state's columns times key and query, before both are scaled
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = first + i * AT_ONCE;
    if (row >= DK) continue;
    const float q = inputs[row], k = inputs[DK + row];
    met_q.x += held[i].x * q; met_q.y += held[i].y * q; met_q.z += held[i].z * q; met_q.w += held[i].w * q;
    met_k.x += held[i].x * k; met_k.y += held[i].y * k; met_k.z += held[i].z * k; met_k.w += held[i].w * k;
  }
#pragma unroll
  for (int at = QUADS; at < 32; at <<= 1) {
    met_q.x += __shfl_xor_sync(FULL, met_q.x, at); met_q.y += __shfl_xor_sync(FULL, met_q.y, at);
    met_q.z += __shfl_xor_sync(FULL, met_q.z, at); met_q.w += __shfl_xor_sync(FULL, met_q.w, at);
    met_k.x += __shfl_xor_sync(FULL, met_k.x, at); met_k.y += __shfl_xor_sync(FULL, met_k.y, at);
    met_k.z += __shfl_xor_sync(FULL, met_k.z, at); met_k.w += __shfl_xor_sync(FULL, met_k.w, at);
  }
  if (lane < QUADS) {
    *(float4*)(sums + (warp * 2 + 0) * COLUMNS + quad * 4) = met_k;
    *(float4*)(sums + (warp * 2 + 1) * COLUMNS + quad * 4) = met_q;
  }
  __syncthreads();
  float delta[4], y[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float of_k = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) of_k += sums[w * 2 * COLUMNS + quad * 4 + j];
    delta[j] = (inputs[2 * DK + quad * 4 + j] - decay * k_scale * of_k) * beta;
  }
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = first + i * AT_ONCE;
    if (row >= DK) continue;
    const float k = inputs[DK + row] * k_scale;
    held[i].x = held[i].x * decay + k * delta[0]; held[i].y = held[i].y * decay + k * delta[1];
    held[i].z = held[i].z * decay + k * delta[2]; held[i].w = held[i].w * decay + k * delta[3];
    state[row * (DV / 4)] = held[i];
  }
  float own = 0.f;
  if (threadIdx.x < QUADS) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float of_q = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) of_q += sums[(w * 2 + 1) * COLUMNS + quad * 4 + j];
      y[j] = T::wide(T::narrow(q_scale * (decay * of_q + qk * k_scale * delta[j])));
      own += y[j] * y[j];
    }
  }
  if constexpr (TOGETHER) {
    wait_for_cluster();  // every block has begun
    if (warp == 0) {
      own = warp_sum(own);
      if (lane < SPLITS) put_there(shared_of(squares + part, lane), own);
    }
    if (threadIdx.x == 0) *flag = before == p.group * SPLITS - 1;
    arrive_at_cluster();
    wait_for_cluster();
    if (threadIdx.x < QUADS) {
      float all = 0.f;
#pragma unroll
      for (int i = 0; i < SPLITS; i++) all += squares[i];
      gated_run<T, 4>(p, head, part * COLUMNS + quad * 4, DV, all, y);
    }
  } else {
    if (threadIdx.x < QUADS) {
#pragma unroll
      for (int j = 0; j < 4; j++) p.given[(size_t)head * DV + part * COLUMNS + quad * 4 + j] = T::narrow(y[j]);
    }
    __syncthreads();
    if (threadIdx.x == 0) *flag = count_arrival(p.done + key_head) == p.group * SPLITS - 1;
  }
  __syncthreads();
  if (!*flag) return;
  if (threadIdx.x == 0) p.done[key_head] = 0;
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int t = threadIdx.x + i * THREADS;
    if (t < 2 * DK) store_run<WIDTH>(p.kept + (size_t)channel(t) * WIDTH, kept[i]);
  }
  if constexpr (!TOGETHER) {
    for (int each = key_head * p.group + warp; each < (key_head + 1) * p.group; each += WARPS) {
      float all = 0.f;
      for (int at = lane; at < DV; at += 32) {
        const float v = T::wide(__ldcg(p.given + (size_t)each * DV + at));
        all += v * v;
      }
      all = warp_sum(all);
      for (int at = lane; at < DV; at += 32) {
        const float v[1] = {T::wide(__ldcg(p.given + (size_t)each * DV + at))};
        gated_run<T, 1>(p, each, at, DV, all, v);
      }
    }
  }
}
