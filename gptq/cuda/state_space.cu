// One token of a selective state space (Mamba 2): the convolution with its SiLU, the state, what is read of it. Then the gate and the
// norm. Numbers are fp16 or bf16, the state and the arithmetic fp32; what transformers rounds is rounded.

// A block takes DIMS rows of a head's state [dims][N], LANES lanes a row; `group` heads share what is written (b) and how it is read (c).
// What is kept and all weights are read before the previous kernel has ended: the step before wrote them.
template <class T, int DIMS, int N, int WIDTH> DEVICE void scan_token(const ScanArguments& p) {
  constexpr int THREADS = SCAN_THREADS, LANES = N / 4 < 32 ? N / 4 : 32, RUNS = N / 4 / LANES;  // of four numbers each
  constexpr int AT_ONCE = THREADS / LANES, ROWS = (DIMS + AT_ONCE - 1) / AT_ONCE;
  constexpr int CHANNELS = DIMS + 2 * N, TURNS = (CHANNELS + THREADS - 1) / THREADS;
  static_assert(N % 4 == 0 && 32 % LANES == 0 && N == 4 * LANES * RUNS, "a warp holds whole rows");
  float* inputs = (float*)shared_words;  // [CHANNELS]: the head's, b, c
  u32* flag = (u32*)(inputs + CHANNELS);
  const int head = blockIdx.x / p.parts, own_group = head / p.group, inner = gridDim.x * DIMS, lane = threadIdx.x % LANES, first = threadIdx.x / LANES;
  allow_next_kernel_to_start();
  float4* state = (float4*)(p.state + (size_t)blockIdx.x * DIMS * N) + lane;
  float4 held[ROWS][RUNS];
#pragma unroll
  for (int i = 0; i < ROWS; i++)
#pragma unroll
    for (int j = 0; j < RUNS; j++) {
      const int row = first + i * AT_ONCE;
      held[i][j] = row < DIMS ? __ldcg(state + (size_t)row * (N / 4) + j * LANES) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  auto channel = [&](int t) {
    if (t < DIMS) return (int)blockIdx.x * DIMS + t;
    return inner + (t < DIMS + N ? own_group * N + t - DIMS : (p.groups + own_group) * N + t - DIMS - N);
  };
  alignas(16) u16 kept[TURNS][WIDTH], taps[TURNS][WIDTH];
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int t = threadIdx.x + i * THREADS;
    if (t >= CHANNELS) continue;
    load_run<WIDTH>(p.kept + (size_t)channel(t) * WIDTH, kept[i]);
    load_run<WIDTH>(p.taps + (size_t)channel(t) * WIDTH, taps[i]);
  }
  const float rate = __ldg(p.decay + head), dt_bias = __ldg(p.dt_bias + head), through = __ldg(p.through + head);
  wait_for_previous_kernel();

  float dt = T::wide(T::narrow(T::wide(__ldcg(p.dt + head)) + dt_bias));
  dt = T::wide(T::narrow(fminf(fmaxf(dt > 20.f ? dt : log1pf(__expf(dt)), p.least), p.most)));
  const float decay = __expf(dt * rate);
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int t = threadIdx.x + i * THREADS;
    if (t >= CHANNELS) continue;
    const u16 own = __ldcg(p.x + channel(t));
    float sum = p.bias ? T::wide(__ldg(p.bias + channel(t))) : 0.f;
#pragma unroll
    for (int j = 1; j < WIDTH; j++) {
      kept[i][j - 1] = kept[i][j];
      sum += T::wide(kept[i][j]) * T::wide(taps[i][j - 1]);
    }
    kept[i][WIDTH - 1] = own;
    sum = T::wide(T::narrow(sum + T::wide(own) * T::wide(taps[i][WIDTH - 1])));
    inputs[t] = T::wide(T::narrow(sum / (1.f + __expf(-sum))));
    if (t < DIMS) store_run<WIDTH>(p.kept + (size_t)channel(t) * WIDTH, kept[i]);
  }
  __syncthreads();
  // Every block of these heads has the same b and c; the last one that has read what is kept of them writes it.
  u32 before = 0;
  if (threadIdx.x == 0) asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(p.done + own_group) : "memory");

  float written[RUNS][4], read[RUNS][4];
#pragma unroll
  for (int j = 0; j < RUNS; j++)
#pragma unroll
    for (int m = 0; m < 4; m++) {
      written[j][m] = T::wide(T::narrow(dt * inputs[DIMS + (j * LANES + lane) * 4 + m]));
      read[j][m] = inputs[DIMS + N + (j * LANES + lane) * 4 + m];
    }
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = first + i * AT_ONCE;
    const float x = inputs[row < DIMS ? row : 0];
    float y = 0.f;
#pragma unroll
    for (int j = 0; j < RUNS; j++) {
      float* s = (float*)&held[i][j];
#pragma unroll
      for (int m = 0; m < 4; m++) {
        s[m] = s[m] * decay + T::wide(T::narrow(written[j][m] * x));
        y += T::wide(T::narrow(s[m])) * read[j][m];
      }
      if (row < DIMS) state[(size_t)row * (N / 4) + j * LANES] = held[i][j];
    }
#pragma unroll
    for (int at = LANES / 2; at; at >>= 1) y += __shfl_xor_sync(FULL, y, at);
    if (lane == 0 && row < DIMS) p.out[(size_t)blockIdx.x * DIMS + row] = T::narrow(T::wide(T::narrow(y)) + T::wide(T::narrow(x * through)));
  }
  if (threadIdx.x == 0) *flag = before == p.group * p.parts - 1;
  __syncthreads();
  if (!*flag) return;
  if (threadIdx.x == 0) p.done[own_group] = 0;
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int t = threadIdx.x + i * THREADS;
    if (t >= DIMS && t < CHANNELS) store_run<WIDTH>(p.kept + (size_t)channel(t) * WIDTH, kept[i]);
  }
}

// A row times SiLU of its gate, and the RMSNorm of each part of `width` numbers: after the gate, or before it. A block takes a part.
template <class T> DEVICE void gated_norm(const GatedNormArguments& p) {
  float* scratch = (float*)shared_words;  // 33
  float* row = scratch + 36;              // [width]
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const size_t start = (size_t)blockIdx.x * p.width;
  auto gate_of = [&](int i) {
    const float gate = T::wide(__ldcg(p.gate + start + i));
    return gate / (1.f + __expf(-gate));
  };
  float sum = 0.f;
  for (int i = threadIdx.x; i < p.width; i += blockDim.x) {
    row[i] = T::wide(__ldcg(p.x + start + i));
    if (!p.norm_first) row[i] *= gate_of(i);
    sum += row[i] * row[i];
  }
  const float scale = p.weight ? rsqrtf(block_sum(sum, scratch) / p.width + p.eps) : 1.f;
  for (int i = threadIdx.x; i < p.width; i += blockDim.x) {
    float y = row[i];
    if (p.weight) y = T::wide(T::narrow(y * scale)) * T::wide(__ldg(p.weight + start + i));
    p.out[start + i] = T::narrow(p.norm_first ? y * gate_of(i) : y);
  }
}
