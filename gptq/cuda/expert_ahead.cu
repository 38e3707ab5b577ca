// The product of one row and chosen experts' weights as expert_gemv computes it, beside attention by clusters: its blocks find their
// expert themselves, and fetch what is multiplied next into the L2.

struct ChosenProduct : GemvArguments {
  bool early;                    // the expert was known before the previous kernel had ended
  const u8 *next, *next_scales;  // of the expert's next product, or null
  u64 next_bytes, next_scale_bytes;
};
DEVICE void fetched_all(const ChosenProduct& p, int lane) {
  if (!p.next || lane) return;
  const int warps = blockDim.x / 32, part = blockIdx.x * warps + threadIdx.x / 32, parts = gridDim.x * warps;
  prefetch_share(p.next, p.next_bytes, part, parts);
  prefetch_share(p.next_scales, p.next_scale_bytes, part, parts);
}
// The next kernel reads who was chosen before this one has ended.
DEVICE void let_next_kernel_start(const ChosenProduct& p) {
  if (p.early) wait_for_previous_kernel();
  allow_next_kernel_to_start();
}

// The expert whose logit is that of a rank, as choose_by_rank ranks them, as soon as the router has shown all logits. At most RANKED of
// them; the block has at least four threads for each 64. Uses the beginning of the shared memory.
DEVICE u32 expert_of_rank(const float* shown, int experts, int rank) {
  u32* keys = (u32*)shared_words;  // [RANKED]
  u32* found = keys + RANKED;
  const int padded = (experts + 3) / 4 * 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < padded; i += blockDim.x) {
    u32 bits = 0;
    if (i < experts) {
      while ((bits = read_logit(shown + i)) == NO_LOGIT) pause();
      bits = ordered_bits(__int_as_float(bits));
    }
    keys[i] = bits;
  }
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at - (int)threadIdx.x % 32 < experts * 4; at += blockDim.x) {  // four threads for an expert
    const int i = at / 4;
    const u32 own = i < experts ? keys[i] : 0;
    int above = 0;
#pragma unroll 1
    for (int j = at % 4 * 4; j < padded; j += 16) {
      const uint4 four = *(const uint4*)(keys + j);
      const u32* key = &four.x;
#pragma unroll
      for (int n = 0; n < 4; n++) above += key[n] >= (j + n < i ? own : own + 1);  // of equal logits the first
    }
    above += __shfl_xor_sync(FULL, above, 1);
    above += __shfl_xor_sync(FULL, above, 2);
    if (i < experts && above == rank) *found = i;
  }
  __syncthreads();
  const u32 expert = *found;
  __syncthreads();  // weights come here
  return expert;
}

// Into the L2 all weights of the block's tiles but those that the ring takes at once.
template <int BITS, int SCALE_BYTES, int KS, int BATCH, int STAGES, int LASTING> DEVICE void prefetch_tiles(const GemvArguments& p) {
  if (threadIdx.x % 32) return;
  const int warp = threadIdx.x / 32, teams = blockDim.x / 32 / KS, part = warp % KS;
  const int per = (p.chunks + KS * LASTING - 1) / (KS * LASTING) * LASTING, first = min(part * per, p.chunks), end = min(first + per, p.chunks);
  int from = min(first + (STAGES - 1) * BATCH, end);
#pragma unroll 1
  for (int tile = blockIdx.x * teams + warp / KS; tile < p.tiles; tile += gridDim.x * teams) {
    if (from < end) prefetch_run(p.weights + ((size_t)tile * p.chunks + from) * (BITS * 128), (end - from) * (BITS * 128));
    if (part == 0) prefetch_run((const u8*)p.scales + (size_t)tile * p.groups * SCALE_BYTES, p.groups * SCALE_BYTES);
    from = first;
  }
}

// A row of blocks for each choice: its expert's weights are read where they lie, so no one else has to know which it is.
template <int BITS, bool SYM, int UNITS, int KS, int BATCH, int STAGES, int EPILOGUE, int NORM, bool EVEN, int INPUT, int SPAN>
DEVICE void expert_ahead(const ExpertAheadArguments& e) {
  static_assert(NORM == 0 && EPILOGUE != RESIDUAL && EPILOGUE != SILU, "experts take no norm and no residual");
  // The choice is made by the previous kernel, so nothing can be loaded before it has ended, or shown its logits; but those that are
  // always the same, whose blocks come first.
  const int choice = (blockIdx.y + e.made) % gridDim.y;
  const bool made = choice < e.made, early = made && e.logits;
  if (made && !early) wait_for_previous_kernel();
  const u64 asked = early ? expert_of_rank(e.logits, e.routed, choice) : __ldcg(e.chosen + choice), last = e.experts - 1;
  const u64 expert = asked < last ? asked : last;
  constexpr bool GATE = EPILOGUE == GATED || EPILOGUE == GATED_BFLOAT;
  constexpr int WIDTH = EPILOGUE == FLOAT ? 4 : 2;
  ChosenProduct p = {};
  p.early = early;
  p.weights = e.weights + expert * e.weight_bytes;
  p.scales = (const u32*)((const u8*)e.scales + expert * e.scale_bytes);
  if (e.next) {
    p.next = e.next + expert * e.next_bytes;
    p.next_scales = e.next_scales + expert * e.next_scale_bytes;
    p.next_bytes = e.next_bytes;
    p.next_scale_bytes = e.next_scale_bytes;
  }
  p.x = e.x + (size_t)(choice / e.share) * (INPUT == FRAGMENTS ? e.chunks * CHUNK : e.k);
  p.order = e.order + expert * e.order_length;
  p.out = (u8*)e.out + (size_t)choice * (GATE ? e.n / 2 : e.n) * WIDTH;
  p.n = e.n; p.tiles = e.tiles; p.chunks = e.chunks; p.groups = e.groups; p.unit_to_group = e.unit_to_group; p.k = e.k;
  p.activation = e.activation;
  if (e.next && !made) prefetch_tiles<BITS, SYM ? 32 : 64, KS, BATCH, STAGES, SPAN == 2 ? 2 : 1>(p);
  gemv<BITS, SYM, UNITS, KS, BATCH, STAGES, EPILOGUE, NORM, EVEN, INPUT, SPAN, 0, ChosenProduct, false>(p);
}
