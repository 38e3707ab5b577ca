// What the chosen experts of one token give, times their weights, in one row: the last product of a mixture, and its sum.

// Four inputs at a time of a row in its natural order into fragment order, by one warp, from chunk `first` to `end`.
DEVICE void stage_chunks(const u16* x, const u16* order, u16* shared, int first, int end, int k, int lane) {
  if (order) {
#pragma unroll 4
    for (int at = first * CHUNK + lane; at < end * CHUNK; at += 32) {
      const int from = __ldg(order + at);
      shared[at] = from < k ? __ldcg(x + from) : (u16)0;
    }
  } else {
#pragma unroll 4
    for (int run = first * 16 + lane; run < end * 16; run += 32)
      *(uint2*)(shared + (run / 16 * 16 + run % 4 * 4 + run / 4 % 4) * 4) = four_inputs<false>(x, run * 4, k);
  }
}

// A block takes tiles of 16 outputs, SPLIT warps the weights of a choice. What is chosen is known since before the previous kernel
// began, which waited for it: the first weights are on their way before that one has ended.
template <int BITS, bool SYM, int UNITS, int SPLIT, int BATCH, int STAGES, class T> DEVICE void expert_sum(const ExpertSumArguments& e) {
  static_assert(BITS >= 4, "fewer bits need the sums of the inputs");
  typedef WeightRing<BITS, SYM, UNITS, BATCH, STAGES, false, GemvArguments> Ring;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, choice = warp / SPLIT, part = warp % SPLIT;
  const int padded = e.chunks * CHUNK, per = (e.chunks + SPLIT - 1) / SPLIT;
  const int first = min(part * per, e.chunks), end = min(first + per, e.chunks);
  u16* xs = (u16*)((u8*)shared_words + warps * STAGES * Ring::SLOT);  // [choices][padded]
  float* sums = (float*)(xs + warps / SPLIT * padded);               // [2][warps][TILE]
  xs += choice * padded;
  const u64 expert = min(__ldcg(e.chosen + choice), (u64)e.experts - 1);
  GemvArguments p = {};
  p.weights = e.weights + expert * e.weight_bytes;
  p.scales = (const u32*)((const u8*)e.scales + expert * e.scale_bytes);
  p.tiles = e.tiles; p.chunks = e.chunks; p.groups = e.groups; p.unit_to_group = e.unit_to_group;
  Ring ring = {p, (u8*)shared_words + warp * STAGES * Ring::SLOT, lane, first, end, (int)gridDim.x, (int)blockIdx.x, first, 0};
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) ring.fetch();
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  stage_chunks(e.x + (size_t)choice * e.k, e.order ? e.order + expert * e.order_length : nullptr, xs, first, end, e.k, lane);
  const float weight = e.wide ? __ldcg((const float*)e.choice_weights + choice) : T::wide(__ldcg((const u16*)e.choice_weights + choice));
  __syncwarp();

  uint4 column[2][2] = {{{0, 0, 0, 0}, {0, 0, 0, 0}}, {{0, 0, 0, 0}, {0, 0, 0, 0}}};  // as in gemv.cu
  int slot = 0;
  for (int tile = blockIdx.x, parity = 0; tile < e.tiles; tile += gridDim.x, parity ^= 1) {
    float row = 0.f, row8 = 0.f;
    for (int chunk = first; chunk < end; chunk += BATCH) {
      wait_for_copies<STAGES - 2>();
      __syncwarp();
      ring.fetch();
      const u8 *words = ring.ring + slot * Ring::SLOT, *scales = words + BATCH * Ring::CHUNK_BYTES;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        if (chunk + i < end) {
          uint4 (&b)[2] = column[i % 2];
          if (lane < 4) {
            const uint4* from = (const uint4*)(xs + (chunk + i) * CHUNK + lane * 16);
            b[0] = from[0]; b[1] = from[1];
          }
          multiply_chunk<BITS, SYM, UNITS>(words + i * Ring::CHUNK_BYTES, scales + i * UNITS * Ring::SCALE_BYTES, b, lane, row, row8);
        }
      }
    }
    float* own = sums + parity * warps * TILE;
    if (lane % 4 == 0) {
      own[warp * TILE + lane / 4] = row * weight;
      own[warp * TILE + lane / 4 + 8] = row8 * weight;
    }
    __syncthreads();
    const int n = tile * TILE + threadIdx.x;
    if (threadIdx.x < TILE && n < e.n) {
      float y = 0.f;
      for (int i = 0; i < warps; i++) y += own[i * TILE + threadIdx.x];
      if (e.bias) {
        for (int i = 0; i < warps / SPLIT; i++) {
          const float share = e.wide ? __ldcg((const float*)e.choice_weights + i) : T::wide(__ldcg((const u16*)e.choice_weights + i));
          y += share * __ldg(e.bias + min(__ldcg(e.chosen + i), (u64)e.experts - 1) * e.n + n);
        }
      }
      e.out[n] = T::narrow(y);
    }
  }
}
