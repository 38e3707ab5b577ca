// Parts of transformers' own forward as single kernels: norms, rotation of heads, keeping keys and values. Numbers are fp16 or
// bf16; the arithmetic is fp32.

struct Half {
  static METHOD float wide(u16 v) { return to_float(v); }
  static METHOD u16 narrow(float v) { return to_half(v); }
};
struct Bfloat {
  static METHOD float wide(u16 v) { return from_bfloat(v); }
  static METHOD u16 narrow(float v) { return to_bfloat(v); }
};

// c[16 x 8] += a[16 x 16] b[16 x 8] of such numbers
DEVICE void multiply(Half, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma(c, a, b0, b1); }
DEVICE u32 halves_of(u32 bfloats) { return to_half2(__int_as_float(bfloats << 16), __int_as_float(bfloats & 0xffff0000u)); }
DEVICE void multiply(Bfloat, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const u32 as_halves[4] = {halves_of(a[0]), halves_of(a[1]), halves_of(a[2]), halves_of(a[3])};
  mma(c, as_halves, halves_of(b0), halves_of(b1));
#endif
}

// What the chosen experts of a token give, times their weights: eight numbers from `at` on.
template <class T> DEVICE uint4 combined(const RowNormArguments& p, int token, int at) {
  float sum[8] = {};
#pragma unroll 4
  for (int i = 0; i < p.choices; i++) {
    const int choice = token * p.choices + i;
    const float4* y = (const float4*)(p.y + (size_t)choice * p.k + at);
    float4 low = __ldcg(y), high = __ldcg(y + 1);
    if (p.choice_bias) {
      const float4* bias = (const float4*)(p.choice_bias + min(__ldcg(p.chosen + choice), (u64)p.experts - 1) * p.k + at);
      const float4 more = __ldg(bias), last = __ldg(bias + 1);
      low.x += more.x; low.y += more.y; low.z += more.z; low.w += more.w;
      high.x += last.x; high.y += last.y; high.z += last.z; high.w += last.w;
    }
    const float own = p.wide ? __ldcg((const float*)p.choice_weights + choice) : T::wide(__ldcg((const u16*)p.choice_weights + choice));
    sum[0] += low.x * own; sum[1] += low.y * own; sum[2] += low.z * own; sum[3] += low.w * own;
    sum[4] += high.x * own; sum[5] += high.y * own; sum[6] += high.z * own; sum[7] += high.w * own;
  }
  uint4 v;
  u16* m = (u16*)&v;
#pragma unroll
  for (int j = 0; j < 8; j++) m[j] = T::narrow(sum[j]);
  return v;
}

enum { ROW, NORMED_ROW, CHOSEN_ROWS };  // what is added: a row, or nothing; its RMSNorm; what chosen experts give

// RMSNorm or LayerNorm of a row of `k` numbers, a multiple of 8 and at most 8 * RUNS for each thread, to which something may be added
// first. Waits for the previous kernel, writes the sum if `writes`, and leaves the norm in `held`; false if there is no norm.
// `scratch` holds 33 floats. Not `waits`: only its instructions are wanted, not what it computes.
template <class T, int RUNS, int ADDED>
DEVICE bool norm_row(const RowNormArguments& p, int token, bool writes, float* scratch, uint4 (&held)[RUNS], bool waits = true) {
  uint4 weight[RUNS], inner[RUNS];  // they do not depend on the previous kernel
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 8;
    const bool there = at < p.k;
    weight[i] = there && p.weight ? __ldg((const uint4*)(p.weight + at)) : make_uint4(0, 0, 0, 0);
    if (ADDED == NORMED_ROW) inner[i] = there ? __ldg((const uint4*)(p.inner_weight + at)) : make_uint4(0, 0, 0, 0);
  }
  if (waits) wait_for_previous_kernel();
  const size_t row = (size_t)token * p.k;
  uint4 more[RUNS];
  float sum = 0.f, inner_scale = 1.f;
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 8;
    held[i] = more[i] = make_uint4(0, 0, 0, 0);
    if (at >= p.k) continue;
    held[i] = __ldcg((const uint4*)(p.x + row + at));
    if (ADDED == CHOSEN_ROWS) more[i] = combined<T>(p, token, at);
    else if (ADDED == NORMED_ROW || p.addend) more[i] = __ldcg((const uint4*)(p.addend + row + at));
  }
  if constexpr (ADDED == NORMED_ROW) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < RUNS; i++) {
      const u16* a = (const u16*)&more[i];
#pragma unroll
      for (int j = 0; j < 8; j++) squares += T::wide(a[j]) * T::wide(a[j]);
    }
    inner_scale = rsqrtf(block_sum(squares, scratch) / p.k + p.inner_eps);
  }
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 8;
    u16 *m = (u16*)&held[i], *a = (u16*)&more[i];
    const u16* w = (const u16*)&inner[i];
    if (p.sum) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        float v = T::wide(a[j]);
        if constexpr (ADDED == NORMED_ROW) v = T::wide(T::narrow(v * inner_scale * (T::wide(w[j]) + p.inner_offset)));
        m[j] = T::narrow(T::wide(m[j]) + v);
      }
      if (writes && at < p.k) *(uint4*)(p.sum + row + at) = held[i];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sum += p.centred ? T::wide(m[j]) : T::wide(m[j]) * T::wide(m[j]);
  }
  if (!p.weight) return false;
  sum = block_sum(sum, scratch);
  float mean = 0.f;
  if (p.centred) {
    mean = sum / p.k;
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < RUNS; i++) {
      if ((i * blockDim.x + threadIdx.x) * 8 >= p.k) continue;
      const u16* m = (const u16*)&held[i];
#pragma unroll
      for (int j = 0; j < 8; j++) sum += (T::wide(m[j]) - mean) * (T::wide(m[j]) - mean);
    }
    sum = block_sum(sum, scratch);
  }
  const float scale = rsqrtf(sum / p.k + p.eps);
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 8;
    if (at >= p.k) continue;
    const uint4 bias = p.bias ? __ldg((const uint4*)(p.bias + at)) : make_uint4(0, 0, 0, 0);
    const u16 *w = (const u16*)&weight[i], *b = (const u16*)&bias;
    u16* m = (u16*)&held[i];
#pragma unroll
    for (int j = 0; j < 8; j++) m[j] = T::narrow((T::wide(m[j]) - mean) * scale * (T::wide(w[j]) + p.offset) + T::wide(b[j]));
  }
  return true;
}

template <int RUNS> DEVICE void write_runs(u16* to, int k, const uint4 (&held)[RUNS]) {
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 8;
    if (at < k) *(uint4*)(to + at) = held[i];
  }
}

// A block takes a row.
template <class T, int RUNS, int ADDED> DEVICE void norm_rows(const RowNormArguments& p) {
  uint4 held[RUNS];
  allow_next_kernel_to_start();
  if (norm_row<T, RUNS, ADDED>(p, blockIdx.x, true, (float*)shared_words, held)) write_runs<RUNS>(p.out + (size_t)blockIdx.x * p.k, p.k, held);
}

// Small code each: it is read from memory as it runs.
template <class T> DEVICE void row_norm(const RowNormArguments& p) { norm_rows<T, 1, ROW>(p); }
template <class T> DEVICE void row_norm_wide(const RowNormArguments& p) { norm_rows<T, 4, ROW>(p); }
template <class T> DEVICE void row_norm_normed(const RowNormArguments& p) { norm_rows<T, 1, NORMED_ROW>(p); }
template <class T> DEVICE void row_norm_chosen(const RowNormArguments& p) { norm_rows<T, 1, CHOSEN_ROWS>(p); }

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

// The angles of a position, from a table of all.
template <class T> DEVICE void look_up(const LookUpArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const u64 position = __ldcg(p.position), row = (position < (u64)p.rows ? position : p.rows - 1) * p.width;
  for (int i = threadIdx.x; i < p.width; i += blockDim.x) {
    p.cosines_out[i] = __ldg(p.cosines + row + i);
    p.sines_out[i] = __ldg(p.sines + row + i);
  }
}

// A row times the sigmoid of another one, which is rounded as torch rounds it.
template <class T> DEVICE void gate_row(const GateRowArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= p.n) return;
  const float gate = T::wide(__ldcg(p.gate + (size_t)(at / p.width) * p.stride + at % p.width));
  p.out[at] = T::narrow(T::wide(__ldcg(p.x + at)) * T::wide(T::narrow(1.f / (1.f + __expf(-gate)))));
}

// The new token's keys and values into the cache. A block takes a head.
template <class T> DEVICE void keep(const KeepArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int head = blockIdx.x, row = blockIdx.y;
  const u64 count = __ldcg(p.count + row), at = ((u64)row * gridDim.x + head) * p.capacity + (count < (u64)p.capacity ? count : p.capacity - 1);
  const u16 *k = p.k + row * p.k_row + (size_t)head * p.k_stride, *v = p.v + row * p.v_row + (size_t)head * p.v_stride;
  for (int i = threadIdx.x; i < p.d; i += blockDim.x) p.keys[at * p.d + i] = __ldcg(k + i);
  for (int i = threadIdx.x; i < p.dv; i += blockDim.x) p.values[at * p.dv + i] = __ldcg(v + i);
}
