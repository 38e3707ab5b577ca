// Experts of a prompt: which rows each expert multiplies, and the sum of what a token's experts give. Nothing is asked of the
// host: the numbers of rows stay on the GPU.

// Choices in the order of their experts, and those of one expert in their own order, in one block. A table of row blocks follows:
// at most `rows` choices of one expert each. A number of row blocks comes first in the table, then four numbers for each: expert,
// first row, rows. The order is the same every time, because a row's place decides in what parts its sums are made.
template <class T> DEVICE void group_choices(const GroupArguments& p) {
  constexpr int AHEAD = 8;  // choices of a thread that are loaded together
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int *counts = (int*)shared_words, *next = counts + warps * p.experts, *blocks = next + p.experts;
  int* own = counts + warp * p.experts;  // choices of each expert: of this warp, then of the warps before it
  const int span = (p.total + blockDim.x - 1) / blockDim.x * 32, begin = warp * span, end = min(p.total, begin + span);
  allow_next_kernel_to_start();
  for (int e = lane; e < p.experts; e += 32) own[e] = 0;
  wait_for_previous_kernel();
  __syncwarp();
  auto expert_of = [&](int at) { return at < end ? (int)min(__ldcg(p.chosen + at), (u64)p.experts - 1) : p.experts; };
#pragma unroll 1
  for (int from = begin; from < end; from += 32 * AHEAD) {
    int experts[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) experts[i] = expert_of(from + i * 32 + lane);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      u32 same = FULL;  // the lanes with the same expert
      for (int bit = 1; bit <= p.experts; bit *= 2) {
        const u32 with = __ballot_sync(FULL, experts[i] & bit);
        same &= experts[i] & bit ? with : ~with;
      }
      const u32 earlier = same & (1u << lane) - 1;
      const bool there = experts[i] < p.experts;
      const int before = there ? own[experts[i]] : 0;
      __syncwarp();
      if (there) p.row_of[from + i * 32 + lane] = before + __popc(earlier);
      if (there && !earlier) own[experts[i]] = before + __popc(same);
      __syncwarp();
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    int sum = 0;
    for (int of = 0; of < warps; of++) {
      const int count = counts[of * p.experts + e];
      counts[of * p.experts + e] = sum;
      sum += count;
    }
    next[e] = sum;
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // where each expert's rows and row blocks begin
    int rows = 0, high = 0;
    for (int from = 0; from < p.experts; from += 32) {
      const int e = from + lane, count = e < p.experts ? next[e] : 0, mine = (count + p.rows - 1) / p.rows;
      int upto = count, upto_blocks = mine;
#pragma unroll
      for (int by = 1; by < 32; by *= 2) {
        const int a = __shfl_up_sync(FULL, upto, by), b = __shfl_up_sync(FULL, upto_blocks, by);
        if (lane >= by) { upto += a; upto_blocks += b; }
      }
      if (e < p.experts) { next[e] = rows + upto - count; blocks[e] = high + upto_blocks - mine; }
      rows += __shfl_sync(FULL, upto, 31);
      high += __shfl_sync(FULL, upto_blocks, 31);
    }
    if (lane == 0) p.table[0] = high;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    const int first = next[e], behind = e + 1 < p.experts ? next[e + 1] : p.total;
    int4* to = (int4*)p.table + 1 + blocks[e];
    for (int at = first; at < behind; at += p.rows) *to++ = make_int4(e, at, min(p.rows, behind - at), 0);
  }
#pragma unroll 1
  for (int from = begin + lane; from < end; from += 32 * AHEAD) {
    int experts[AHEAD], rows[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      experts[i] = expert_of(from + i * 32);
      rows[i] = from + i * 32 < end ? p.row_of[from + i * 32] : 0;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int at = from + i * 32;
      if (at >= end) break;
      const int row = next[experts[i]] + own[experts[i]] + rows[i];
      p.sources[row] = at / p.per;
      p.row_of[at] = row;
      p.sorted[row] = experts[i];
    }
  }
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
