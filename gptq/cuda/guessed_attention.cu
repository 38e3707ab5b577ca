// Attention where the rows are tokens that follow each other in the sequence of row 0: the last token, and guesses after it.
//
// As attention.cu in everything else. What precedes row 0 is in the pages; the keys and values of the rows before its own a
// block makes itself, because no other block has kept them yet.

template <int D> struct GuessedShared {
  AttentionShared<D> row;  // of this row alone; its new key and value are the row's own
  __align__(16) u16 keys[ONE_ROWS][D], values[ONE_ROWS][D];  // of the rows before it
  float weights[ATTENTION_HEADS][ONE_ROWS];  // of these, and at its own place of the row, relative to the highest of their scores
};

// What a block has to do; `position`: the tokens in the pages that are seen. The row's own position is `kept` + `row`.
DEVICE Slice guessed_slice(const AttentionArguments& p, int own_position, int kept, int split) {
  Slice s;
  s.position = kept;
  s.from = p.window > 0 ? max(0, own_position + 1 - p.window) : 0;
  const int first_strip = s.from / 32, strips = max(0, (kept + 31) / 32 - first_strip);
  const int per_block = max((strips + (int)gridDim.x - 1) / (int)gridDim.x, ATTENTION_WARPS);
  s.active = max(1, (strips + per_block - 1) / per_block);
  s.begin = first_strip + split * per_block;
  s.end = min(s.begin + per_block, first_strip + strips);
  s.newest = split == s.active - 1;
  return s;
}

// The keys and values of the rows before this one, as their own blocks keep them: with Q8 in a byte for each number.
template <int D, bool Q8> DEVICE void stage_earlier_rows(const AttentionArguments& p, GuessedShared<D>& shared, int kv, int kept, int own) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = (p.heads + 2 * p.kv_heads) * D;
  auto rounded = [&](u16* numbers) {
    if constexpr (Q8) {
      __syncwarp();
      const float scale = to_float(to_half(scale_of<D>(numbers)));
      for (int d = lane; d < D; d += 32) numbers[d] = to_half(((int)byte_of(to_float(numbers[d]), scale) - 128) * scale);
    }
  };
  for (int row = warp; row < own; row += ATTENTION_WARPS) {
    const u16* from = p.qkv + (size_t)row * width;
    const size_t angle = (size_t)(kept + row) * p.rotary_half;
    const Angles<D> angles = load_angles<D>(p.cosines + angle, p.sines + angle, p.rotary_half);
    norm_and_rotate<D>(load_head<D>(from + (p.heads + kv) * D), p.k_norm, angles, p.rotary_half, p.eps, shared.keys[row]);
    for (int d = lane; d < D; d += 32) shared.values[row][d] = __ldcg(from + (p.heads + p.kv_heads + kv) * D + d);
    rounded(shared.keys[row]);
    rounded(shared.values[row]);
  }
}

// The scores of the rows that this one sees, a warp for a head. `hidden`: of the earlier ones, how many the window leaves out.
template <int D> DEVICE void score_rows(const AttentionArguments& p, GuessedShared<D>& shared, int count, int own, int hidden, bool newest) {
  constexpr int WARPS = ATTENTION_WARPS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (newest) {
    for (int head = warp; head < count; head += WARPS) {
      float scores[ONE_ROWS], highest = -1e30f, sum = 0.f;
#pragma unroll
      for (int row = 0; row < ONE_ROWS; row++) {
        scores[row] = -1e30f;
        if (row > own || row < hidden) continue;
        const u16* key = row < own ? shared.keys[row] : shared.row.new_key;
        float s = 0.f;
#pragma unroll
        for (int i = 0; i < D / 32; i++) s += to_float(shared.row.q[head][i * 32 + lane]) * to_float(key[i * 32 + lane]);
        scores[row] = warp_sum(s) * p.scale;
        highest = fmaxf(highest, scores[row]);
      }
#pragma unroll
      for (int row = 0; row < ONE_ROWS; row++) {
        const float weight = scores[row] > -1e29f ? exp2f(scores[row] - highest) : 0.f;
        sum += weight;
        if (lane == 0) shared.weights[head][row] = weight;
      }
      if (lane == 0) { shared.row.maxima[WARPS][head] = highest; shared.row.sums[WARPS][head] = sum; }
    }
  } else if (threadIdx.x < ATTENTION_HEADS) {
    shared.row.maxima[WARPS][threadIdx.x] = -1e30f;
    shared.row.sums[WARPS][threadIdx.x] = 0.f;
  }
}

// The warps' parts and those of the rows: into the output if this block is the only one, else into `here`.
template <int D> DEVICE void add_rows(const GuessedShared<D>& shared, const int* permutation, u16* to, float* here, int count, int own,
                                      bool newest, bool only) {
  constexpr int WARPS = ATTENTION_WARPS, PART = D + 4;
#pragma unroll 1
  for (int at = threadIdx.x * 4; at < count * D; at += blockDim.x * 4) {
    const int head = at / D, d = at % D;
    const int4 place = *(const int4*)(permutation + at);
    float highest = shared.row.maxima[WARPS][head];
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, shared.row.maxima[w][head]);
    const float newer = exp2f(shared.row.maxima[WARPS][head] - highest);
    float total = shared.row.sums[WARPS][head] * newer;
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int row = 0; newest && row <= own; row++) {
      const uint2 value = *(const uint2*)((row < own ? shared.values[row] : shared.row.new_value) + d);
      const float4 numbers = make_float4(low_of(value.x), high_of(value.x), low_of(value.y), high_of(value.y));
      add_scaled(y, numbers, newer * shared.weights[head][row]);
    }
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float f = exp2f(shared.row.maxima[w][head] - highest);
      total += shared.row.sums[w][head] * f;
      add_scaled(y, *(const float4*)&shared.row.outs[w][head][d], f);
    }
    if (only) store_output(to, place, scaled(y, 1.f / total));
    else {
      *(float4*)(here + head * PART + d) = y;
      if (d == 0) *(float2*)(here + head * PART + D) = make_float2(highest, total);
    }
  }
}

// -- the kernel: grid (splits, head blocks, rows) ----------------------------------------------------------------------

template <int D, bool Q8> DEVICE void guessed_attention(const AttentionArguments& p) {
  constexpr int WARPS = ATTENTION_WARPS;
  __shared__ GuessedShared<D> shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int split = blockIdx.x, block = blockIdx.y, row = blockIdx.z;
  const int kv = block / p.group_blocks, group = p.heads / p.kv_heads;
  const int head0 = kv * group + block % p.group_blocks * ATTENTION_HEADS, count = min(ATTENTION_HEADS, kv * group + group - head0);
  allow_next_kernel_to_start();

  // The positions, and what earlier tokens left in the pages, were written long before the previous kernel began.
  const int position = p.positions[row], kept = p.positions[0];
  if (position < 0 || kept < 0) return;  // a row without a guess
  const Slice slice = guessed_slice(p, position, kept, split);
  if (split >= slice.active) return;  // the other blocks wait, which is enough for the next kernels
  const u64* pages = p.pages;
  const u16* qkv = p.qkv + (size_t)row * (p.heads + 2 * p.kv_heads) * D;
  const size_t angle = (size_t)position * p.rotary_half;
  const Angles<D> angles = load_angles<D>(p.cosines + angle, p.sines + angle, p.rotary_half);
  const int* permutation = p.permutation + head0 * D;
  if (threadIdx.x * 32 < count * D) prefetch_to_l2(permutation + threadIdx.x * 32);

  u32 queries[D / 16][2];  // of heads r; rows 8 to 15 of the matrix are zero
  Running<D> running;
  begin_sums(running);

#pragma unroll 1
  for (int at = slice.begin + warp, first = 1; first || at < slice.end; at += WARPS, first = 0) {
    Strip<D, Q8> strip;
    if (at < slice.end) strip.load(p, pages, kv, at, r, c);  // the first ones while the previous kernel ends
    if (first) {
      for (int i = count * D + threadIdx.x; i < ATTENTION_HEADS * D; i += blockDim.x) shared.row.q[0][i] = 0;
      wait_for_previous_kernel();
      if (slice.newest) stage_earlier_rows<D, Q8>(p, shared, kv, kept, row);
      stage_new_token<D>(p, shared.row, qkv, angles, kv, head0, count, slice.newest);
      __syncthreads();
      load_queries(shared.row, r, c, queries);
      if (at >= slice.end) break;
    }
    float score[4][2];
    score_strip<D, Q8>(p, strip, queries, slice, at * 32 + c * 8, score);
    add_strip<D, Q8>(strip, score, running);
  }
  leave_sums(shared.row, running, warp, r, c);
  score_rows<D>(p, shared, count, row, slice.from - kept, slice.newest);
  __syncthreads();

  float* partial = p.partial + ((size_t)(row * gridDim.y + block) * gridDim.x) * ATTENTION_HEADS * (D + 4);
  u16* to = p.out + (size_t)row * p.padded;
  add_rows<D>(shared, permutation, to, partial + (size_t)split * ATTENTION_HEADS * (D + 4), count, row, slice.newest, slice.active == 1);
  auto keep_new_token = [&]() {  // every head block of these keys writes the same
    if (!slice.newest || warp >= 2) return;
    u8* page = (u8*)(pages[position / PAGE_TOKENS] + p.layer_bytes);
    store_in_page<D, Q8>(warp ? shared.row.new_value : shared.row.new_key, page, p.kv_heads, kv, position % PAGE_TOKENS, warp);
  };
  if (slice.active == 1) { keep_new_token(); return; }
  __syncthreads();
  if (threadIdx.x == 0) shared.row.arrived = count_arrival(p.done + row * gridDim.y + block);
  keep_new_token();
  __syncthreads();
  if (shared.row.arrived != slice.active - 1) return;
  add_blocks<D>(partial, permutation, to, count, slice.active, blockDim.x);
  if (threadIdx.x == 0) p.done[row * gridDim.y + block] = 0;
}
