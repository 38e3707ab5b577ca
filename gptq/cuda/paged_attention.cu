// Attention of many rows on Hopper and newer: as attention(), but a block stays for several items, which are heads that share
// keys, of one row or of a part of its pages. A warp lets the copy engine bring pages into a ring of shared memory, those of
// the next items too, so that the memory is busy while others add up. Two warps share a page, each with 32 of its tokens.

#if __CUDA_ARCH__ >= 900
// As slice_of(), in pages.
DEVICE Slice pages_of(const AttentionArguments& p, int row, int split) {
  Slice s;
  s.position = p.positions[row];
  s.from = p.window > 0 ? max(0, s.position + 1 - p.window) : 0;
  const int first = s.from / PAGE_TOKENS, pages = (s.position + PAGE_TOKENS - 1) / PAGE_TOKENS - first;
  const int each = max((pages + p.splits - 1) / p.splits, ATTENTION_WARPS / 2);
  s.active = s.position < 0 ? 0 : max(1, (pages + each - 1) / each);
  s.begin = first + split * each;
  s.end = min(s.begin + each, first + pages);
  s.newest = split == s.active - 1;
  return s;
}

template <int D, int SLOTS> DEVICE void paged_attention(const AttentionArguments& p) {
  typedef PageLayout<D, false> Layout;
  constexpr int WARPS = ATTENTION_WARPS, PAIRS = WARPS / 2, VALUES = PAGE_TOKENS * D * 2, SLOT = 2 * VALUES;
  static_assert(SLOTS % PAIRS == 0, "a slot belongs to the same two warps in all turns of an item");
  __shared__ AttentionShared<D> shared;
  __shared__ u64 full[SLOTS], empty[SLOTS];
  u8* ring = (u8*)shared_words;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int blocks = p.kv_heads * p.group_blocks, group = p.heads / p.kv_heads;
  const u32 items = (u32)(p.rows * blocks * p.splits);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < SLOTS; i++) { slot_barrier(full + i, 1); slot_barrier(empty + i, 2); }
    show_barriers();
  }
  __syncthreads();
  allow_next_kernel_to_start();

  // Positions, and what earlier tokens left in the pages, were written long before the previous kernel began.
  u32 turn = 0;  // pages before this one, of all items
  if (warp == WARPS) {
    if (lane > 0) return;
#pragma unroll 1
    for (u32 item = blockIdx.x; item < items; item += gridDim.x) {
      const int split = item % p.splits, kv = item / p.splits % blocks / p.group_blocks, row = item / p.splits / blocks;
      const Slice slice = pages_of(p, row, split);
      if (split >= slice.active) continue;
      const u64* pages = p.pages + (size_t)row * p.max_pages;
      u64 page = slice.begin < slice.end ? pages[slice.begin] : 0;
#pragma unroll 1
      for (int at = slice.begin; at < slice.end; at++, turn++) {
        const u64 next = at + 1 < slice.end ? pages[at + 1] : 0;
        const u32 slot = turn % SLOTS;
        if (turn >= SLOTS) wait_for_slot(empty + slot, turn / SLOTS - 1 & 1);
        const u8* from = (const u8*)(page + p.layer_bytes);
        u8* to = ring + slot * SLOT;
        const int keys = min(PAGE_TOKENS, slice.position - at * PAGE_TOKENS) * D * 2;
        expect_bytes(full + slot, keys + VALUES);
        copy_run(from + Layout::key(kv, 0), keys, to, full + slot);
        copy_run(from + Layout::value(p.kv_heads, kv, 0), VALUES, to + VALUES, full + slot);
        page = next;
      }
    }
    return;
  }

  wait_for_previous_kernel();
#pragma unroll 1
  for (u32 item = blockIdx.x; item < items; item += gridDim.x) {
    const int split = item % p.splits, block = item / p.splits % blocks, row = item / p.splits / blocks;
    const Slice slice = pages_of(p, row, split);
    if (split >= slice.active) continue;
    const int kv = block / p.group_blocks, head0 = kv * group + block % p.group_blocks * ATTENTION_HEADS;
    const int count = min(ATTENTION_HEADS, kv * group + group - head0);
    const size_t angle = (size_t)slice.position * p.rotary_half;
    const Angles<D> angles = load_angles<D>(p.cosines + angle, p.sines + angle, p.rotary_half);
    for (int i = count * D + threadIdx.x; i < ATTENTION_HEADS * D; i += WARPS * 32) shared.q[0][i] = 0;
    stage_new_token<D>(p, shared, p.qkv + (size_t)row * (p.heads + 2 * p.kv_heads) * D, angles, kv, head0, count, slice.newest);
    barrier_of_warps<WARPS>();
    u32 queries[D / 16][2];
    load_queries(shared, r, c, queries);
    Running<D> running;
    begin_sums(running);
#pragma unroll 1
    for (int at = slice.begin; at < slice.end; at++, turn++) {
      if ((at - slice.begin) % PAIRS != warp / 2) continue;
      const u32 slot = turn % SLOTS;
      wait_for_slot(full + slot, turn / SLOTS & 1);
      Strip<D, false> strip;
      strip.load(ring + slot * SLOT, ring + slot * SLOT + VALUES, warp % 2, r, c);
      float score[4][2];
      score_strip<D, false>(p, strip, queries, slice, at * PAGE_TOKENS + warp % 2 * 32 + c * 8, score);
      add_strip<D, false>(strip, score, running);
      __syncwarp();
      if (lane == 0) arrive(empty + slot);
    }
    leave_sums(shared, running, warp, r, c);
    score_new_token<D>(p, shared, count, slice.newest);
    barrier_of_warps<WARPS>();

    const int* permutation = p.permutation + head0 * D;
    float* partial = p.partial + (size_t)(row * blocks + block) * p.splits * ATTENTION_HEADS * (D + 4);
    u16* to = p.out + (size_t)row * p.padded;
    add_warps<D>(shared, permutation, to, partial + (size_t)split * ATTENTION_HEADS * (D + 4), count, slice.newest, slice.active == 1, WARPS * 32);
    if (slice.newest && warp < 2) {  // every head block of these keys writes the same
      u8* page = (u8*)(p.pages[(size_t)row * p.max_pages + slice.position / PAGE_TOKENS] + p.layer_bytes);
      store_in_page<D, false>(warp ? shared.new_value : shared.new_key, page, p.kv_heads, kv, slice.position % PAGE_TOKENS, warp);
    }
    barrier_of_warps<WARPS>();
    if (slice.active == 1) continue;
    if (threadIdx.x == 0) shared.arrived = count_arrival(p.done + row * blocks + block);
    barrier_of_warps<WARPS>();
    const bool last = shared.arrived == slice.active - 1;
    if (last) {
      add_blocks<D>(partial, permutation, to, count, slice.active, WARPS * 32);
      if (threadIdx.x == 0) p.done[row * blocks + block] = 0;
    }
    barrier_of_warps<WARPS>();
  }
}
#else
template <int D, int SLOTS> DEVICE void paged_attention(const AttentionArguments& p) {}
#endif
