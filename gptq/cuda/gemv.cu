// One row of activations times a packed weight: y = x W, which is nearly the whole of decoding.
//
// A warp multiplies tiles of 16 outputs with the matrix unit; the sums are fp32. KS warps (a team) share a tile, each takes
// a range of its chunks, and their sums are added in a fixed order: no atomics, so the bits are the same every time. The
// first weights are on their way before the kernel waits for the previous one, or, where its input would come behind them, right after it.
// Kernels are small on purpose: code that runs once is read from memory as the weights are.

// -- the weights, on their way through a ring in shared memory ---------------------------------------------------------
// BATCH chunks travel together; STAGES batches are on their way or being multiplied. Each lane copies and reads its own
// words (the scales are the warp's), or a warp the WHOLE batch as one piece, so no warp waits for another. EVEN: every warp has
// whole batches. A scale lasts for SPAN chunks.

// What other products do besides (expert_ahead.cu): a warp, once, when all its weights are on their way; a block, when the next kernel
// may start.
template <class Arguments> DEVICE void fetched_all(const Arguments&, int) {}
template <class Arguments> DEVICE void let_next_kernel_start(const Arguments&) { allow_next_kernel_to_start(); }

template <int BITS, bool SYM, int UNITS, int BATCH, int STAGES, bool EVEN, class Arguments = GemvArguments, int SPAN = 1, bool WHOLE = false> struct WeightRing {
  static constexpr int SCALE_BYTES = SYM ? 32 : 64, CHUNK_BYTES = BITS * 128;
  static constexpr int SLOT = BATCH * CHUNK_BYTES + BATCH / SPAN * UNITS * SCALE_BYTES;
  static_assert(BITS == 2 || BITS == 3 || BITS == 4 || BITS == 8, "fragment() unpacks these");
  static_assert(UNITS == 1 || UNITS == 2 || UNITS == 4, "a chunk has four steps, and a scale lasts for whole steps");
  static_assert(UNITS * SCALE_BYTES / 16 <= 32, "a lane copies one piece of the scales");
  static_assert(BATCH % SPAN == 0, "a scale that lasts for SPAN chunks comes with all of them");
  static_assert(STAGES >= 2, "one batch is multiplied while another is on its way");
  static_assert(SLOT % 16 == 0, "copies of 16 bytes are aligned");

  const Arguments& p;
  u8* ring;  // of this warp
  int lane, first, end, stride;  // chunks of this warp; tiles from one turn to the next
  int tile, chunk, slot;  // of the next batch

  METHOD void fetch() {  // the next batch into the next slot
    u8* to = ring + slot * SLOT;
    if (tile < p.tiles) {
      const u8* from = p.weights + ((size_t)tile * p.chunks + chunk) * CHUNK_BYTES;
      if constexpr (WHOLE) fetch_whole(from, to);
      else {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
          if (EVEN || chunk + i < end) {
            copy_words<BITS>(from + i * CHUNK_BYTES, to + i * CHUNK_BYTES, lane);
            if (lane < UNITS * SCALE_BYTES / 16) {  // 16 bytes a lane
              const int unit = (chunk + i) * UNITS + lane / (SCALE_BYTES / 16);
              const u8* scale = (const u8*)p.scales + (tile * p.groups + (int)(unit * p.unit_to_group >> 16)) * SCALE_BYTES;
              copy_async<16>(scale + lane % (SCALE_BYTES / 16) * 16, to + BATCH * CHUNK_BYTES + i * UNITS * SCALE_BYTES + lane * 16);
            }
          }
        }
      }
    } else if (chunk == first && tile - stride < p.tiles) {
      fetched_all(p, lane);
    }
    commit_copies();
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    chunk += BATCH;
    if (chunk >= end) { chunk = first; tile += stride; }
  }

  // Chunks in a row as one piece, and their scales: a lane copies 16 bytes that other lanes read.
  METHOD void fetch_whole(const u8* from, u8* to) {
    const int chunks = EVEN ? BATCH : min(BATCH, end - chunk);
#pragma unroll
    for (int at = 0; at < BATCH * CHUNK_BYTES; at += 512)
      if ((EVEN && at + 512 <= BATCH * CHUNK_BYTES) || at + lane * 16 < chunks * CHUNK_BYTES) copy_async<16>(from + at + lane * 16, to + at + lane * 16);
    constexpr int PIECES = SCALE_BYTES / 16;
#pragma unroll
    for (int first = 0; first < BATCH / SPAN * UNITS * PIECES; first += 32) {
      const int at = first + lane, unit = chunk * UNITS + at / PIECES * SPAN;
      if (at >= chunks / SPAN * UNITS * PIECES) continue;
      const u8* scale = (const u8*)p.scales + (tile * p.groups + (int)(unit * p.unit_to_group >> 16)) * SCALE_BYTES;
      copy_async<16>(scale + at % PIECES * 16, to + BATCH * CHUNK_BYTES + at * 16);
    }
  }
};

// -- a chunk of a tile -------------------------------------------------------------------------------------------------

// Add the products of 64 inputs to the sums of rows r and r + 8. b: the inputs as the matrix unit takes them.
template <int BITS, bool SYM, int UNITS> DEVICE void multiply_chunk(const u8* words, const u8* scales, const uint4 (&b)[2], int lane, float& row, float& row8) {
  const u32 *bs = &b[0].x, *bt = &b[1].x;
  const Words<BITS> now = read_words<BITS>(words, lane);
  Scale<SYM> scale[UNITS];
#pragma unroll
  for (int u = 0; u < UNITS; u++) scale[u] = read_scale<BITS, SYM>(scales + u * (SYM ? 32 : 64), lane);
  float c[4];
#pragma unroll
  for (int s = 0; s < 4; s++) {
    const Scale<SYM>& own = scale[s * UNITS / 4];
    if (s * UNITS % 4 == 0) c[0] = c[1] = c[2] = c[3] = 0.f;
    u32 a[4];
    fragment<BITS>(now, s, twice_low(own.z), twice_high(own.z), a);
    mma(c, a, s < 2 ? bs[2 * s] : bt[2 * s - 4], s < 2 ? bs[2 * s + 1] : bt[2 * s - 3]);
    if ((s + 1) * UNITS % 4 == 0) {  // the scale changes here
      row += low_of(own.s) * c[0];
      row8 += high_of(own.s) * c[2];
    }
  }
}

// -- the sums of a tile ------------------------------------------------------------------------------------------------

// What the sum of output n is added to, and the place of that output in the next input. Loaded while the sums are made.
template <int EPILOGUE> DEVICE void load_addend(const GemvArguments& p, int n, float& addend, int& place) {
  if (p.bias) addend = to_float(p.bias[n]);
  if (EPILOGUE == RESIDUAL && n < p.n) {
    addend += __ldcg(p.residual + n);
    place = p.permutation[n];
  }
}

template <int KS> DEVICE void exchange_sums(float* mine, int part, int team, int lane, float row, float row8) {
  if (lane % 4 == 0) {
    mine[part * TILE + lane / 4] = row;
    mine[part * TILE + lane / 4 + 8] = row8;
  }
  if (KS == 1) __syncwarp();
  else asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "r"(KS * 32) : "memory");
}

// The activations of a gated MLP, by the number that activations.py gives them.
DEVICE float activated(float y, int activation) {
  if (activation == 0) return y / (1.f + __expf(-y));                                                    // SiLU
  if (activation == 1) return y / (1.f + __expf(-1.5957691216f * (y + 0.044715f * y * y * y)));          // GELU, by tanh
  if (activation == 2) return 0.5f * y * (1.f + erff(y * 0.70710678118f));                               // GELU
  const float z = fmaxf(y, 0.f);
  return activation == 3 ? z : z * z;                                                                    // ReLU, its square
}

template <int KS, int EPILOGUE, class Arguments> DEVICE void write_outputs(const Arguments& p, const float* mine, float addend, int place, int tile, int lane) {
  const int at = lane % TILE, n = tile * TILE + at;
  float y = addend;
#pragma unroll
  for (int i = 0; i < KS; i++) y += mine[i * TILE + at];
  if constexpr (EPILOGUE == GATED || EPILOGUE == GATED_BFLOAT) {
    const float up = __shfl_sync(FULL, y, at | 8);
    const float z = activated(y, p.activation) * up;
    if (lane < 8 && tile * 8 + lane < p.n / 2) ((u16*)p.out)[tile * 8 + lane] = EPILOGUE == GATED ? to_half(z) : to_bfloat(z);
    return;
  }
  if constexpr (EPILOGUE == SILU) {
    const float up = __shfl_sync(FULL, y, at | 8);
    if (lane < 8) ((u16*)p.out)[tile * 8 + lane] = to_half(y / (1.f + __expf(-y)) * up);
  } else if (lane < TILE && n < p.n) {
    if constexpr (EPILOGUE == PLAIN) ((u16*)p.out)[n] = to_half(y);
    if constexpr (EPILOGUE == FLOAT) ((float*)p.out)[n] = y;
    if constexpr (EPILOGUE == BFLOAT) ((u16*)p.out)[n] = to_bfloat(y);
    if constexpr (EPILOGUE == ACTIVE) ((u16*)p.out)[n] = to_half(activated(y, p.activation));
    if constexpr (EPILOGUE == ACTIVE_BFLOAT) ((u16*)p.out)[n] = to_bfloat(activated(y, p.activation));
    if constexpr (EPILOGUE == RESIDUAL) {
      p.residual[n] = y;
      ((u16*)p.out)[place] = to_half(y);
    }
  }
}

// -- the kernel --------------------------------------------------------------------------------------------------------

// A scale lasts for whole blocks of SPAN chunks; 0: x is multiplied as fp16. With an adapter inside it RUNS is more than 0, see
// adapted_gemv.cu. IN_STEP: of the compiled step of one row (timed there alone: x before the last of the ring, blocks in groups).
template <int BITS, bool SYM, int UNITS, int KS, int BATCH, int STAGES, int EPILOGUE, int NORM, bool EVEN, int INPUT, int SPAN, int RUNS = 0, class Arguments = GemvArguments,
          bool IN_STEP = INPUT == FRAGMENTS && RUNS == 0>
DEVICE void gemv(const Arguments& p) {
  static_assert(TILE == 16 && CHUNK == 64, "a tile is the matrix unit's 16 rows, a chunk four of its steps");
  static_assert(KS >= 1 && KS <= 32, "a block has at most 32 warps");
  constexpr bool DIGITS_OF_X = SPAN > 0 && UNITS < 4 && (BITS < 4 || (BITS == 4 && RUNS == 0)), AT_ONCE = DIGITS_OF_X && RUNS == 0;
  constexpr int LASTING = SPAN == 2 ? 2 : 1;
  constexpr bool GROUPED = IN_STEP && AT_ONCE && UNITS == 1 && EVEN;
  constexpr int GROUP = !GROUPED ? 1 : BATCH % (4 * LASTING) == 0 ? 4 : BATCH % (2 * LASTING) == 0 ? 2 : 1;
  static_assert(SPAN < 2 || (SPAN == 2 && DIGITS_OF_X), "only sums of digits go on over two chunks");
  typedef WeightRing<BITS, SYM, UNITS, BATCH, STAGES, EVEN, Arguments, LASTING, BITS < 4 || DIGITS_OF_X> Ring;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int team = warp / KS, teams = warps / KS, part = warp % KS;
  u16* xs = (u16*)((u8*)shared_words + warps * STAGES * Ring::SLOT);  // [chunks * CHUNK]
  float* scratch = (float*)(xs + p.chunks * CHUNK);                   // 36
  float* sums = scratch + 36 + team * 2 * KS * TILE;                  // [2][KS][TILE] of this team
  const int per = (p.chunks + KS * LASTING - 1) / (KS * LASTING) * LASTING, first = min(part * per, p.chunks), end = min(first + per, p.chunks);
  const int stride = gridDim.x * teams, first_tile = blockIdx.x * teams + team;
  Ring ring = {p, (u8*)shared_words + warp * STAGES * Ring::SLOT, lane, first, end, stride, first_tile, first, 0};

  const int before = IN_STEP && AT_ONCE ? min(p.first_batches, STAGES - 1) : STAGES - 1;  // what comes before x is what x waits for
#pragma unroll 1
  for (int i = 0; i < before; i++) ring.fetch();
  let_next_kernel_start(p);
  Adapting<RUNS, EPILOGUE, Arguments> adapting(p);
  constexpr bool NATURALLY = INPUT != FRAGMENTS;
  const NormWeight<NORM> norm = load_norm_weight<NORM>(p.norm, NATURALLY ? p.k : p.chunks * CHUNK);
  const NormWeight<NATURALLY ? NORM : 0> inner = load_norm_weight<NATURALLY ? NORM : 0>(p.inner, p.inner ? p.k : 0);
  adapting.begin(first_tile, part == 0);
  wait_for_previous_kernel();
  constexpr bool RAW = INPUT == ORDERED || INPUT == ORDERED_BFLOAT;
  float power = 1.f;  // that x was divided by
  float4* inputs = (float4*)(scratch + 36 + teams * 2 * KS * TILE + (RAW ? (p.chunks * CHUNK + 8) / 2 : 0));  // [chunks / LASTING][UNITS][2]
  u8* digits = RUNS ? (u8*)(inputs + p.chunks / LASTING * UNITS * 2) : (u8*)xs;  // an adapter takes x itself
  if constexpr (AT_ONCE && INPUT == FRAGMENTS) {
    stage_digits<NORM, BITS, SYM, UNITS, LASTING>(p.x, norm, digits, inputs, p.chunks * CHUNK, scratch, [&]() {
#pragma unroll 1
      for (int i = before; i < STAGES - 1; i++) ring.fetch();
    });
  } else if constexpr (INPUT == FRAGMENTS) stage_input<NORM>(p.x, norm, xs, p.chunks * CHUNK, p.k, p.eps, scratch);
  else {
    u16* raw = (u16*)(scratch + 36 + teams * 2 * KS * TILE);
    constexpr bool BF = INPUT == NATURAL_BFLOAT || INPUT == ORDERED_BFLOAT, ORDER = INPUT == ORDERED || INPUT == ORDERED_BFLOAT;
    static_assert(RUNS == 0, "an adapter takes x itself");
    auto stage = [&](auto place) {
      if constexpr (NORM > 0) stage_normed<NORM, BF, ORDER>(p, norm, inner, raw, scratch, place);
      else stage_natural<BF, ORDER>(p.x, p.order, raw, p.chunks * CHUNK, p.k, scratch, place);
      return place;
    };
    if constexpr (AT_ONCE) stage(InDigits<BITS, SYM, UNITS, LASTING, BF>{digits, inputs, p.chunks * CHUNK});
    else power = stage(InFragmentOrder<BF>{xs, p.chunks * CHUNK}).power;
  }
  if constexpr (DIGITS_OF_X && !AT_ONCE) {
    make_digits<BITS, SYM, UNITS, LASTING>(xs, digits, inputs, p.chunks);
    __syncthreads();
  }
  adapting.make_share(xs, scratch);

  // x as the matrix unit takes it: one column, which the first four lanes hold. The other lanes stay zero.
  uint4 column[2][2] = {{{0, 0, 0, 0}, {0, 0, 0, 0}}, {{0, 0, 0, 0}, {0, 0, 0, 0}}};
  uint4 pieces[2][LASTING] = {};  // the same of digits: the high ones are a column, the low ones another, of four lanes each
  const bool holds_digits = (lane & 20) == 0;
  const int magic[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
  float scale_of_norm = 1.f;
  int slot = 0, adder = 0;  // the part that adds the sums of the tile: the warps take turns
  for (int tile = first_tile, parity = 0; tile < p.tiles; tile += stride, parity ^= 1) {
    float row = 0.f, row8 = 0.f;
    float addend = 0.f;
    int place = 0;
    const int n = tile * TILE + lane % TILE;
    if (part == adder) {
      if (p.bias) addend = to_float(p.bias[n]);
      if (EPILOGUE == RESIDUAL && n < p.n) {
        addend += __ldcg(p.residual + n);
        place = p.permutation[n];
      }
      adapting.begin_tile(tile, tile == first_tile);
    }
    for (int chunk = first; chunk < end; chunk += BATCH) {
      wait_for_copies<STAGES - 2>();
      __syncwarp();  // other lanes copied the scales
      ring.fetch();
      const u8* words = ring.ring + slot * Ring::SLOT;
      const u8* scales = words + BATCH * Ring::CHUNK_BYTES;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
#pragma unroll
      for (int i = 0; i < BATCH; i += GROUP * LASTING) {
        if (EVEN || chunk + i < end) {
          const u8 *own = words + i * Ring::CHUNK_BYTES, *own_scales = scales + i / LASTING * UNITS * Ring::SCALE_BYTES;
          if constexpr (GROUP > 1) {
            const u8* read = digits + (chunk + i + lane / 8 % GROUP * LASTING) * CHUNK * 2 + lane % 8 * 16;
            const float4* x = inputs + ((u32)chunk / LASTING + i / LASTING + lane % GROUP) * 2;
            multiply_group<BITS, SYM, LASTING, GROUP>(own, own_scales, read, x, magic, lane, row, row8);
          } else if constexpr (DIGITS_OF_X) {
            uint4 (&b)[LASTING] = pieces[i / LASTING % 2];
            if (holds_digits) {
#pragma unroll
              for (int j = 0; j < LASTING; j++) b[j] = *(const uint4*)(digits + (chunk + i + j) * CHUNK * 2 + (lane / 8 * 4 + lane % 4) * 16);
            }
            const float4* x = inputs + ((u32)chunk / LASTING + i / LASTING) * UNITS * 2 + lane % 2;
            multiply_digits<BITS, SYM, UNITS, LASTING>(own, own_scales, x, b, magic, lane, row, row8);
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
    if constexpr (AT_ONCE && INPUT == FRAGMENTS && NORM > 0) {
      if (tile == first_tile) scale_of_norm = norm_scale(scratch, p.k, p.eps);
      row *= scale_of_norm;
      row8 *= scale_of_norm;
    }
    if constexpr (!AT_ONCE && (INPUT == NATURAL_BFLOAT || INPUT == ORDERED_BFLOAT)) {
      row *= power;
      row8 *= power;
    }
    if constexpr (DIGITS_OF_X) {
      row = sum_of_columns<GROUP>(row);
      row8 = sum_of_columns<GROUP>(row8);
    }
    float* mine = sums + parity * KS * TILE;
    exchange_sums<KS>(mine, part, team, lane, row, row8);
    if (part == adder) write_outputs<KS, EPILOGUE>(p, mine, RUNS ? addend + adapting.of_tile(tile, xs) : addend, place, tile, lane);
    adder = adder + 1 == KS ? 0 : adder + 1;
  }
  adapting.end();
}
