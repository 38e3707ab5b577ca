// All layers of one token by one kernel, a block on every processor: the memory need not wait between products.
//
// Each warp has a ring of its own, which the copy engine fills with the weights of its tiles, product after product and layer after
// layer. So the next weights are on their way while blocks wait for each other, stage x, or attend. Blocks meet five times a layer:
// after qkv, attention, o, gate and up, and down. A block always makes the same outputs, so the residual stays in its registers.
//
// What a block reads of the others' numbers it reads from the L2 (`__ldcg`), behind a barrier of the grid. Sums are added in a fixed
// order, so the bits are the same every time.

enum { QKV, O, GATE_UP, DOWN };
// Of measurements: what is left out, and the trace of where the time goes. Results are wrong but with TRACED and WITHIN_PRODUCTS.
enum { NO_PRODUCTS = 1, NO_STAGING = 2, NO_ATTENTION = 4, NO_MEETING = 8, NO_COPIES = 16, WITHIN_PRODUCTS = 32, TRACED = 64 };

// The thread, asked for again: what is computed from it is not kept in registers over a whole layer.
DEVICE int this_thread() { int v; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v)); return v; }

// -- the numbers of a model --------------------------------------------------------------------------------------------

// How a product is spread: KS warps share a tile, a block has OF_BLOCK tiles in a row.
template <int N, int K, int SHARING, int WARPS, int BLOCKS> struct ProductSpread {
  static constexpr int TILES = N / TILE, CHUNKS = K / CHUNK, KS = SHARING, TEAMS = WARPS / KS, OF_BLOCK = (TILES + BLOCKS - 1) / BLOCKS;
  static constexpr int PER = (CHUNKS / 2 + KS - 1) / KS * 2;  // chunks of a warp, whole pairs
  static constexpr int SUMS = OF_BLOCK * KS * TILE;
  static_assert(N % TILE == 0 && K % (2 * CHUNK) == 0 && WARPS % KS == 0, "whole tiles, whole pairs of chunks");
};

template <int FIRST, int... MORE> struct Most { static constexpr int OF = FIRST > Most<MORE...>::OF ? FIRST : Most<MORE...>::OF; };
template <int FIRST> struct Most<FIRST> { static constexpr int OF = FIRST; };

template <int P_WARPS, int P_BLOCKS, int P_HIDDEN, int P_INNER, int P_HEADS, int P_KV_HEADS, int P_D, int KS_QKV, int KS_O, int KS_GATE_UP, int KS_DOWN> struct TokenShape {
  static constexpr int WARPS = P_WARPS, THREADS = WARPS * 32, BLOCKS = P_BLOCKS, HIDDEN = P_HIDDEN, INNER = P_INNER, HEADS = P_HEADS, KV_HEADS = P_KV_HEADS, D = P_D;
  static constexpr int GROUP = HEADS / KV_HEADS, ROOM = BLOCKS / KV_HEADS, PARTS = ROOM >= 16 ? 16 : ROOM >= 8 ? 8 : ROOM >= 4 ? 4 : ROOM, ATTENDED = HEADS * D;
  typedef ProductSpread<(HEADS + 2 * KV_HEADS) * D, HIDDEN, KS_QKV, WARPS, BLOCKS> Qkv;
  typedef ProductSpread<HIDDEN, ATTENDED, KS_O, WARPS, BLOCKS> Out;
  typedef ProductSpread<2 * INNER, HIDDEN, KS_GATE_UP, WARPS, BLOCKS> GateUp;
  typedef ProductSpread<HIDDEN, INNER, KS_DOWN, WARPS, BLOCKS> Down;
  static constexpr int WIDEST = Most<HIDDEN, ATTENDED, INNER>::OF;
  // The digits of x and what their sums need, or the warps' parts of an attention.
  static constexpr int X_BYTES = Most<WIDEST * 2 + WIDEST / (2 * CHUNK) * 32, WARPS * GROUP * D * 4>::OF;
  static constexpr int SUMS = Most<Qkv::SUMS, Out::SUMS, GateUp::SUMS, Down::SUMS>::OF;
  static_assert(PARTS >= 4 && HEADS * PARTS % 32 == 0 && (GROUP & (GROUP - 1)) == 0, "lanes share the parts of a head, warps its heads");
  static_assert(GROUP * D <= THREADS && GROUP < WARPS && Out::OF_BLOCK * TILE <= THREADS, "a thread has one output at most");
  static_assert(Out::OF_BLOCK == Down::OF_BLOCK, "a block keeps the residual of its outputs");
};

// -- the weights of a warp, on their way -------------------------------------------------------------------------------

struct TokenPlan { u32 words, scales, counts, step; };  // of a warp in a product: bytes to its first tile; turns, chunks << 16; chunks between turns

// What a warp fetches next. It lies in shared memory, because one lane alone uses it.
struct __align__(16) TokenPlace {
  const u8 *words, *scales;
  int left, slot, turns, chunks;  // chunks of the tile; of the ring; tiles of the product; chunks of a tile
  int step, layer, role;
  int owed;  // WITHIN_PRODUCTS: batches that the ring has room for
};

template <int BITS, bool SYM, int BATCH, int STAGES, class S, int OPTIONS> struct TokenStream {
  static constexpr int CHUNK_BYTES = BITS * 128, SCALE_BYTES = SYM ? 32 : 64, SLOT = BATCH * CHUNK_BYTES + BATCH / 2 * SCALE_BYTES;
  static_assert(BATCH % 2 == 0 && SLOT % 16 == 0 && SLOT * STAGES % 16 == 0, "pairs of chunks, aligned");

  u8* ring;     // of this warp
  u64* full;    // [STAGES]
  TokenPlace* next;
  const TokenPlan* plans;  // [4 products][WARPS], from this warp's on
  const u64* table;        // [layers][TOKEN_LAYER]
  int layers;

  METHOD void begin_role(int layer, int role) {
    for (; layer < layers; layer += role == 3, role = (role + 1) & 3) {
      const TokenPlan own = plans[role * S::WARPS];
      const int turns = own.counts & 0xffff, chunks = own.counts >> 16;
      if (turns == 0 || chunks == 0) continue;
      const u64* at = table + layer * TOKEN_LAYER + role * 2;
      next->words = (const u8*)at[0] + own.words; next->scales = (const u8*)at[1] + own.scales;
      next->turns = turns; next->chunks = next->left = chunks; next->step = own.step;
      break;
    }
    next->layer = layer; next->role = role;
  }
  METHOD void fetch(int until) {  // the next batch into the next slot; of one lane
    if (OPTIONS & NO_COPIES) return;
    const int layer = next->layer, role = next->role;
    if (layer >= layers) return;
    if ((OPTIONS & WITHIN_PRODUCTS) && layer * 4 + role > until) { next->owed++; return; }
    int left = next->left, slot = next->slot;
    const u8 *words = next->words, *scales = next->scales;
    const int count = min(left, BATCH), bytes = count * CHUNK_BYTES, scale_bytes = count / 2 * SCALE_BYTES;
    u8* to = ring + slot * SLOT;
    expect_bytes(full + slot, bytes + scale_bytes);
    copy_run(words, bytes, to, full + slot);
    copy_run(scales, scale_bytes, to + BATCH * CHUNK_BYTES, full + slot);
    next->slot = slot + 1 == STAGES ? 0 : slot + 1;
    words += bytes; scales += scale_bytes;
    left -= count;
    if (left == 0) {
      const int turns = next->turns - 1;
      if (turns == 0) return begin_role(layer + (role == 3), (role + 1) & 3);
      const int chunks = next->chunks, gap = next->step - chunks;
      words += gap * CHUNK_BYTES; scales += gap / 2 * SCALE_BYTES;
      left = chunks;
      next->turns = turns;
    }
    next->words = words; next->scales = scales; next->left = left;
  }
};

template <class Spread, int CHUNK_BYTES, int SCALE_BYTES> DEVICE TokenPlan plan_of_warp(int warp) {
  const int first_tile = blockIdx.x * Spread::OF_BLOCK, tiles = min(Spread::OF_BLOCK, Spread::TILES - first_tile);
  const int team = warp / Spread::KS, first = warp % Spread::KS * Spread::PER, chunks = min(Spread::PER, Spread::CHUNKS - first);
  const int turns = tiles > team ? (tiles - team + Spread::TEAMS - 1) / Spread::TEAMS : 0;
  const u32 at = (u32)(first_tile + team) * Spread::CHUNKS + first;
  return {at * CHUNK_BYTES, at / 2 * SCALE_BYTES, (u32)(turns | max(chunks, 0) << 16), (u32)(Spread::TEAMS * Spread::CHUNKS)};
}

// -- handing over ------------------------------------------------------------------------------------------------------
// TAGGED: no one waits for all. A number is a word with the number of its layer above it, which who reads it waits for. A word is
// written again only after everyone has read it: who writes has what others made of all of it.

DEVICE void tell(u32* to, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory"); }
DEVICE void tell2(void* to, u32 a, u32 b) { asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(a), "r"(b) : "memory"); }
DEVICE uint4 look4(const void* at) { uint4 v; asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory"); return v; }
DEVICE uint2 look2(const void* at) { uint2 v; asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory"); return v; }
DEVICE u64 nanoseconds() { u64 v; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v)); return v; }
DEVICE u64 cycles() { u64 v; asm volatile("mov.u64 %0, %%clock64;" : "=l"(v)); return v; }

struct Patience {  // two seconds, then the launch fails instead of hanging
  u64 since;
  u32 turns;
  METHOD void again() {
    if (++turns % 1024) return;
    const u64 now = nanoseconds();
    if (since == 0) since = now;
    else if (now - since > 2000000000ull) asm volatile("trap;");
  }
};

template <bool TAGGED> DEVICE void hand_over(void* to, int at, float y, u32 tag) {
  if constexpr (TAGGED) tell((u32*)to + at, (u32)to_half(y) | tag << 16);
  else ((u16*)to)[at] = to_half(y);
}
DEVICE bool tagged(const uint4& v, u32 tag) { return v.x >> 16 == tag && v.y >> 16 == tag && v.z >> 16 == tag && v.w >> 16 == tag; }

// Eight numbers, as they were handed over.
template <bool TAGGED> struct EightGiven {
  uint4 a, b;
  METHOD void load(const void* x, int at, bool there) {
    a = make_uint4(0, 0, 0, 0); b = a;
    if (!there) return;
    if constexpr (TAGGED) { a = look4((const u32*)x + at); b = look4((const u32*)x + at + 4); }
    else a = __ldcg((const uint4*)((const u16*)x + at));
  }
  METHOD void load_plain(const u16* x, int at, bool there) {
    const uint4 v = there ? __ldcg((const uint4*)(x + at)) : make_uint4(0, 0, 0, 0);
    a = make_uint4(v.x, v.x >> 16, v.y, v.y >> 16); b = make_uint4(v.z, v.z >> 16, v.w, v.w >> 16);
  }
  METHOD bool here(u32 tag) const { return !TAGGED || (tagged(a, tag) && tagged(b, tag)); }
  METHOD void numbers(float (&v)[8]) const {
    if constexpr (TAGGED) {
      v[0] = low_of(a.x); v[1] = low_of(a.y); v[2] = low_of(a.z); v[3] = low_of(a.w);
      v[4] = low_of(b.x); v[5] = low_of(b.y); v[6] = low_of(b.z); v[7] = low_of(b.w);
    } else eight_halves(a, v);
  }
};
template <bool TAGGED, int K, int RUNS, int THREADS> DEVICE void take(const void* x, u32 tag, const u16* plain, int tid, EightGiven<TAGGED> (&mine)[RUNS]) {
  if (TAGGED && plain) {
#pragma unroll
    for (int i = 0; i < RUNS; i++) mine[i].load_plain(plain, (i * THREADS + tid) * 8, (i * THREADS + tid) * 8 < K);
    return;
  }
  Patience patience = {0, 0};
  while (true) {
    bool here = true;
#pragma unroll
    for (int i = 0; i < RUNS; i++) mine[i].load(x, (i * THREADS + tid) * 8, (i * THREADS + tid) * 8 < K);
#pragma unroll
    for (int i = 0; i < RUNS; i++) here = here && ((i * THREADS + tid) * 8 >= K || mine[i].here(tag));
    if (here) break;
    patience.again();
  }
}

// -- meeting -----------------------------------------------------------------------------------------------------------

DEVICE u32 seen_by_all(const u32* at) { u32 v; asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory"); return v; }
DEVICE u32 seen_soon(const u32* at) { u32 v; asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory"); return v; }

// `counters`: arrivals, and 32 words on those who have left; FLAGS: 64 words on one for each block. All are zero between launches;
// TAGGED: the first one is the number of launches so far.
enum { COUNTED, FLAGGED, TAGGED_NUMBERS };
template <int BLOCKS, int KIND, bool NEVER> struct Meeting {
  static constexpr bool FLAGS = KIND == FLAGGED;
  u32* counters;
  u32 number;  // of meetings so far

  METHOD void arrive() {  // what the block wrote before is seen by who waits
    if (KIND == TAGGED_NUMBERS) return;
    __syncthreads();
    number++;
    if (NEVER) return;
    if (threadIdx.x == 0) {
      if (FLAGS) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(counters + 64 + blockIdx.x), "r"(number) : "memory");
      else asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counters) : "memory");
    }
  }
  METHOD void wait() const {
    if (KIND == TAGGED_NUMBERS) return;
    if (!NEVER && threadIdx.x < (FLAGS ? 32 : 1)) {
      Patience patience = {0, 0};
      if (FLAGS) {
        constexpr int EACH = (BLOCKS + 31) / 32;
        while (true) {
          bool here = true;
#pragma unroll
          for (int i = 0; i < EACH; i++) {
            const int at = threadIdx.x + i * 32;
            const u32 one = seen_soon(counters + 64 + min(at, BLOCKS - 1));
            here = here && (int)(one - number) >= 0;
          }
          if (__all_sync(FULL, here)) break;
          patience.again();
        }
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
      } else {
        while ((int)(seen_by_all(counters) - number * BLOCKS) < 0) patience.again();
      }
    }
    __syncthreads();
  }
  METHOD void leave() const {  // the last one makes everything zero again
    __syncthreads();
    if (threadIdx.x || NEVER) return;
    if (count_arrival(counters + 32) != BLOCKS - 1) return;
    counters[0] = KIND == TAGGED_NUMBERS ? counters[0] + 1 : 0;
    counters[32] = 0;
    if (FLAGS) for (int i = 0; i < BLOCKS; i++) counters[64 + i] = 0;
  }
};

// -- attention ---------------------------------------------------------------------------------------------------------

// 16 tokens of a page: a lane has tokens 4 c to 4 c + 3 of lane column c, as `Strip` has eight of 32.
template <int D> struct HalfKeys {
  uint4 k[2][D / 32];
  METHOD void load(const u8* page, int kv, int at, int r, int c) {
    const u8* keys = page + PageLayout<D, false>::key(kv, at % 4 * 16 + r / 2 * 4 + r % 2) + c * 16;
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int i = 0; i < D / 32; i++) k[t][i] = *(const uint4*)(keys + (t * 2 * D + i * 32) * 2);
  }
};
template <int D> struct HalfValues {
  uint2 v[D / 8];
  METHOD void load(const u8* page, int kv_heads, int kv, int at, int r, int c) {
    const u8* values = page + PageLayout<D, false>::value(kv_heads, kv, r) + (at % 4 * 16 + c * 4) * 2;
#pragma unroll
    for (int t = 0; t < D / 8; t++) v[t] = *(const uint2*)(values + t * 8 * PAGE_TOKENS * 2);
  }
};

// What a part has to do: 16 tokens at a time, from `begin` to `end`.
struct TokenSlice { int position, from, begin, end, active; bool newest; };
template <int PARTS, int LEAST> DEVICE TokenSlice token_slice(int position, int window, int part) {
  TokenSlice s;
  s.position = position;
  s.from = window > 0 ? max(0, position + 1 - window) : 0;
  const int first = s.from / 16, halves = (position + 15) / 16 - first, per = max((halves + PARTS - 1) / PARTS, LEAST);
  s.active = max(1, (halves + per - 1) / per);
  s.begin = first + part * per;
  s.end = min(s.begin + per, first + halves);
  s.newest = part == s.active - 1;
  return s;
}

template <class S> struct TokenShared {  // what is not a ring, not x and not sums
  __align__(16) u16 q[S::GROUP][S::D];
  __align__(16) u16 new_key[S::D], new_value[S::D];
  float maxima[S::WARPS + 1][S::GROUP], weights[S::WARPS + 1][S::GROUP];
  float squares[32];
  float factors[S::PARTS][S::HEADS];
  __align__(16) TokenPlan plans[4 * S::WARPS];
  TokenPlace next[S::WARPS];
};

// What each of 16 tokens weighs, relative to the highest score so far; `shrink`: what is left of the sums before.
template <class S, class Shared> DEVICE void weigh_half(const WholeTokenArguments& p, const Shared& shared, const TokenSlice& slice, const HalfKeys<S::D>& keys, int at, int r, int c,
                                                        float& top, float& sum, float& shrink, u32 (&weights)[2]) {
  float score[2][2], s[2][4] = {};
#pragma unroll
  for (int i = 0; i < S::D / 32; i++) {
    const uint4 q = *(const uint4*)&shared.q[r & (S::GROUP - 1)][i * 32 + c * 8];  // rows beyond the group are computed in vain
    const u32 a[4] = {q.x, 0, q.y, 0}, b[4] = {q.z, 0, q.w, 0};
#pragma unroll
    for (int t = 0; t < 2; t++) {
      mma(s[t], a, keys.k[t][i].x, keys.k[t][i].y);
      mma(s[t], b, keys.k[t][i].z, keys.k[t][i].w);
    }
  }
  float higher = top;
#pragma unroll
  for (int t = 0; t < 2; t++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int token = at * 16 + c * 4 + t * 2 + e;
      score[t][e] = token < slice.position && token >= slice.from ? s[t][e] * p.scale : -1e30f;
      higher = fmaxf(higher, score[t][e]);
    }
  higher = fmaxf(higher, __shfl_xor_sync(FULL, higher, 1));
  higher = fmaxf(higher, __shfl_xor_sync(FULL, higher, 2));
  shrink = exp2f(top - higher);
  top = higher;
  sum *= shrink;
#pragma unroll
  for (int t = 0; t < 2; t++) {
    const float a = score[t][0] > -1e29f ? exp2f(score[t][0] - higher) : 0.f, b = score[t][1] > -1e29f ? exp2f(score[t][1] - higher) : 0.f;
    sum += a + b;
    weights[t] = to_half2(a, b);
  }
}

template <bool TAGGED> DEVICE void hand_weight(float* to, int at, float highest, float total, u32 tag) {
  if constexpr (TAGGED) {
    tell2(to + at * 4, __float_as_int(highest), tag);
    tell2(to + at * 4 + 2, __float_as_int(total), tag);
  } else *(float2*)(to + at * 4) = make_float2(highest, total);
}
template <bool TAGGED> DEVICE float2 take_weight(const float* from, int at, u32 tag) {
  if constexpr (TAGGED) {
    Patience patience = {0, 0};
    while (true) {
      const uint4 v = look4(from + at * 4);
      if (v.y == tag && v.w == tag) return make_float2(__int_as_float(v.x), __int_as_float(v.z));
      patience.again();
    }
  } else return __ldcg((const float2*)(from + at * 4));
}

template <int D, bool TAGGED> DEVICE HeadPairs<D> take_head(const void* qkv, int head, u32 tag, int lane) {
  if constexpr (!TAGGED) return load_head<D>((const u16*)qkv + head * D);
  else {
    HeadPairs<D> r;
    Patience patience = {0, 0};
    while (true) {
      bool here = true;
#pragma unroll
      for (int i = 0; i < (D + 63) / 64; i++) {
        const int at = i * 32 + lane;
        const uint2 v = at < D / 2 ? look2((const u32*)qkv + head * D + at * 2) : make_uint2(tag << 16, tag << 16);
        here = here && v.x >> 16 == tag && v.y >> 16 == tag;
        r.pair[i] = (v.x & 0xffff) | v.y << 16;
      }
      if (here) break;
      patience.again();
    }
    __syncwarp();
    return r;
  }
}

// A part of the keys for one kv head: its output, divided by its sum of weights, goes to `part_out` in the order of o's input.
template <class S, bool TAGGED, class Shared>
DEVICE void attend_part(const WholeTokenArguments& p, Shared& shared, float* outs, const TokenSlice& slice, const u64* layer, const Angles<S::D>& angles, int place,
                        u64 layer_bytes, int kv, int part, u32 tag) {
  constexpr int D = S::D, GROUP = S::GROUP, WARPS = S::WARPS;
  const int tid = this_thread(), lane = tid % 32, warp = tid / 32, r = lane / 4, c = lane % 4, head0 = kv * GROUP;
  const int used = min(WARPS, slice.end - slice.begin);  // warps that have tokens
  HalfKeys<D> first_keys;
  HalfValues<D> first_values;
  {
    const int at = min(slice.begin + warp, slice.position / 16);  // of a page that is there, where a warp has no tokens
    const u8* page = (const u8*)(p.pages[at / 4] + layer_bytes);
    first_keys.load(page, kv, at, r, c);
    first_values.load(page, S::KV_HEADS, kv, at, r, c);
    const bool is_key = warp == GROUP, is_value = warp == GROUP + 1;
    HeadPairs<D> head;
    if (warp < GROUP || ((is_key || is_value) && slice.newest)) {
      const int from = is_value ? S::HEADS + S::KV_HEADS + kv : is_key ? S::HEADS + kv : head0 + warp;
      head = take_head<D, TAGGED>(p.qkv, from, tag, lane);
    }
    if (is_value && slice.newest) {
#pragma unroll
      for (int i = 0; i < (D + 63) / 64; i++)
        if (i * 32 + lane < D / 2) ((u32*)shared.new_value)[i * 32 + lane] = head.pair[i];
    }
    if (warp < GROUP || (is_key && slice.newest))
      norm_and_rotate<D>(head, (const u16*)layer[is_key ? TOKEN_K_NORM : TOKEN_Q_NORM], angles, p.rotary_half, p.eps, is_key ? shared.new_key : shared.q[warp & (GROUP - 1)]);
  }
  __syncthreads();
  if (warp < used) {
    float top = -1e30f, sum = 0.f, shrink;
    float out[D / 8][2];
    u32 weights[2];
    int at = slice.begin + warp;
    weigh_half<S>(p, shared, slice, first_keys, at, r, c, top, sum, shrink, weights);
    const u32 a[4] = {weights[0], 0, weights[1], 0};
#pragma unroll
    for (int t = 0; t < D / 8; t++) {
      float acc[4] = {0.f, 0.f, 0.f, 0.f};
      mma(acc, a, first_values.v[t].x, first_values.v[t].y);
      out[t][0] = acc[0]; out[t][1] = acc[1];
    }
#pragma unroll 1
    while ((at += WARPS) < slice.end) {
      const u8* page = (const u8*)(p.pages[at / 4] + layer_bytes);
      HalfKeys<D> keys;
      HalfValues<D> values;
      keys.load(page, kv, at, r, c);
      weigh_half<S>(p, shared, slice, keys, at, r, c, top, sum, shrink, weights);
      values.load(page, S::KV_HEADS, kv, at, r, c);
      const u32 a[4] = {weights[0], 0, weights[1], 0};
#pragma unroll
      for (int t = 0; t < D / 8; t++) {
        float acc[4] = {out[t][0] * shrink, out[t][1] * shrink, 0.f, 0.f};
        mma(acc, a, values.v[t].x, values.v[t].y);
        out[t][0] = acc[0]; out[t][1] = acc[1];
      }
    }
    sum += __shfl_xor_sync(FULL, sum, 1);
    sum += __shfl_xor_sync(FULL, sum, 2);
    if (r < GROUP) {
      if (c == 0) { shared.maxima[warp][r] = top; shared.weights[warp][r] = sum; }
#pragma unroll
      for (int t = 0; t < D / 8; t++) *(float2*)&outs[(warp * GROUP + r) * D + t * 8 + c * 2] = make_float2(out[t][0], out[t][1]);
    }
  }
  if (warp >= WARPS - GROUP) {  // the new token's scores
    const int head = warp - (WARPS - GROUP);
    float s = -1e30f;
    if (slice.newest) {
      s = 0.f;
#pragma unroll
      for (int i = 0; i < D / 32; i++) s += to_float(shared.q[head][i * 32 + lane]) * to_float(shared.new_key[i * 32 + lane]);
      s = warp_sum(s) * p.scale;
    }
    if (lane == 0) { shared.maxima[WARPS][head] = s; shared.weights[WARPS][head] = slice.newest ? 1.f : 0.f; }
  }
  __syncthreads();
  if (tid < GROUP * D) {
    const int head = tid / D, d = tid % D;
    float highest = shared.maxima[WARPS][head];
    for (int w = 0; w < used; w++) highest = fmaxf(highest, shared.maxima[w][head]);
    const float newer = exp2f(shared.maxima[WARPS][head] - highest);
    float total = shared.weights[WARPS][head] * newer, y = slice.newest ? to_float(shared.new_value[d]) * newer : 0.f;
#pragma unroll 4
    for (int w = 0; w < used; w++) {
      const float f = exp2f(shared.maxima[w][head] - highest);
      total += shared.weights[w][head] * f;
      y += outs[(w * GROUP + head) * D + d] * f;
    }
    hand_over<TAGGED>(p.part_out, part * S::ATTENDED + place, y / total, tag);
    if (d == 0) hand_weight<TAGGED>(p.part_weights, part * S::HEADS + head0 + head, highest, total, tag);
  }
}

// -- x, on its way into shared memory ----------------------------------------------------------------------------------

// x times the norm's weight; what remains of the norm is one factor, the sums are multiplied with it later. RUNS: of eight, of a thread.
template <int BITS, bool SYM, bool TAGGED, int K, int RUNS, int THREADS>
DEVICE void stage_for_norm(const void* x, u32 tag, const u16* plain, const uint4 (&weight)[RUNS], u8* digits, float4* inputs, float* squares) {
  const int tid = this_thread(), lane = tid % 32;
  EightGiven<TAGGED> mine[RUNS];
  take<TAGGED, K, RUNS, THREADS>(x, tag, plain, tid, mine);
  if (TAGGED) __syncwarp();
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int at = (i * THREADS + tid) * 8;
    if (at - lane * 8 >= K) break;
    float v[8], w[8];
    mine[i].numbers(v);
    eight_halves(weight[i], w);
#pragma unroll
    for (int j = 0; j < 8; j++) { sum += v[j] * v[j]; v[j] = at < K ? v[j] * w[j] : 0.f; }
    run_digits<BITS, SYM, 1, 2>(v, at, at < K, digits, inputs);
  }
  sum = warp_sum(sum);
  if (lane == 0) squares[tid / 32] = sum;
  __syncthreads();
}

template <int BITS, bool SYM, bool TAGGED, int K, int THREADS> DEVICE void stage_as_it_is(const void* x, u32 tag, u8* digits, float4* inputs) {
  constexpr int RUNS = (K + THREADS * 8 - 1) / (THREADS * 8);
  const int tid = this_thread(), lane = tid % 32;
  EightGiven<TAGGED> mine[RUNS];
  take<TAGGED, K, RUNS, THREADS>(x, tag, nullptr, tid, mine);
  if (TAGGED) __syncwarp();
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int at = (i * THREADS + tid) * 8;
    if (at - lane * 8 >= K) break;
    float v[8];
    mine[i].numbers(v);
    run_digits<BITS, SYM, 1, 2>(v, at, at < K, digits, inputs);
  }
  __syncthreads();
}

// The parts of an attention, by what each of them weighs.
template <int BITS, bool SYM, class S, bool TAGGED, class Shared>
DEVICE void stage_parts(const WholeTokenArguments& p, Shared& shared, int active, u32 tag, const u8* heads_of, u8* digits, float4* inputs) {
  constexpr int K = S::ATTENDED, RUNS = (K + S::THREADS * 8 - 1) / (S::THREADS * 8), PARTS = S::PARTS, WIDTH = TAGGED ? 4 : 2;
  const int tid = this_thread(), lane = tid % 32;
  const u8* parts = (const u8*)p.part_out;
  EightGiven<TAGGED> early[4];
#pragma unroll
  for (int i = 0; i < 4; i++) early[i].load(parts + (size_t)i * K * WIDTH, tid * 8, tid * 8 < K && i < active);
  for (int at = tid; at < S::HEADS * PARTS; at += S::THREADS) {
    const int head = at / PARTS, part = at % PARTS;
    const float2 own = part < active ? take_weight<TAGGED>(p.part_weights, part * S::HEADS + head, tag) : make_float2(-1e30f, 0.f);
    if (TAGGED) __syncwarp();
    float highest = own.x;
#pragma unroll
    for (int i = PARTS / 2; i; i >>= 1) highest = fmaxf(highest, __shfl_xor_sync(FULL, highest, i));
    const float weight = own.y * exp2f(own.x - highest);
    float total = weight;
#pragma unroll
    for (int i = PARTS / 2; i; i >>= 1) total += __shfl_xor_sync(FULL, total, i);
    shared.factors[part][head] = weight / total;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int at = (i * S::THREADS + tid) * 8;
    if (at - lane * 8 >= K) break;
    float v[8] = {}, x[8];
    const uint2 heads = at < K ? __ldg((const uint2*)(heads_of + at)) : make_uint2(0, 0);
#pragma unroll 1
    for (int first = 0; first < active; first += 4) {
      if (i || first) {
#pragma unroll
        for (int j = 0; j < 4; j++) early[j].load(parts + (size_t)(first + j) * K * WIDTH, at, at < K && first + j < active);
      }
      if (TAGGED) {
        Patience patience = {0, 0};
#pragma unroll
        for (int j = 0; j < 4; j++)
          while (at < K && first + j < active && !early[j].here(tag)) {
            early[j].load(parts + (size_t)(first + j) * K * WIDTH, at, true);
            patience.again();
          }
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (first + j >= active) break;
        early[j].numbers(x);
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] += x[e] * shared.factors[first + j][(e < 4 ? heads.x : heads.y) >> (e % 4 * 8) & 0xff];
      }
    }
    if (TAGGED) __syncwarp();
    run_digits<BITS, SYM, 1, 2>(v, at, at < K, digits, inputs);
  }
  __syncthreads();
}

// -- the kernel --------------------------------------------------------------------------------------------------------

template <int BITS, bool SYM, int BATCH, int STAGES, class S, int KIND, int LEAST, int OPTIONS> DEVICE void whole_token(const WholeTokenArguments& p) {
  typedef TokenStream<BITS, SYM, BATCH, STAGES, S, OPTIONS> Stream;
  constexpr int WARPS = S::WARPS, THREADS = S::THREADS, D = S::D, RUNS = (S::HIDDEN + THREADS * 8 - 1) / (THREADS * 8);
  constexpr bool COPIES = !(OPTIONS & NO_COPIES), TRACE = OPTIONS & TRACED, TAG = KIND == TAGGED_NUMBERS;
  __shared__ TokenShared<S> shared;
  __shared__ __align__(8) u64 full[WARPS * STAGES];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  u8* x = (u8*)shared_words + WARPS * STAGES * Stream::SLOT;
  u8* digits = x;
  float* outs = (float*)x;
  float* sums = (float*)(x + S::X_BYTES);
  u64* table = (u64*)(sums + S::SUMS);

  if (tid < WARPS * STAGES) slot_barrier(full + tid, 1);
  for (int i = tid; i < p.layers * TOKEN_LAYER; i += THREADS) table[i] = p.table[i];
  if (tid < WARPS) {
    shared.plans[QKV * WARPS + tid] = plan_of_warp<typename S::Qkv, Stream::CHUNK_BYTES, Stream::SCALE_BYTES>(tid);
    shared.plans[O * WARPS + tid] = plan_of_warp<typename S::Out, Stream::CHUNK_BYTES, Stream::SCALE_BYTES>(tid);
    shared.plans[GATE_UP * WARPS + tid] = plan_of_warp<typename S::GateUp, Stream::CHUNK_BYTES, Stream::SCALE_BYTES>(tid);
    shared.plans[DOWN * WARPS + tid] = plan_of_warp<typename S::Down, Stream::CHUNK_BYTES, Stream::SCALE_BYTES>(tid);
  }
  show_barriers();
  __syncthreads();
  Stream stream = {(u8*)shared_words + warp * STAGES * Stream::SLOT, full + warp * STAGES, shared.next + warp, shared.plans + warp, table, p.layers};
  if (lane == 0) {
    stream.next->slot = stream.next->owed = 0;
    stream.begin_role(0, 0);
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) stream.fetch(0);
  }
  wait_for_previous_kernel();

  Meeting<S::BLOCKS, KIND, (OPTIONS & NO_MEETING) != 0> meeting = {p.counters, 0};
  const u32 launches = TAG ? __ldcg(p.counters) * p.layers + 1 : 0;
  const int position = p.positions[0], kv = blockIdx.x % S::KV_HEADS, part = blockIdx.x / S::KV_HEADS;
  const int row = blockIdx.x * S::Out::OF_BLOCK * TILE + tid;  // of the residual
  const bool owner = tid < S::Out::OF_BLOCK * TILE && row < S::HIDDEN;
  float residual = owner ? __ldcg(p.residual + row) : 0.f;
  const int magic[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
  int slot = 0;
  u32 parity = 0;
  u64* trace = TRACE ? p.trace + (size_t)blockIdx.x * p.layers * 20 : nullptr;
  auto note = [&]() { if (TRACE && tid == 0) *trace++ = cycles(); };

#pragma unroll 1
  for (int turn = 0; turn < p.layers * 4; turn++) {
    const int tid = this_thread(), lane = tid % 32, warp = tid / 32, role = turn & 3;
    const u64* layer = table + (turn >> 2) * TOKEN_LAYER;
    const TokenPlan own = shared.plans[role * WARPS + warp];
    const int window = (int)layer[TOKEN_WINDOW];
    const u32 tag = launches + (turn >> 2), tag16 = tag & 0xffff;
    // What is not written in this launch is on its way before the blocks meet.
    uint4 norm[RUNS];
    int place = 0;
    if (role == QKV || role == GATE_UP) {
      const u16* weight = (const u16*)layer[role == QKV ? TOKEN_INPUT_NORM : TOKEN_POST_NORM];
#pragma unroll
      for (int i = 0; i < RUNS; i++) {
        const int at = (i * THREADS + tid) * 8;
        norm[i] = at < S::HIDDEN ? __ldg((const uint4*)(weight + at)) : make_uint4(0, 0, 0, 0);
      }
    } else if (owner) {
      place = __ldg((const int*)layer[role == O ? TOKEN_PLACE_O : TOKEN_PLACE_DOWN] + row);
    }
    if (role == QKV && !(OPTIONS & NO_ATTENTION)) {  // keys and values of this block, into the L2
      const TokenSlice slice = token_slice<S::PARTS, LEAST>(position, window, part);
      const int at = slice.begin + warp;
      if (part < slice.active && at < slice.end) {
        typedef PageLayout<D, false> Layout;
        const u8* page = (const u8*)(p.pages[at / 4] + (u64)(turn >> 2) * p.layer_bytes);
        for (int i = lane; i < 16 * D * 2 / 128; i += 32) prefetch_to_l2(page + Layout::key(kv, at % 4 * 16) + i * 128);
        for (int i = lane; i < D; i += 32) prefetch_to_l2(page + Layout::value(S::KV_HEADS, kv, i) + at % 4 * 32);
      }
    }
    const int of_block = role == QKV ? S::Qkv::OF_BLOCK : role == O ? S::Out::OF_BLOCK : role == GATE_UP ? S::GateUp::OF_BLOCK : S::Down::OF_BLOCK;
    const int tiles = role == QKV ? S::Qkv::TILES : role == GATE_UP ? S::GateUp::TILES : S::Out::TILES;
    if (turn) meeting.wait();
    note();
    // Who makes nothing reads nothing: no one would wait until it has.
    if ((OPTIONS & NO_STAGING) || blockIdx.x * of_block >= tiles) __syncthreads();
    else if (role == QKV || role == GATE_UP)
      stage_for_norm<BITS, SYM, TAG, S::HIDDEN, RUNS, THREADS>(role == QKV ? TAG ? p.x_given : (const u32*)p.x : (const u32*)p.x_mlp, role == QKV ? (tag - 1) & 0xffff : tag16, TAG && turn == 0 ? p.x : nullptr, norm, digits, (float4*)(x + S::HIDDEN * 2), shared.squares);
    else if (role == O)
      stage_parts<BITS, SYM, S, TAG>(p, shared, token_slice<S::PARTS, LEAST>(position, window, part).active, tag16, (const u8*)layer[TOKEN_HEADS_OF], digits, (float4*)(x + S::ATTENDED * 2));
    else stage_as_it_is<BITS, SYM, TAG, S::INNER, THREADS>(p.inner, tag16, digits, (float4*)(x + S::INNER * 2));
    note();

    // the product: of each tile the sums of this warp's chunks
    const int ks = role == QKV ? S::Qkv::KS : role == O ? S::Out::KS : role == GATE_UP ? S::GateUp::KS : S::Down::KS;
    const int per = role == QKV ? S::Qkv::PER : role == O ? S::Out::PER : role == GATE_UP ? S::GateUp::PER : S::Down::PER;
    const int k = role == O ? S::ATTENDED : role == DOWN ? S::INNER : S::HIDDEN;
    {
      const bool holds_digits = (lane & 20) == 0;
      const int turns = own.counts & 0xffff, chunks = own.counts >> 16, first = warp % ks * per;
      const u8* digits_of = digits + first * CHUNK * 2 + (lane / 8 * 4 + lane % 4) * 16;
      const float4* inputs_of = (const float4*)(x + k * 2) + first + lane % 2;
      float* to = sums + warp * TILE + lane / 4;
      uint4 pieces[2][2] = {};  // a column of high digits and one of low ones; the others stay zero
      if ((OPTIONS & WITHIN_PRODUCTS) && lane == 0)
        for (int i = stream.next->owed; i; i--) { stream.next->owed--; stream.fetch(turn); }
#pragma unroll 1
      for (int i = 0; i < turns; i++, to += WARPS * TILE) {
        float sum = 0.f, sum8 = 0.f;
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; chunk += BATCH) {
          const u8* words = stream.ring + slot * Stream::SLOT;
          if (COPIES) wait_for_slot(stream.full + slot, parity);
          if (!(OPTIONS & NO_PRODUCTS)) {
#pragma unroll
            for (int j = 0; j < BATCH; j += 2) {
              if (chunk + j < chunks) {
                uint4 (&b)[2] = pieces[j / 2 % 2];
                if (holds_digits) {
                  b[0] = *(const uint4*)(digits_of + (chunk + j) * CHUNK * 2);
                  b[1] = *(const uint4*)(digits_of + (chunk + j + 1) * CHUNK * 2);
                }
                multiply_digits<BITS, SYM, 1, 2>(words + j * Stream::CHUNK_BYTES, words + BATCH * Stream::CHUNK_BYTES + j / 2 * Stream::SCALE_BYTES, inputs_of + chunk + j, b, magic, lane, sum, sum8);
              }
            }
          }
          __syncwarp();
          if (lane == 0) stream.fetch(turn);
          if (++slot == STAGES) { slot = 0; parity ^= 1; }
        }
        sum += __shfl_xor_sync(FULL, sum, 1);
        sum8 += __shfl_xor_sync(FULL, sum8, 1);
        if (lane % 4 == 0) { to[0] = sum; to[8] = sum8; }
      }
    }
    __syncthreads();
    note();

    // the sums of the warps that share a tile, and what becomes of them
    float factor = 1.f;
    if (role == QKV || role == GATE_UP) {
      float squares = 0.f;
#pragma unroll
      for (int i = 0; i < WARPS; i++) squares += shared.squares[i];
      factor = rsqrtf(squares / S::HIDDEN + p.eps);
    }
#pragma unroll 1
    for (int at = tid; at - lane < of_block * TILE; at += THREADS) {
      const int tile = blockIdx.x * of_block + at / TILE;
      float y = 0.f;
      const bool there = at < of_block * TILE && tile < tiles;
      if (there) {
        const float* from = sums + at / TILE * ks * TILE + at % TILE;
#pragma unroll 4
        for (int i = 0; i < ks; i++) y += from[i * TILE];
      }
      y *= factor;
      if (role == QKV) {
        const u16* bias = (const u16*)layer[TOKEN_BIAS];
        if (there) hand_over<TAG>(p.qkv, tile * TILE + at % TILE, bias ? y + to_float(bias[tile * TILE + at % TILE]) : y, tag16);
      } else if (role == GATE_UP) {
        const float up = __shfl_xor_sync(FULL, y, 8);
        if (there && at % TILE < 8) hand_over<TAG>(p.inner, tile * 8 + at % TILE, y / (1.f + __expf(-y)) * up, tag16);
      } else if (there) {  // at is tid
        residual += y;
        if (turn + 1 == p.layers * 4) p.x_head[place] = to_half(residual);
        else hand_over<TAG>(role == O ? p.x_mlp : TAG ? (void*)p.x_given : p.x, place, residual, tag16);
      }
    }
    if (turn + 1 == p.layers * 4) break;
    meeting.arrive();
    note();

    if (role == QKV) {
      const TokenSlice slice = token_slice<S::PARTS, LEAST>(position, window, part);
      const bool attends = !(OPTIONS & NO_ATTENTION) && part < slice.active;
      const u64 layer_bytes = (u64)(turn >> 2) * p.layer_bytes;
      Angles<D> angles;
      int out = 0;
      if (attends) {
        angles = load_angles<D>(p.cosines + (size_t)position * p.rotary_half, p.sines + (size_t)position * p.rotary_half, p.rotary_half);
        if (tid < S::GROUP * D) out = __ldg((const int*)layer[TOKEN_PLACE_HEADS] + kv * S::GROUP * D + tid);
      }
      meeting.wait();
      note();
      if (attends) attend_part<S, TAG>(p, shared, outs, slice, layer, angles, out, layer_bytes, kv, part, tag16);
      else if (TAG && part < S::PARTS && tid < S::GROUP * D) {  // no tag of long ago stays where a part may be
        tell((u32*)p.part_out + part * S::ATTENDED + __ldg((const int*)layer[TOKEN_PLACE_HEADS] + kv * S::GROUP * D + tid), tag16 << 16);
        if (tid < S::GROUP) hand_weight<TAG>(p.part_weights, part * S::HEADS + kv * S::GROUP + tid, -1e30f, 0.f, tag16);
      }
      meeting.arrive();
      note();
      if (attends && slice.newest && warp < 2) {  // no one reads it in this launch
        u8* page = (u8*)(p.pages[position / PAGE_TOKENS] + layer_bytes);
        store_in_page<D, false>(warp ? shared.new_value : shared.new_key, page, S::KV_HEADS, kv, position % PAGE_TOKENS, warp);
      }
    }
  }
  meeting.leave();
}
