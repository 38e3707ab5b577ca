// Attention of one new token per row as attention(), by a cluster of blocks for each row and head block (Hopper): grid (BLOCKS, head
// blocks, rows).
//
// Each block of a cluster adds up its warps' parts and sends the sums to the blocks of its cluster, a share to each: who has a share
// adds what all sent, in the order of the blocks, and writes it. So neither the memory nor a counter is between the blocks. A long
// conversation is attention()'s where that gives it more blocks.

#if __CUDA_ARCH__ >= 900
// What is not needed while a block multiplies lies in shared memory meanwhile: registers are short.
struct ClusterPlan {
  int senders, bits, share;  // blocks that have keys; a share has 1 << bits items, this block's so many
  u8* page;                  // where the new token is kept, in the block that adds it
};

template <int D> struct ClusterShared {
  static constexpr int ITEMS = ATTENTION_HEADS * D / 4;  // four dimensions of a head each
  AttentionShared<D> own;
  __align__(16) float4 sums[2 * ITEMS];  // [blocks that send][items of a share]: below 2 * ITEMS, as shares are rounded up
  __align__(16) int4 places[ITEMS];      // of this block's share in the output
  float2 weights[2 * ITEMS];             // the highest score of the item's head, the sum of weights
  ClusterPlan plan;
  u64 sent;
};

// As slice_of(); the new token has a block of its own where one is left. `active`: the blocks that send.
template <int BLOCKS> DEVICE Slice cluster_slice_of(const AttentionArguments& p, int row) {
  Slice s;
  s.position = p.positions[row];
  s.from = p.window > 0 ? max(0, s.position + 1 - p.window) : 0;
  const int first_strip = s.from / 32, strips = (s.position + 31) / 32 - first_strip;
  const int per_block = max((strips + BLOCKS - 1) / BLOCKS, ATTENTION_WARPS), having = (strips + per_block - 1) / per_block;
  s.active = having > 1 && having < BLOCKS ? having + 1 : max(1, having);
  s.begin = first_strip + blockIdx.x * per_block;
  s.end = min(s.begin + per_block, first_strip + strips);
  s.newest = (int)blockIdx.x == s.active - 1;
  return s;
}

// Items of a share as a power of two, of which `senders` make up all items.
DEVICE int share_bits(int items, int senders) {
  int bits = 0;
  while (senders << bits < items) bits++;
  return bits;
}

// What a block's warps found of four dimensions of a head; `weight`: the highest score, the sum of weights.
template <int D> DEVICE float4 sum_of_warps(const AttentionShared<D>& shared, int head, int d, bool newest, float2& weight) {
  constexpr int WARPS = ATTENTION_WARPS;
  float highest = shared.maxima[WARPS][head];
#pragma unroll
  for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, shared.maxima[w][head]);
  const float newer = exp2f(shared.maxima[WARPS][head] - highest);
  float total = shared.sums[WARPS][head] * newer;
  float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
  if (newest) {
    const uint2 value = *(const uint2*)(shared.new_value + d);
    y = scaled(make_float4(low_of(value.x), high_of(value.x), low_of(value.y), high_of(value.y)), newer);
  }
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const float f = exp2f(shared.maxima[w][head] - highest);
    total += shared.sums[w][head] * f;
    add_scaled(y, *(const float4*)&shared.outs[w][head][d], f);
  }
  weight = make_float2(highest, total);
  return y;
}

// What the blocks of the cluster sent of one item, which are `apart` items from each other.
template <int D, int BLOCKS> DEVICE float4 sum_of_blocks(const ClusterShared<D>& shared, int slot, int apart, int senders, float2& weight) {
  float2 theirs[BLOCKS];
  float highest = -1e30f, total = 0.f;
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    theirs[i] = i < senders ? shared.weights[i * apart + slot] : make_float2(-1e30f, 0.f);
    highest = fmaxf(highest, theirs[i].x);
  }
  float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    if (i >= senders) continue;
    const float f = exp2f(theirs[i].x - highest);
    total += theirs[i].y * f;
    add_scaled(y, shared.sums[i * apart + slot], f);
  }
  weight = make_float2(highest, total);
  return y;
}

// As stage_new_token() where a lane has both numbers of every pair that is turned: of 128 dimensions, all of them turned. Lanes have
// the angles of dimensions 2 * lane and 2 * lane + 1 for that.
DEVICE void turn_in_lanes(const HeadPairs<128>& from, const u16* norm, const Angles<128>& angles, float eps, u16* to) {
  const int lane = threadIdx.x % 32;
  u32 a = from.pair[0], b = from.pair[1];
  if (norm) {
    const u32 first = ((const u32*)norm)[lane], second = ((const u32*)norm)[32 + lane];
    const float squares = low_of(a) * low_of(a) + high_of(a) * high_of(a) + (low_of(b) * low_of(b) + high_of(b) * high_of(b));
    const float scale = rsqrtf(warp_sum(squares) / 128 + eps);
    a = to_half2(low_of(a) * scale * low_of(first), high_of(a) * scale * high_of(first));
    b = to_half2(low_of(b) * scale * low_of(second), high_of(b) * scale * high_of(second));
  }
  const float c0 = angles.cosine[0], c1 = angles.cosine[1], s0 = angles.sine[0], s1 = angles.sine[1];
  ((u32*)to)[lane] = to_half2(low_of(a) * c0 - low_of(b) * s0, high_of(a) * c1 - high_of(b) * s1);
  ((u32*)to)[32 + lane] = to_half2(low_of(b) * c0 + low_of(a) * s0, high_of(b) * c1 + high_of(a) * s1);
}
DEVICE void stage_in_lanes(const AttentionArguments& p, AttentionShared<128>& shared, const u16* qkv, const Angles<128>& angles, int kv, int head0,
                           int count, bool newest) {
  constexpr int WARPS = ATTENTION_WARPS, D = 128;
  const int warp = threadIdx.x / 32;
  const bool of_key = newest && warp == WARPS - 1;
  HeadPairs<D> queries[2], key;  // all are on their way before the first is used
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (warp + i * WARPS < count) queries[i] = load_head<D>(qkv + (head0 + warp + i * WARPS) * D);
  if (of_key) key = load_head<D>(qkv + (p.heads + kv) * D);
  if (newest) shared.new_value[threadIdx.x] = __ldcg(qkv + (p.heads + p.kv_heads + kv) * D + threadIdx.x);
#pragma unroll 1
  for (int i = 0; i < 3; i++) {
    const bool is_key = i == 2;
    if (is_key ? !of_key : warp + i * WARPS >= count) continue;
    HeadPairs<D> from;
#pragma unroll
    for (int j = 0; j < 2; j++) from.pair[j] = is_key ? key.pair[j] : i ? queries[1].pair[j] : queries[0].pair[j];
    turn_in_lanes(from, is_key ? p.k_norm : p.q_norm, angles, p.eps, is_key ? shared.new_key : shared.q[warp + i * WARPS & 7]);
  }
}

template <int D, bool Q8, int BLOCKS> DEVICE void cluster_attention(const AttentionArguments& p) {
  constexpr int WARPS = ATTENTION_WARPS, THREADS = 32 * WARPS;
  __shared__ ClusterShared<D> shared;
  AttentionShared<D>& own = shared.own;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int block = blockIdx.y, row = blockIdx.z;
  const int kv = block / p.group_blocks, group = p.heads / p.kv_heads;
  const int head0 = kv * group + block % p.group_blocks * ATTENTION_HEADS, count = min(ATTENTION_HEADS, kv * group + group - head0);
  const int items = count * (D / 4);
  if (threadIdx.x == 0) {
    slot_barrier(&shared.sent, 1);
    show_barriers();
  }
  __syncwarp();
  begin_in_cluster();
  allow_next_kernel_to_start();

  // The position, and what earlier tokens left in the pages, was written long before the previous kernel began.
  const Slice slice = cluster_slice_of<BLOCKS>(p, row);
  if ((int)blockIdx.x >= slice.active || slice.position < 0) {  // idle: nobody sends to it
    wait_for_cluster();
    return;
  }
  {
    const int bits = share_bits(items, slice.active), first = blockIdx.x << bits, share = max(0, min(1 << bits, items - first));
    if (threadIdx.x == 0) {
      u8* page = slice.newest ? (u8*)(p.pages[(size_t)row * p.max_pages + slice.position / PAGE_TOKENS] + p.layer_bytes) : nullptr;
      shared.plan = {slice.active, bits, share, page};
      if (share && slice.active > 1) expect_bytes(&shared.sent, share * slice.active * (int)(sizeof(float4) + sizeof(float2)));
    }
    const int* permutation = p.permutation + head0 * D;
    for (int slot = threadIdx.x; slot < share; slot += THREADS) copy_async<16>(permutation + (first + slot) * 4, shared.places + slot);
    commit_copies();
  }
  const u64* pages = p.pages + (size_t)row * p.max_pages;
  const u16* qkv = p.qkv + (size_t)row * (p.heads + 2 * p.kv_heads) * D;
  const size_t angle = (size_t)slice.position * p.rotary_half;
  const bool in_lanes = D == 128 && p.rotary_half == 64;
  Angles<D> angles;
#pragma unroll
  for (int i = 0; i < (D / 2 + 31) / 32; i++) {
    const int at = in_lanes ? lane * 2 + i : i * 32 + lane;
    if (at < p.rotary_half) { angles.cosine[i] = p.cosines[angle + at]; angles.sine[i] = p.sines[angle + at]; }
  }
  for (int i = count * D + threadIdx.x; i < ATTENTION_HEADS * D; i += THREADS) own.q[0][i] = 0;

  u32 queries[D / 16][2];  // of heads r; rows 8 to 15 of the matrix are zero
  Running<D> running;
  begin_sums(running);

#pragma unroll 1
  for (int at = slice.begin + warp, begins = 1; begins || at < slice.end; at += WARPS, begins = 0) {
    Strip<D, Q8> strip;
    if (at < slice.end) strip.load(p, pages, kv, at, r, c);  // the first ones while the previous kernel ends
    if (begins) {
      wait_for_cluster();  // every block of it has begun
      wait_for_previous_kernel();
      if (!in_lanes) stage_new_token<D>(p, own, qkv, angles, kv, head0, count, slice.newest);
      else if constexpr (D == 128) stage_in_lanes(p, own, qkv, angles, kv, head0, count, slice.newest);
      __syncthreads();
      load_queries(own, r, c, queries);
      if (at >= slice.end) break;
    }
    float score[4][2];
    score_strip<D, Q8>(p, strip, queries, slice, at * 32 + c * 8, score);
    add_strip<D, Q8>(strip, score, running);
  }
  leave_sums(own, running, warp, r, c);
  score_new_token<D>(p, own, count, slice.newest);
  wait_for_copies<0>();
  __syncthreads();

  const ClusterPlan plan = shared.plan;
  u16* to = p.out + (size_t)row * p.padded;
  const int first = blockIdx.x << plan.bits;
#pragma unroll 1
  for (int item = threadIdx.x; item < items; item += THREADS) {
    float2 weight;
    const float4 y = sum_of_warps<D>(own, item / (D / 4), item % (D / 4) * 4, slice.newest, weight);
    if (plan.senders == 1) { store_output(to, shared.places[item], scaled(y, 1.f / weight.y)); continue; }
    const int whose = item >> plan.bits, at = first + (item & ((1 << plan.bits) - 1));
    const u32 barrier = shared_of(&shared.sent, whose);
    send(shared_of(shared.sums + at, whose), y, barrier);
    send(shared_of(shared.weights + at, whose), weight, barrier);
  }
  if (slice.newest && warp >= WARPS - 2) {  // every head block of these keys writes the same
    const bool is_value = warp == WARPS - 1;
    store_in_page<D, Q8>(is_value ? own.new_value : own.new_key, plan.page, p.kv_heads, kv, slice.position % PAGE_TOKENS, is_value);
  }
  if (plan.senders > 1 && (int)threadIdx.x < plan.share) {  // at most one item a thread, since there are two shares or more
    wait_for_sent(&shared.sent);
    float2 weight;
    const float4 y = sum_of_blocks<D, BLOCKS>(shared, threadIdx.x, 1 << plan.bits, plan.senders, weight);
    store_output(to, shared.places[threadIdx.x], scaled(y, 1.f / weight.y));
  }
}
#endif
