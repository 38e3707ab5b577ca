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
      *(uint2*)(shared + (run / 16 * 16 + run % 4 * 4 + run / 4 % 4) * 4) = four_inputs(x, run * 4, k);
  }
}

// The same as digits (digits.cu); `first` is the beginning of a block of inputs that have one scale.
template <int BITS, bool SYM, int UNITS, int SPAN>
DEVICE void stage_chunk_digits(const u16* x, const u16* order, u8* digits, float4* inputs, int first, int end, int k, int lane) {
  const int stop = end * CHUNK;
  int at = first * CHUNK + lane * 8;
  float v[8];
  if (order) {
#pragma unroll 1
    for (; at - lane * 8 < stop; at += 256) {
      const uint4 from = at < stop ? __ldg((const uint4*)(order + at)) : make_uint4(~0u, ~0u, ~0u, ~0u);
      const u16* input = (const u16*)&from;
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = input[j] < k ? to_float(__ldcg(x + input[j])) : 0.f;
      run_digits<BITS, SYM, UNITS, SPAN>(v, at, at < stop, digits, inputs);
    }
    return;
  }
  auto load = [&](int from) {
    const uint2 low = from < stop ? four_inputs(x, from, k) : make_uint2(0, 0), high = from < stop ? four_inputs(x, from + 4, k) : make_uint2(0, 0);
    return make_uint4(low.x, low.y, high.x, high.y);
  };
  uint4 next[3] = {load(at), load(at + 256), load(at + 512)};  // on their way while others are made
#pragma unroll 1
  for (; at - lane * 8 < stop; at += 256) {
    eight_halves(next[0], v);
    next[0] = next[1];
    next[1] = next[2];
    next[2] = load(at + 768);
    run_digits<BITS, SYM, UNITS, SPAN, true>(v, at, at < stop, digits, inputs);
  }
}

// A block takes tiles of 16 outputs, SPLIT warps the weights of a choice. What is chosen is known since before the previous kernel
// began, which waited for it: the first weights are on their way before that one has ended. SPAN: as in gemv.cu.
template <int BITS, bool SYM, int UNITS, int SPLIT, int BATCH, int STAGES, int SPAN, class T> DEVICE void expert_sum(const ExpertSumArguments& e) {
  static_assert(BITS >= 4, "fewer bits need the sums of the inputs");
  constexpr bool DIGITS_OF_X = SPAN > 0 && UNITS < 4 && BITS == 4;
  constexpr int LASTING = SPAN == 2 ? 2 : 1;
  static_assert(SPAN < 2 || DIGITS_OF_X, "only sums of digits go on over two chunks");
  typedef WeightRing<BITS, SYM, UNITS, BATCH, STAGES, false, GemvArguments, LASTING, DIGITS_OF_X> Ring;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, choice = warp / SPLIT, part = warp % SPLIT;
  const int padded = e.chunks * CHUNK, per = (e.chunks + SPLIT * LASTING - 1) / (SPLIT * LASTING) * LASTING, choices = warps / SPLIT;
  const int first = min(part * per, e.chunks), end = min(first + per, e.chunks);
  u16* xs = (u16*)((u8*)shared_words + warps * STAGES * Ring::SLOT);  // [choices][padded]
  float* sums = (float*)(xs + choices * padded);                     // [2][warps][TILE]
  float4* inputs = (float4*)(sums + 2 * warps * TILE);               // [choices][chunks / LASTING][UNITS][2], of digits only
  xs += choice * padded;
  inputs += choice * (e.chunks / LASTING) * UNITS * 2;
  const u64 expert = min(__ldcg(e.chosen + choice), (u64)e.experts - 1);
  GemvArguments p = {};
  p.weights = e.weights + expert * e.weight_bytes;
  p.scales = (const u32*)((const u8*)e.scales + expert * e.scale_bytes);
  p.tiles = e.tiles; p.chunks = e.chunks; p.groups = e.groups; p.unit_to_group = e.unit_to_group;
  Ring ring = {p, (u8*)shared_words + warp * STAGES * Ring::SLOT, lane, first, end, (int)gridDim.x, (int)blockIdx.x, first, 0};
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) ring.fetch();
  allow_next_kernel_to_start();
  const u16 *x = e.x + (size_t)choice * e.k, *order = e.order ? e.order + expert * e.order_length : nullptr;
  uint4 column[2][2] = {{{0, 0, 0, 0}, {0, 0, 0, 0}}, {{0, 0, 0, 0}, {0, 0, 0, 0}}}, pieces[2][LASTING] = {};  // as in gemv.cu
  const int magic[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
  int slot = 0;
  __syncthreads();
  wait_for_previous_kernel();
  const float weight = e.wide ? __ldcg((const float*)e.choice_weights + choice) : T::wide(__ldcg((const u16*)e.choice_weights + choice));
  if constexpr (DIGITS_OF_X) stage_chunk_digits<BITS, SYM, UNITS, LASTING>(x, order, (u8*)xs, inputs, first, end, e.k, lane);
  else stage_chunks(x, order, xs, first, end, e.k, lane);
  __syncwarp();

  for (int tile = blockIdx.x, parity = 0; tile < e.tiles; tile += gridDim.x, parity ^= 1) {
    float row = 0.f, row8 = 0.f;
    for (int chunk = first; chunk < end; chunk += BATCH) {
      wait_for_copies<STAGES - 2>();
      __syncwarp();
      ring.fetch();
      const u8 *words = ring.ring + slot * Ring::SLOT, *scales = words + BATCH * Ring::CHUNK_BYTES;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
#pragma unroll
      for (int i = 0; i < BATCH; i += LASTING) {
        if (chunk + i < end) {
          const u8 *own = words + i * Ring::CHUNK_BYTES, *own_scales = scales + i / LASTING * UNITS * Ring::SCALE_BYTES;
          if constexpr (DIGITS_OF_X) {
            uint4 (&b)[LASTING] = pieces[i / LASTING % 2];
            if ((lane & 20) == 0) {
#pragma unroll
              for (int j = 0; j < LASTING; j++) b[j] = *(const uint4*)((u8*)xs + (chunk + i + j) * CHUNK * 2 + (lane / 8 * 4 + lane % 4) * 16);
            }
            const float4* of_x = inputs + (chunk + i) / LASTING * UNITS * 2 + lane % 2;
            multiply_digits<BITS, SYM, UNITS, LASTING>(own, own_scales, of_x, b, magic, lane, row, row8);
          } else {
            uint4 (&b)[2] = column[i % 2];
            if (lane < 4) {
              const uint4* from = (const uint4*)(xs + (chunk + i) * CHUNK + lane * 16);
              b[0] = from[0]; b[1] = from[1];
            }
            multiply_chunk<BITS, SYM, UNITS>(own, own_scales, b, lane, row, row8);
          }
        }
      }
    }
    if constexpr (DIGITS_OF_X) {  // high and low digits
      row += __shfl_xor_sync(FULL, row, 1);
      row8 += __shfl_xor_sync(FULL, row8, 1);
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
        for (int i = 0; i < choices; i++) {
          const float share = e.wide ? __ldcg((const float*)e.choice_weights + i) : T::wide(__ldcg((const u16*)e.choice_weights + i));
          y += share * __ldg(e.bias + min(__ldcg(e.chosen + i), (u64)e.experts - 1) * e.n + n);
        }
      }
      e.out[n] = T::narrow(y);
    }
  }
}
