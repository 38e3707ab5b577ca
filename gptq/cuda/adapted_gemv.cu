// A LoRA adapter inside the product of one row, y += s B (A x): the product's own launch makes t = s A x and adds B t to its sums.
//
// As soon as x is staged, some blocks multiply it with a row of A each, and leave a number in `t`. The warp that adds a tile's sums
// takes t from there. Before the step every number of t is MISSING, so each says itself whether it has come, and nothing else
// has to be waited for. A warp that waits too long makes all of t itself, in the same order, so the launch ends whichever blocks run
// at the same time, and the bits are the same every time.

struct AdapterEntry {  // of a layer's product, see cuda_adapter.py
  u64 a;  // fp16 [rank][padded], fragment order of the product's input
  u64 b;  // fp16 [n][most], the outputs in the order of the product's rows, of each the ranks of its own layer
  int rank;  // of all layers of the product together
  int most;  // the largest rank of one of them, rounded up to 8 with zeros
  int ends[2];  // outputs of the first layer, of the first two (not gated); of gates and ups `first[1]` is the ups'
  int first[3];  // rank at which each layer begins; `rank` for those that the product has not
  float scale;
};

#define MISSING 0xffffffffu  // a NaN that no sum is
#define PATIENCE 1000        // tries (of a microsecond) until a warp makes t itself

DEVICE u32 load_relaxed(const u32* p) {
  u32 v; asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v;
}
DEVICE void store_relaxed(u32* p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }

// A product without an adapter: nothing is done.
template <int RUNS, int EPILOGUE, class Arguments> struct Adapting {
  METHOD Adapting(const Arguments&) {}
  METHOD void begin(int, bool) {}
  METHOD void make_share(const u16*, float*) {}
  METHOD void begin_tile(int, bool) {}
  METHOD float of_tile(int, const u16*) { return 0.f; }
  METHOD void end() {}
};

// RUNS: runs of 8 inputs that a thread takes of a row of A. The entry is read again where it is needed: registers that stay taken
// keep the next kernel from beginning early.
template <int RUNS, int EPILOGUE> struct Adapting<RUNS, EPILOGUE, AdaptedGemvArguments> {
  static_assert(RUNS > 0, "a row has inputs");
  static constexpr int RANKS = 16;  // taken together in a tile: a lane has half of them for its output

  const AdaptedGemvArguments& p;
  uint4 held[RUNS];  // of A
  uint4 b;           // of the lane's output, its half of the ranks
  float t;           // of the lane's rank
  bool there;        // every lane's t

  METHOD Adapting(const AdaptedGemvArguments& given) : p(given), b(make_uint4(0, 0, 0, 0)), t(0.f), there(false) {}
  METHOD AdapterEntry entry() const {
    static_assert(sizeof(AdapterEntry) == 48, "three words of 16 bytes");
    AdapterEntry e;
#pragma unroll
    for (int i = 0; i < 3; i++) {
      uint4& w = ((uint4*)&e)[i];
      asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"((const uint4*)p.adapter + i));
    }
    return e;
  }

  // -- t: a block's row of A -----------------------------------------------------------------------------------------------
  METHOD void load_row(const AdapterEntry& e, int row, int thread) {
    const int padded = p.chunks * CHUNK;
#pragma unroll
    for (int i = 0; i < RUNS; i++) {
      const int at = (i * blockDim.x + thread) * 8;
      held[i] = at < padded ? stream4((const u16*)e.a + (size_t)row * padded + at) : make_uint4(0, 0, 0, 0);
    }
  }
  METHOD float times_x(const u16* xs, int thread) const {  // the sum of a warp
    const int padded = p.chunks * CHUNK;
    float low = 0.f, high = 0.f;
#pragma unroll
    for (int i = 0; i < RUNS; i++) {
      const int at = (i * blockDim.x + thread) * 8;
      if (at < padded) {
        const uint4 x = *(const uint4*)(xs + at);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const u32 va = (&held[i].x)[j], vx = (&x.x)[j];
          low += low_of(va) * low_of(vx);
          high += high_of(va) * high_of(vx);
        }
      }
    }
    return warp_sum(low + high);
  }
  METHOD void leave(int row, float of_warp, float scale) {  // lane i: the sum of warp i
    const float sum = warp_sum(of_warp) * scale;
    if (threadIdx.x % 32 == 0) store_relaxed((u32*)p.t + row, sum == sum ? __float_as_int(sum) : 0x7fffffff);
  }
  METHOD void make_share(const u16* xs, float* scratch) {  // scratch: 32 floats
    const AdapterEntry e = entry();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int row = blockIdx.x; row < e.rank; row += gridDim.x) {
      if (row != blockIdx.x) {
        __syncthreads();
        load_row(e, row, threadIdx.x);
      }
      const float sum = times_x(xs, threadIdx.x);
      if (lane == 0) scratch[warp] = sum;
      __syncthreads();
      if (warp == blockDim.x / 32 - 1) leave(row, lane <= warp ? scratch[lane] : 0.f, e.scale);
    }
  }
  METHOD void make_all(const AdapterEntry& e, const u16* xs) {  // by one warp
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = 0; row < e.rank; row++) {
      float mine = 0.f;
#pragma unroll 1
      for (int warp = 0; warp < blockDim.x / 32; warp++) {
        load_row(e, row, warp * 32 + lane);
        const float sum = times_x(xs, warp * 32 + lane);
        if (lane == warp) mine = sum;
      }
      leave(row, mine, e.scale);
    }
  }

  // -- B t of a tile: lane l has output l % 16, and half of the ranks. Lanes below 16 take t of the first output's layer, the
  // others that of the last one's ------------------------------------------------------------------------------------
  METHOD void load_b(const AdapterEntry& e, int tile, int from) {
    const int lane = threadIdx.x % 32, n = tile * TILE + lane % TILE, rank = from + lane / TILE * (RANKS / 2);
    b = n < p.n && rank < e.most ? stream4((const u16*)e.b + (size_t)n * e.most + rank) : make_uint4(0, 0, 0, 0);
  }
  METHOD void take_t(const AdapterEntry& e, int tile, int from) {
    const int lane = threadIdx.x % 32, n = tile * TILE + lane / TILE * (TILE - 1);
    const int layer = EPILOGUE == SILU ? lane / TILE : (n >= e.ends[0]) + (n >= e.ends[1]);
    const int row = (layer == 0 ? e.first[0] : layer == 1 ? e.first[1] : e.first[2]) + from + lane % TILE;
    const bool has = row < (layer == 0 ? e.first[1] : layer == 1 ? e.first[2] : e.rank);
    const u32 word = has ? load_relaxed((const u32*)p.t + row) : 0u;
    t = __int_as_float(word);
    there = __all_sync(FULL, word != MISSING);
  }

  // Before the kernel waits for the previous one: nothing that it writes is read here. `adds`: the warp adds the first tile's sums.
  METHOD void begin(int tile, bool adds) {
    const AdapterEntry e = entry();
    if (blockIdx.x < e.rank) load_row(e, blockIdx.x, threadIdx.x);
    if (adds) load_b(e, tile, 0);
  }
  METHOD void begin_tile(int tile, bool first) {
    if (first) return;  // what the first tile needs of t is on its way
    const AdapterEntry e = entry();
    load_b(e, tile, 0);
    take_t(e, tile, 0);
  }
  METHOD float of_tile(int tile, const u16* xs) {
    const AdapterEntry e = entry();
    const int lane = threadIdx.x % 32, source = lane % TILE / 8 * TILE + lane / TILE * (RANKS / 2);
    float y = 0.f;
#pragma unroll 1
    for (int from = 0; from < e.most; from += RANKS) {
      if (from) {
        load_b(e, tile, from);
        there = false;
      }
#pragma unroll 1
      for (int tries = 0; !there; tries++) {
        if (tries == PATIENCE) make_all(e, xs);
        take_t(e, tile, from);
      }
#pragma unroll
      for (int j = 0; j < RANKS / 2; j++) {
        const u32 w = (&b.x)[j / 2];
        y += (j % 2 ? high_of(w) : low_of(w)) * __shfl_sync(FULL, t, source + j);
      }
    }
    there = false;
    return y + __shfl_xor_sync(FULL, y, TILE);
  }

  // The next product's entry, which it reads first of all.
  METHOD void end() {
    if (blockIdx.x == 0 && threadIdx.x < 2) prefetch_to_l2((const u8*)p.adapter + (threadIdx.x ? 95 : 48));
  }
};
