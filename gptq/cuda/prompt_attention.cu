// Attention of the tokens of a prompt, for architectures that cap their scores, have sinks or windows. Scores never leave the
// registers. A block takes 16 * MT rows of a head for each of its warps, and walks over keys and values in pieces of KEYS tokens,
// of which the next one travels while one is multiplied.
//
// Row `i` sees the keys up to its own, `first + i`, of a window the last ones of them. Whether the model's mask says the same has
// been looked up by `compare_mask`; where it says something else, it is read.

DEVICE void load_turned(const u16* from, u32 (&to)[4]) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"((u32)__cvta_generic_to_shared(from)) : "memory");
#endif
}
template <class T> DEVICE u32 narrow2(float low, float high) { return pair(T::narrow(low), T::narrow(high)); }
DEVICE float power_of_2(float v) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }

// What a mask adds to a score: bool, the numbers of the query, or fp32.
template <class T> DEVICE float masked(const PromptAttentionArguments& p, int head, size_t at) {
  at += (size_t)head * p.mask_head;
  if (p.mask_kind == 1) return ((const u8*)p.mask)[at] ? 0.f : -INFINITY;
  const float v = p.mask_kind == 2 ? T::wide(((const u16*)p.mask)[at]) : ((const float*)p.mask)[at];
  return v <= -30000.f ? -INFINITY : v;
}
DEVICE bool sees(const PromptAttentionArguments& p, int row, int key) {
  return key <= p.first + row && (!p.window || key > p.first + row - p.window);
}

// Sets `irregular` where the mask is not that of a causal model with this window. A block takes a row.
template <class T> DEVICE void compare_mask(const PromptAttentionArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int row = blockIdx.x;
  bool other = false;
  for (int key = threadIdx.x; key < p.keys; key += blockDim.x)
    other |= masked<T>(p, 0, (size_t)row * p.mask_row + key) != (sees(p, row, key) ? 0.f : -INFINITY);
  if (__syncthreads_or(other) && threadIdx.x == 0) *p.irregular = 1;
}

template <class T, int D, int WARPS, int MT, int KEYS> DEVICE void prompt_attention(const PromptAttentionArguments& p) {
  constexpr int STRIDE = D + 8, ROWS = WARPS * MT * 16, STEPS = D / 16, COLUMNS = KEYS / 8;  // rows of 16 bytes more: for the banks
  constexpr bool HELD = D * MT <= 128;  // the query's fragments stay in registers
  static_assert(D % 16 == 0 && KEYS % 16 == 0, "the matrix unit takes 16 numbers");
  u16* qs = (u16*)shared_words;
  u16 *ks = qs + ROWS * STRIDE, *vs = ks + 2 * KEYS * STRIDE;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int head = blockIdx.y, begin = (gridDim.x - 1 - blockIdx.x) * ROWS;  // the longest rows first
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const bool irregular = p.irregular && __ldcg((const int*)p.irregular);
  const u16* keys = p.k + (size_t)(head / p.group) * p.k_head;
  const u16* values = p.v + (size_t)(head / p.group) * p.v_head;
  int from = 0, to = p.keys;
  if (!irregular) {
    to = min(p.keys, p.first + min(begin + ROWS, p.rows));
    if (p.window) from = max(0, p.first + begin - p.window + 1) / KEYS * KEYS;
  }
  auto copy = [&](const u16* source, u64 stride, int first, int limit, int count, u16* target) {
    for (int i = threadIdx.x; i < count * (D / 8); i += WARPS * 32) {
      const int row = i / (D / 8), piece = i % (D / 8) * 8;
      copy_async<16>(source + min(first + row, limit - 1) * stride + piece, target + row * STRIDE + piece);
    }
  };
  copy(p.q + (size_t)head * p.q_head, p.q_row, begin, p.rows, ROWS, qs);
  copy(keys, p.k_row, from, p.keys, KEYS, ks);
  copy(values, p.v_row, from, p.keys, KEYS, vs);
  commit_copies();

  float o[MT][D / 8][4], most[MT][2], sum[MT][2];
#pragma unroll
  for (int m = 0; m < MT; m++) {
#pragma unroll
    for (int t = 0; t < D / 8; t++) o[m][t][0] = o[m][t][1] = o[m][t][2] = o[m][t][3] = 0.f;
    most[m][0] = most[m][1] = -INFINITY;
    sum[m][0] = sum[m][1] = 0.f;
  }
  [[maybe_unused]] u32 held[HELD ? MT : 1][HELD ? STEPS : 1][4];
  const u16* own = qs + (warp * MT * 16 + lane % 16) * STRIDE + lane / 16 * 8;
  const float log2e = 1.4426950408889634f, factor = p.cap ? p.scale / p.cap * 2.f * log2e : p.scale * log2e;
  int slot = 0;
#pragma unroll 1
  for (int at = from; at < to; at += KEYS, slot ^= 1) {
    if (at + KEYS < to) {
      copy(keys, p.k_row, at + KEYS, p.keys, KEYS, ks + (slot ^ 1) * KEYS * STRIDE);
      copy(values, p.v_row, at + KEYS, p.keys, KEYS, vs + (slot ^ 1) * KEYS * STRIDE);
    }
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    if constexpr (HELD) {
      if (at == from) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int s = 0; s < STEPS; s++) load_matrices(own + m * 16 * STRIDE + s * 16, held[m][s]);
      }
    }
    float y[MT][COLUMNS][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int t = 0; t < COLUMNS; t++) y[m][t][0] = y[m][t][1] = y[m][t][2] = y[m][t][3] = 0.f;
    const u16* key = ks + (slot * KEYS + lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      u32 a[MT][4];
      if constexpr (!HELD) {
#pragma unroll
        for (int m = 0; m < MT; m++) load_matrices(own + m * 16 * STRIDE + s * 16, a[m]);
      }
#pragma unroll
      for (int t = 0; t < COLUMNS; t += 2) {
        u32 b[4];
        load_matrices(key + t * 8 * STRIDE + s * 16, b);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          if constexpr (HELD) {
            multiply(T(), y[m][t], held[m][s], b[0], b[1]);
            multiply(T(), y[m][t + 1], held[m][s], b[2], b[3]);
          } else {
            multiply(T(), y[m][t], a[m], b[0], b[1]);
            multiply(T(), y[m][t + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
    u32 weights[MT][COLUMNS][2];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const int first = begin + (warp * MT + m) * 16;  // of the warp's rows
      const bool whole = !irregular && at + KEYS <= p.first + first + 1 && (!p.window || at > p.first + first + 15 - p.window);
      auto each = [&](auto use) {  // score, row, key
#pragma unroll
        for (int t = 0; t < COLUMNS; t++)
#pragma unroll
          for (int e = 0; e < 4; e++) y[m][t][e] = use(y[m][t][e], first + r + e / 2 * 8, at + t * 8 + c * 2 + e % 2);
      };
      each([&](float v, int, int) { return v * factor; });
      // cap * tanh(x) = cap * (1 - 2 / (1 + e^2x)), times log2(e)
      if (p.cap) each([&](float v, int, int) { return p.cap * log2e * (1.f - __fdividef(2.f, 1.f + power_of_2(fminf(v, 100.f)))); });
      if (irregular) {
        each([&](float v, int row, int key) {
          return key < p.keys ? v + masked<T>(p, head, min(row, p.rows - 1) * p.mask_row + key) * log2e : -INFINITY;
        });
      } else if (!whole) {
        each([&](float v, int row, int key) { return sees(p, min(row, p.rows - 1), key) && key < p.keys ? v : -INFINITY; });
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float high = most[m][half];
#pragma unroll
        for (int t = 0; t < COLUMNS; t++) high = fmaxf(high, fmaxf(y[m][t][half * 2], y[m][t][half * 2 + 1]));
        high = fmaxf(high, __shfl_xor_sync(FULL, high, 1));
        high = fmaxf(high, __shfl_xor_sync(FULL, high, 2));
        const float base = high == -INFINITY ? 0.f : high, fade = power_of_2(most[m][half] - base);
        most[m][half] = high;
        float total = 0.f;
#pragma unroll
        for (int t = 0; t < COLUMNS; t++) {
          const float v = power_of_2(y[m][t][half * 2] - base), w = power_of_2(y[m][t][half * 2 + 1] - base);
          total += v + w;
          weights[m][t][half] = narrow2<T>(v, w);
        }
        sum[m][half] = sum[m][half] * fade + total;
#pragma unroll
        for (int t = 0; t < D / 8; t++) { o[m][t][half * 2] *= fade; o[m][t][half * 2 + 1] *= fade; }
      }
    }
    const u16* value = vs + (slot * KEYS + lane % 16) * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int s = 0; s < COLUMNS / 2; s++) {
#pragma unroll
      for (int t = 0; t < D / 8; t += 2) {
        u32 b[4];
        load_turned(value + s * 16 * STRIDE + t * 8, b);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          const u32 a[4] = {weights[m][s * 2][0], weights[m][s * 2][1], weights[m][s * 2 + 1][0], weights[m][s * 2 + 1][1]};
          multiply(T(), o[m][t], a, b[0], b[1]);
          multiply(T(), o[m][t + 1], a, b[2], b[3]);
        }
      }
    }
    __syncthreads();  // the slot is filled again
  }
  wait_for_copies<0>();

#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float total = sum[m][half];
      total += __shfl_xor_sync(FULL, total, 1);
      total += __shfl_xor_sync(FULL, total, 2);
      float scale = 1.f;
      if (p.sinks) {  // one more score, of no value
        const float sink = T::wide(__ldg(p.sinks + head)) * log2e, high = fmaxf(most[m][half], sink);
        scale = power_of_2(most[m][half] - high);
        total = total * scale + power_of_2(sink - high);
      }
      scale = total > 0.f ? scale / total : 0.f;
      const int row = begin + (warp * MT + m) * 16 + half * 8 + r;
      if (row >= p.rows) continue;
      u16* out = p.out + ((size_t)row * p.heads + head) * D + c * 2;
#pragma unroll
      for (int t = 0; t < D / 8; t++) *(u32*)(out + t * 8) = narrow2<T>(o[m][t][half * 2] * scale, o[m][t][half * 2 + 1] * scale);
    }
}
