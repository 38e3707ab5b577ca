// What kernels take for granted on a GPU, with a fiber of one thread for each lane: it runs until it waits for others. For kernels
// that copy, multiply and exchange within the blocks of one cluster at a time. common.cu is replaced by this file.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>
#include <ucontext.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint2 { u32 x, y; };
struct int2 { int x, y; };
struct float2 { float x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define DEVICE static inline __attribute__((unused))
#define METHOD inline
#define FULL 0xffffffffu
#define __CUDA_ARCH__ 900
#undef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#define __expf expf
#define pause() ((void)0)
using std::max;
using std::min;
enum { PLAIN, FLOAT, SILU, RESIDUAL, BFLOAT, GATED, GATED_BFLOAT, ACTIVE, ACTIVE_BFLOAT };

// -- lanes, warps, blocks of a cluster ----------------------------------------------------------------------------------

struct Size { u32 x = 1, y = 1, z = 1; };
static Size threadIdx = {0, 0, 0}, blockIdx = {0, 0, 0}, blockDim, gridDim;  // threadIdx, blockIdx: of the lane that runs
static uint4* shared_words;

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 17);
  bool ended = false;
  int turn_of_cluster = 0;  // when it arrived
};
static std::vector<std::unique_ptr<Lane>> lanes;
static Lane* own_lane;
static ucontext_t scheduler;
static bool moved;  // a lane ended or passed a meeting since all were asked last
static void others() { swapcontext(&own_lane->context, &scheduler); }

struct Meeting {
  int size = 0, arrived = 0, turn = 0;
  int arrive() {
    const int own = turn;
    if (++arrived == size) { arrived = 0; turn++; moved = true; }
    return own;
  }
  void wait(int own) {
    while (turn == own) others();
  }
  void wait() { wait(arrive()); }
};
struct Warp {
  Meeting meeting{32};
  u32 shown[32], a[32][4], b[32][2];
};
struct Block {
  std::vector<uint4> shared = std::vector<uint4>(1 << 14, uint4{FULL, FULL, FULL, FULL});
  std::vector<Warp> warps;
  Meeting whole, named[16];
};
static std::vector<Block> blocks_of_cluster;
static Block* own_block;
static Meeting whole_cluster;

static Warp& own_warp() { return own_block->warps[threadIdx.x / 32]; }
static void __syncthreads() { own_block->whole.wait(); }
static void __syncwarp() { own_warp().meeting.wait(); }
static void named_barrier(int number, int) { own_block->named[number].wait(); }
static void arrive_at_cluster() { own_lane->turn_of_cluster = whole_cluster.arrive(); }
static void wait_for_cluster() { whole_cluster.wait(own_lane->turn_of_cluster); }
template <int PER> static void add_of_block(const float* at, int rank, float (&y)[PER]) {
  const float* there = (const float*)blocks_of_cluster[rank].shared.data() + (at - (const float*)shared_words);
  for (int j = 0; j < PER; j++) y[j] += there[j];
}


// A number for another block, counted by a barrier that knows how many bytes will come. An address: the block's number, then a byte of it.
static u32 shared_of(const void* at, int block) { return (u32)block << 24 | (u32)((const u8*)at - (const u8*)shared_words); }
static u32 shared_at(const void* at) { return shared_of(at, own_block - blocks_of_cluster.data()); }
static u8* memory_at(u32 at) { return (u8*)blocks_of_cluster[at >> 24].shared.data() + (at & 0xffffff); }
static void slot_barrier(u64* barrier, int) { *barrier = 0; }
static void show_barriers() {}
static void expect_bytes(u64* barrier, int bytes) { *barrier += bytes; }
static void begin_in_cluster() { arrive_at_cluster(); }
template <class T> static void send(u32 at, T v, u32 barrier) {
  memcpy(memory_at(at), &v, sizeof v);
  u64* left = (u64*)memory_at(barrier);
  if (*left < sizeof v) { fprintf(stderr, "more is sent than is waited for\n"); abort(); }
  *left -= sizeof v;
  moved = true;
}
static void wait_for_sent(u64* barrier) {
  while (*barrier) others();
}

static void (*run_lane)();
static void lane_begins() {
  run_lane();
  own_lane->ended = moved = true;
  others();
}

// The blocks, or clusters of them, one after the other. `team`: threads that meet at a named barrier.
template <class Kernel> static void launch(int blocks, int threads, int team, Kernel& kernel, int cluster = 1) {
  static Kernel* now;
  now = &kernel;
  run_lane = [] { (*now)(); };
  blockDim.x = threads;
  gridDim.x = blocks;
  for (int first = 0; first < blocks; first += cluster) {
    blocks_of_cluster.assign(cluster, Block());
    for (auto& block : blocks_of_cluster) {
      block.warps.assign(threads / 32, Warp());
      block.whole = {threads};
      for (auto& each : block.named) each = {team};
    }
    whole_cluster = {threads * cluster};
    lanes.clear();
    for (int i = 0; i < threads * cluster; i++) {
      lanes.push_back(std::make_unique<Lane>());
      Lane& lane = *lanes.back();
      getcontext(&lane.context);
      lane.context.uc_stack.ss_sp = lane.stack.data();
      lane.context.uc_stack.ss_size = lane.stack.size();
      makecontext(&lane.context, lane_begins, 0);
    }
    for (bool left = true; left;) {
      left = moved = false;
      for (int i = 0; i < threads * cluster; i++) {
        own_lane = lanes[i].get();
        if (own_lane->ended) continue;
        threadIdx.x = i % threads;
        blockIdx.x = first + i / threads;
        own_block = &blocks_of_cluster[i / threads];
        shared_words = own_block->shared.data();
        swapcontext(&scheduler, &own_lane->context);
        left = left || !lanes[i]->ended;
      }
      if (left && !moved) { fprintf(stderr, "lanes wait for each other\n"); abort(); }
    }
  }
}

template <class T> static T shown_by(T v, int lane) {
  static_assert(sizeof(T) == 4);
  Warp& warp = own_warp();
  memcpy(&warp.shown[threadIdx.x % 32], &v, 4);
  __syncwarp();
  memcpy(&v, &warp.shown[lane % 32], 4);
  __syncwarp();
  return v;
}
template <class T> static T __shfl_xor_sync(u32, T v, int bits) { return shown_by(v, threadIdx.x % 32 ^ bits); }
template <class T> static T __shfl_sync(u32, T v, int lane) { return shown_by(v, lane); }
static int __all_sync(u32, int) { abort(); }
DEVICE float warp_sum(float v) {
  for (int at = 16; at; at >>= 1) v += __shfl_xor_sync(FULL, v, at);
  return v;
}

// -- numbers -----------------------------------------------------------------------------------------------------------

static inline float __int_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
static inline int __float_as_int(float f) { int v; memcpy(&v, &f, 4); return v; }
static inline int __float2int_rn(float f) { return (int)nearbyintf(f); }
static inline float rsqrtf(float f) { return 1.f / sqrtf(f); }
static inline u32 __byte_perm(u32 a, u32 b, u32 choice) {
  const u64 both = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) r |= (u32)(both >> (choice >> 4 * i & 7) * 8 & 255) << 8 * i;
  return r;
}
DEVICE float to_float(u16 h) { _Float16 f; memcpy(&f, &h, 2); return f; }
DEVICE u16 to_half(float f) { const _Float16 h = fminf(fmaxf(f, -65504.f), 65504.f); u16 r; memcpy(&r, &h, 2); return r; }
DEVICE float from_bfloat(u16 b) { return __int_as_float((u32)b << 16); }
DEVICE u16 to_bfloat(float f) {
  const u32 bits = __float_as_int(f);
  return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
DEVICE u32 pair(u16 low, u16 high) { return (u32)low | (u32)high << 16; }
DEVICE u32 to_half2(float low, float high) { return pair(to_half(low), to_half(high)); }
DEVICE float low_of(u32 h2) { return to_float((u16)h2); }
DEVICE float high_of(u32 h2) { return to_float((u16)(h2 >> 16)); }
DEVICE u32 sub2(u32 a, u32 b) { return to_half2(low_of(a) - low_of(b), high_of(a) - high_of(b)); }
DEVICE u32 mul2(u32 a, u32 b) { return to_half2(low_of(a) * low_of(b), high_of(a) * high_of(b)); }
DEVICE u32 fma2(u32 a, u32 b, u32 c) { return to_half2(fmaf(low_of(a), low_of(b), low_of(c)), fmaf(high_of(a), high_of(b), high_of(c))); }
DEVICE u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
DEVICE float larger(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : max(a, b); }
DEVICE float further(float a, float b) { return copysignf(larger(fabsf(a), fabsf(b)), std::signbit(a) == std::signbit(b) ? 1.f : -1.f); }

// -- the matrix unit, as PTX says which lane has what (m16n8k16 of fp16, m16n8k32 of bytes) ------------------------------------------------

DEVICE const Warp& with_fragments(const u32 (&a)[4], u32 b0, u32 b1) {  // of all lanes
  Warp& warp = own_warp();
  const int lane = threadIdx.x % 32;
  memcpy(warp.a[lane], a, sizeof a);
  warp.b[lane][0] = b0;
  warp.b[lane][1] = b1;
  __syncwarp();
  return warp;
}
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const Warp& warp = with_fragments(a, b0, b1);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; k++) {
      const u32 left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], right = warp.b[column * 4 + k % 8 / 2][k / 8];
      sum += (double)to_float(left >> k % 2 * 16) * to_float(right >> k % 2 * 16);
    }
    c[i] = (float)sum;
  }
  __syncwarp();
}
DEVICE void mma_bytes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, const int (&from)[4]) {
  const Warp& warp = with_fragments(a, b0, b1);
  const int lane = threadIdx.x % 32;
  int sums[4];
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    sums[i] = from[i];
    for (int k = 0; k < 32; k++) {
      const u32 left = warp.a[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2], right = warp.b[column * 4 + k % 16 / 4][k / 16];
      sums[i] += (int)(u8)(left >> k % 4 * 8) * (signed char)(right >> k % 4 * 8);
    }
  }
  __syncwarp();
  memcpy(c, sums, sizeof sums);
}
DEVICE int sum_bytes(u32 four, int more) {
  for (int i = 0; i < 4; i++) more += (signed char)(four >> 8 * i);
  return more;
}
template <int LANES> DEVICE u32 largest(u32 v) {
  for (int at = 16; at; at >>= 1)
    if (LANES & at) v = max(v, __shfl_xor_sync(FULL, v, at));
  return v;
}
template <int LANES> DEVICE int added(int v) {
  for (int at = 16; at; at >>= 1)
    if (LANES & at) v += __shfl_xor_sync(FULL, v, at);
  return v;
}

// -- memory: every copy is made at once --------------------------------------------------------------------------------

template <class T> static T __ldg(const T* p) { return *p; }
template <class T> static T __ldcg(const T* p) { return *p; }
DEVICE uint4 stream4(const void* p) { return *(const uint4*)p; }
DEVICE uint2 stream2(const void* p) { return *(const uint2*)p; }
DEVICE u32 stream1(const void* p) { return *(const u32*)p; }
DEVICE void prefetch_to_l2(const void*) {}
DEVICE void prefetch_run(const void*, u32) {}
template <int BYTES> DEVICE void copy_async(const void* from, void* to) { memcpy(to, from, BYTES); }
DEVICE void commit_copies() {}
template <int PENDING> DEVICE void wait_for_copies() {}
DEVICE void wait_for_previous_kernel() {}
DEVICE void allow_next_kernel_to_start() {}
