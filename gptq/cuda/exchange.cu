// Rows that the GPUs of one host share, which compute a model together: the sum of what all have, or what the first one has.
//
// Every GPU has a mailbox, which the others write to through NVLink or PCIe. Beside each word of four bytes goes the number of
// the turn: who waits for a word sees by itself that it has arrived, and no fence is needed. (The idea is NCCL's protocol LL.)
// Turns use two halves of a mailbox alternately: nobody is two turns ahead of who has not read yet, since a turn needs the words
// of all. The words are added in the order of the GPUs, so that all of them get the same bits.

// Whether the host has asked to stop, or another GPU is too late, now or in an earlier sum.
DEVICE bool is_given_up(const ExchangeArguments& p, u64 began) {
  u32 stop, lost;
  u64 now;
  asm volatile("ld.volatile.global.v2.u32 {%0,%1}, [%2];" : "=r"(stop), "=r"(lost) : "l"(p.flags) : "memory");
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return stop || lost || now - began > p.limit_ns;
}

template <class T> struct SumOfRuns {  // of four numbers
  static constexpr u32 LOST = 0x7fff7fffu;  // NaN in both types
  float sum[4] = {};
  __device__ void add(uint2 v) {
    sum[0] += T::wide((u16)v.x); sum[1] += T::wide((u16)(v.x >> 16));
    sum[2] += T::wide((u16)v.y); sum[3] += T::wide((u16)(v.y >> 16));
  }
  __device__ uint2 out() const { return make_uint2(pair(T::narrow(sum[0]), T::narrow(sum[1])), pair(T::narrow(sum[2]), T::narrow(sum[3]))); }
};
struct FirstRun {  // eight bytes
  static constexpr u32 LOST = 0;
  uint2 first = {};
  bool is_there = false;
  __device__ void add(uint2 v) {
    if (!is_there) first = v;
    is_there = true;
  }
  __device__ uint2 out() const { return first; }
};

template <class Together> DEVICE void exchange(const ExchangeArguments& p) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const u32 turn = __ldcg(p.turns + blockIdx.x) + 1;
  const size_t half = (size_t)(turn & 1) * p.ranks;
  if (at < p.runs) {
    const uint2 own = __ldcg((const uint2*)p.x + at);
    for (int i = 1; i < p.ranks; i++) {
      const int other = p.rank + i < p.ranks ? p.rank + i : p.rank + i - p.ranks;
      uint4* box = (uint4*)p.boxes[other] + (half + p.rank) * p.capacity + at;
      asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(box), "r"(own.x), "r"(turn), "r"(own.y), "r"(turn) : "memory");
    }
    u64 began;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(began));
    Together found;
    bool is_lost = false;
    for (int i = 0; i < p.ranks; i++) {
      uint2 v = own;
      if (i != p.rank) {
        const uint4* box = (const uint4*)p.boxes[p.rank] + (half + i) * p.capacity + at;
        u32 first, second, tries = 0;
        do {
          asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(first), "=r"(v.y), "=r"(second) : "l"(box) : "memory");
          is_lost = is_lost || (++tries % 1024 == 0 && is_given_up(p, began));
        } while (!is_lost && (first != turn || second != turn));
      }
      found.add(v);
    }
    uint2 out = found.out();
    if (is_lost) {
      out = make_uint2(Together::LOST, Together::LOST);
      asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(p.flags + 1), "r"(1) : "memory");
    }
    ((uint2*)p.x)[at] = out;
  }
  __syncthreads();
  if (threadIdx.x == 0) p.turns[blockIdx.x] = turn;
}

template <class T> DEVICE void sum_of_gpus(const ExchangeArguments& p) { exchange<SumOfRuns<T>>(p); }
template <class T> DEVICE void first_of_gpus(const ExchangeArguments& p) { exchange<FirstRun>(p); }
