// Experts of a prompt: which rows each expert multiplies, and the sum of what a token's experts give. Nothing is asked of the
// host: the numbers of rows stay on the GPU.

// Choices in the order of their experts, in one block. A table of row blocks follows: at most `rows` choices of one expert each.
// A number of row blocks comes first in the table, then four numbers for each: expert, first row, rows. Which choice of an expert
// comes first is left open: each row is computed by itself.
template <class T> DEVICE void group_choices(const GroupArguments& p) {
  constexpr int AHEAD = 8;  // choices of a thread that are loaded together
  int *next = (int*)shared_words, *blocks = next + p.experts;  // a count, then the next row; row blocks of those before
  const int lane = threadIdx.x % 32;
  allow_next_kernel_to_start();
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) next[e] = 0;
  wait_for_previous_kernel();
  __syncthreads();
  // `use` is given a choice, its expert (-1 beyond the last), the lanes with the same one, and what the first of them adds up.
  auto each = [&](auto use) {
#pragma unroll 1
    for (int from = threadIdx.x; from - lane < p.total; from += AHEAD * blockDim.x) {
      int experts[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int at = from + i * blockDim.x;
        experts[i] = at < p.total ? (int)min(__ldcg(p.chosen + at), (u64)p.experts - 1) : -1;
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const u32 same = __match_any_sync(FULL, experts[i]);
        const int first = __ffs(same) - 1;
        int before = 0;
        if (lane == first && experts[i] >= 0) before = atomicAdd(next + experts[i], __popc(same));
        use(from + i * blockDim.x, experts[i], __shfl_sync(FULL, before, first) + __popc(same & (1u << lane) - 1));
      }
    }
  };
  each([](int, int, int) {});
  __syncthreads();
  if (threadIdx.x < 32) {  // where each expert's rows and row blocks begin
    int rows = 0, high = 0;
    for (int from = 0; from < p.experts; from += 32) {
      const int e = from + lane, count = e < p.experts ? next[e] : 0, own = (count + p.rows - 1) / p.rows;
      int upto = count, upto_blocks = own;
#pragma unroll
      for (int by = 1; by < 32; by *= 2) {
        const int a = __shfl_up_sync(FULL, upto, by), b = __shfl_up_sync(FULL, upto_blocks, by);
        if (lane >= by) { upto += a; upto_blocks += b; }
      }
      const int first = rows + upto - count;
      if (e < p.experts) { next[e] = first; blocks[e] = high + upto_blocks - own; }
      rows += __shfl_sync(FULL, upto, 31);
      high += __shfl_sync(FULL, upto_blocks, 31);
    }
    if (lane == 0) p.table[0] = high;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    const int first = next[e], end = e + 1 < p.experts ? next[e + 1] : p.total;
    int4* to = (int4*)p.table + 1 + blocks[e];
    for (int at = first; at < end; at += p.rows) *to++ = make_int4(e, at, min(p.rows, end - at), 0);
  }
  __syncthreads();
  each([&](int choice, int expert, int row) {
    if (expert < 0) return;
    p.sources[row] = choice / p.per;
    p.row_of[choice] = row;
    p.sorted[row] = expert;
  });
}

// As combine(), of fp16 rows in the order of their experts. A thread takes eight numbers of a token.
template <class T> DEVICE void combine_grouped(const CombineGroupedArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int token = blockIdx.y, at = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (at >= p.n) return;
  float sum[8] = {};
#pragma unroll 4
  for (int i = 0; i < p.choices; i++) {
    const int choice = token * p.choices + i;
    const uint4 y = __ldcg((const uint4*)(p.y + (size_t)__ldcg(p.row_of + choice) * p.n + at));
    const float weight = p.wide ? __ldcg((const float*)p.weights + choice) : T::wide(__ldcg((const u16*)p.weights + choice));
    const u16* own = (const u16*)&y;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = to_float(own[j]);
    if (p.bias) {
      const float4* bias = (const float4*)(p.bias + min(__ldcg(p.chosen + choice), (u64)p.experts - 1) * p.n + at);
      const float4 low = __ldg(bias), high = __ldg(bias + 1);
      v[0] += low.x; v[1] += low.y; v[2] += low.z; v[3] += low.w;
      v[4] += high.x; v[5] += high.y; v[6] += high.z; v[7] += high.w;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] += v[j] * weight;
  }
  uint4 v;
  u16* to = (u16*)&v;
#pragma unroll
  for (int j = 0; j < 8; j++) to[j] = T::narrow(sum[j]);
  *(uint4*)(p.out + (size_t)token * p.n + at) = v;
}
