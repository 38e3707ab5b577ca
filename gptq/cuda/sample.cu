// From logits to the next token, on the card: a block a row, the whole choice in one kernel.
//
// The order is that of transformers' generate: bias, penalties, temperature, top k, top p, min p, typical p. Every filter
// is a threshold, read off a sorted short list or found by bisection over the bits of a float; masses are added as
// integers, so their order cannot matter. The draw is the largest of logit + Gumbel noise (Gumbel-max: the same distribution as drawing from the
// softmax), noise a function of seed, position and token: the same in every run and beside any other row.

struct SampleParams {   // of one row, in device memory
  float temperature, top_p, min_p, typical_p;
  float repetition, presence, frequency, biased;
  int top_k, range, seed_low, seed_high;
};

struct SampleArguments {
  const float* logits;         // fp32 [rows][vocabulary], as the model gave them
  const SampleParams* params;  // [rows]
  const float* bias;           // fp32 [rows][vocabulary], read where `biased` is set
  u16 *seen, *answered;        // [rows][vocabulary]: how often in the penalties' range; in the answer within it
  int* history;                // [rows][context]: every token so far
  const int* answer_from;      // [rows]: position of the answer's first token
  float* work;                 // fp32 [rows][vocabulary]
  int *ids, *positions;        // [rows]: the token just computed and its position; left as the next ones
  volatile int* host_tokens;          // [rows][TOLD] in the host's memory: the token of position i at i % TOLD
  int vocabulary, context;
};

#define CANDIDATES 4096
#define BINS 2048
#define TOLD 64
#define ONE 1099511627776.f  // a mass of 1 as an integer: 2^40

DEVICE u32 key_of(float f) { u32 u = __float_as_uint(f); return u & 0x80000000u ? ~u : u | 0x80000000u; }  // keeps the order

DEVICE u64 block_sum_u64(u64 v, u64* scratch) {
#pragma unroll
  for (int at = 16; at; at >>= 1) v += __shfl_xor_sync(FULL, v, at);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  u64 total = 0;
  for (int i = 0; i < blockDim.x / 32; i++) total += scratch[i];
  __syncthreads();
  return total;
}

DEVICE u32 mix(u32 a, u32 b, u32 c, u32 d) {  // Jarzynski & Olano 2020, pcg4d: four counters to one well-mixed word
  a = a * 1664525u + 1013904223u; b = b * 1664525u + 1013904223u; c = c * 1664525u + 1013904223u; d = d * 1664525u + 1013904223u;
  a += b * d; b += c * a; c += a * b; d += b * c;
  a ^= a >> 16; b ^= b >> 16; c ^= c >> 16; d ^= d >> 16;
  a += b * d; b += c * a; c += a * b; d += b * c;
  return a;
}

extern "C" __global__ void __launch_bounds__(1024) sample(SampleArguments p) {
  __shared__ float list[CANDIDATES];
  __shared__ int permutation[CANDIDATES];
  __shared__ u32 bins[BINS];
  __shared__ u64 scratch[32];
  __shared__ float best_value[32];
  __shared__ int best_place[32], found_bin, filled;
  __shared__ float shared_max;
  const int tid = threadIdx.x, row = blockIdx.x, threads = blockDim.x, n = p.vocabulary;
  let_the_next_kernel_start();
  wait_for_the_kernel_ahead();
  const SampleParams params = p.params[row];
  const float* logits = p.logits + (size_t)row * n;
  const float* bias = p.bias + (size_t)row * n;
  u16 *seen = p.seen + (size_t)row * n, *answered = p.answered + (size_t)row * n;
  float* work = p.work + (size_t)row * n;
  const bool greedy = params.temperature == 0.f;
  const float cooler = greedy ? 1.f : 1.f / params.temperature;
  const bool penalties = params.repetition != 1.f, counts = params.presence != 0.f || params.frequency != 0.f;
  const int position = p.positions[row];

  auto largest = [&](float value, int place) {  // over the block; of equals the first
#pragma unroll
    for (int at = 16; at; at >>= 1) {
      const float other = __shfl_xor_sync(FULL, value, at);
      const int where = __shfl_xor_sync(FULL, place, at);
      if (other > value || (other == value && where < place)) { value = other; place = where; }
    }
    if (tid % 32 == 0) { best_value[tid / 32] = value; best_place[tid / 32] = place; }
    __syncthreads();
    for (int i = 0; i < threads / 32; i++)
      if (best_value[i] > value || (best_value[i] == value && best_place[i] < place)) { value = best_value[i]; place = best_place[i]; }
    if (tid == 0) shared_max = value;
    __syncthreads();
    return place;
  };

  float high = -INFINITY;
  int at_high = 0x7fffffff;
#pragma unroll 4
  for (int i = tid; i < n; i += threads) {
    float z = logits[i];
    if (params.biased != 0.f) z += bias[i];
    if (penalties && seen[i]) z = z < 0.f ? z * params.repetition : z / params.repetition;
    if (counts && answered[i]) z -= params.presence + params.frequency * answered[i];
    z *= cooler;
    work[i] = z;
    if (z > high) { high = z; at_high = i; }
  }
  int chosen = largest(high, at_high);
  const float peak = shared_max;
  __syncthreads();

  if (!greedy) {
    const bool by_k = params.top_k > 0 && params.top_k < n, by_p = params.top_p < 1.f, by_typical = params.typical_p < 1.f;
    const bool by_min = params.min_p > 0.f;
    const float floor = by_min ? peak + __logf(params.min_p) : -INFINITY;
    const float* source = work;
    int length = n;
    u64 everything = 0;  // the mass of the vocabulary, where top p needs it
    auto bin_of = [&](float z) { return min(BINS - 1, (int)((peak - z) * 64.f)); };  // 1/64 of an e-fold each, from the peak down

    // Whatever the first filter can keep is gathered into a short list, so that the bisections are short.
    if (by_k || by_p || by_min) {
      for (int i = tid; i < BINS; i += threads) bins[i] = 0;
      if (tid == 0) filled = 0;
      __syncthreads();
      int cut = BINS - 1;
      if (by_k || by_p) {
        u64 mass = 0;
        for (int i = tid; i < n; i += threads) {
          const float z = work[i];
          atomicAdd(&bins[bin_of(z)], 1);
          if (!by_k) mass += (u64)(__expf(z - peak) * ONE);
        }
        if (!by_k) everything = block_sum_u64(mass, scratch);
        __syncthreads();
        if (tid < 32) {  // a lane looks at 64 bins
          u32 mine = 0;
          for (int i = 0; i < BINS / 32; i++) mine += bins[tid * (BINS / 32) + i];
          u32 before = mine;
#pragma unroll
          for (int at = 1; at < 32; at <<= 1) { const u32 other = __shfl_up_sync(FULL, before, at); if (tid >= at) before += other; }
          before -= mine;
          int found = by_k ? BINS - 1 : -1;  // the first bin with top_k above its end; the last with a list's length above it
          u32 sum = before;
          for (int i = 0; i < BINS / 32; i++) {
            sum += bins[tid * (BINS / 32) + i];
            if (by_k && sum >= params.top_k) { found = tid * (BINS / 32) + i; break; }
            if (!by_k && sum <= CANDIDATES) found = tid * (BINS / 32) + i;
          }
#pragma unroll
          for (int at = 16; at; at >>= 1) { const int other = __shfl_xor_sync(FULL, found, at); found = by_k ? min(found, other) : max(found, other); }
          if (tid == 0) found_bin = found;
        }
        __syncthreads();
        cut = found_bin;
      }
      u64 mass = 0;
      for (int i = tid; i < n; i += threads) {
        const float z = work[i];
        if (by_k || by_p ? bin_of(z) > cut : z < floor) continue;
        const int place = atomicAdd(&filled, 1);
        if (place < CANDIDATES) { list[place] = z; permutation[place] = i; }
        mass += (u64)(__expf(z - peak) * ONE);
      }
      __syncthreads();
      bool enough = filled > 0 && filled <= CANDIDATES;
      if (by_p && !by_k) {  // top p may keep more than the list holds, where the distribution is flat
        mass = block_sum_u64(mass, scratch);
        enough = enough && (double)mass >= (double)params.top_p * (double)everything;
      }
      if (enough) { source = list; length = filled; }
      __syncthreads();
    }
    const bool near = source == list;
    u32 low = 0;  // keys below are dropped
    u32 strange = 0xffffffffu;  // typical p: how far from the expected surprise a kept token may be
    float expected = 0.f, log_all = 0.f;
    const bool brief = near && length <= threads && !by_typical;
    if (brief) {
      // Sorted, highest first, one candidate a thread; what stands before it is what is likelier.
      float z = tid < length ? list[tid] : -INFINITY;
      int token = tid < length ? permutation[tid] : 0x7fffffff;
      __syncthreads();
      for (int size = 2; size <= threads && size < 2 * length; size *= 2) {  // a bitonic network
        for (int apart = size / 2; apart; apart /= 2) {
          float other;
          int where;
          if (apart >= 32) {
            list[tid] = z; permutation[tid] = token;
            __syncthreads();
            other = list[tid ^ apart]; where = permutation[tid ^ apart];
            __syncthreads();
          } else {
            other = __shfl_xor_sync(FULL, z, apart);
            where = __shfl_xor_sync(FULL, token, apart);
          }
          const bool before = z > other || (z == other && token < where);
          const bool first = ((tid & apart) == 0) == ((tid & size) == 0);
          if (before != first) { z = other; token = where; }
        }
      }
      list[tid] = z; permutation[tid] = token;
      __syncthreads();
      bool kept = tid < length && (!by_k || z >= list[min(params.top_k, length) - 1]);
      if (by_p) {
        u64 mass = kept ? (u64)(__expf(z - peak) * ONE) : 0, before = mass;
#pragma unroll
        for (int at = 1; at < 32; at <<= 1) { const u64 other = __shfl_up_sync(FULL, before, at); if (tid % 32 >= at) before += other; }
        if (tid % 32 == 31) scratch[tid / 32] = before;
        __syncthreads();
        u64 all = 0;
        for (int i = 0; i < threads / 32; i++) { if (i < tid / 32) before += scratch[i]; all += scratch[i]; }
        if (!by_k) all = everything;
        before -= mass;
        kept = kept && (tid == 0 || (double)before < (double)params.top_p * (double)all);
      }
      if (by_min) kept = kept && (tid == 0 || z >= floor);
      if (!kept) list[tid] = -INFINITY;
      length = min(length, threads);
      __syncthreads();
    } else {
    auto mass_above = [&](u32 key, bool equal, u32 low) {  // of what is above `key` (or equal) and not below `low`
      u64 sum = 0;
      for (int i = tid; i < length; i += threads) {
        const u32 k = key_of(source[i]);
        if ((equal ? k >= key : k > key) && k >= low) sum += (u64)(__expf(source[i] - peak) * ONE);
      }
      return block_sum_u64(sum, scratch);
    };
    if (by_k) {
      u32 key = 0;
      for (int bit = 31; bit >= 0; bit--) {  // the largest key that still has top_k above it or equal
        const u32 tried = key | 1u << bit;
        u64 count = 0;
        for (int i = tid; i < length; i += threads) count += key_of(source[i]) >= tried;
        if (block_sum_u64(count, scratch) >= params.top_k) key = tried;
      }
      low = key;
    }
    if (by_p) {
      const u64 all = by_k ? mass_above(0, true, low) : everything;
      const u64 wanted = (u64)((double)params.top_p * (double)all);
      // the lowest key with less than the wanted mass above it
      u32 key = 0;
      for (int bit = 31; bit >= 0; bit--) {
        const u32 tried = key | ((1u << bit) - 1);  // can the threshold lie at or below this?
        if (mass_above(tried, false, low) >= max(wanted, (u64)1)) key |= 1u << bit;
      }
      low = max(low, key);
    }
    if (by_min) low = max(low, key_of(floor));
    low = min(low, key_of(peak));
    if (by_typical) {
      const u64 all = mass_above(0, true, low);
      log_all = __logf((float)((double)all / 1099511627776.0));
      float sum = 0.f;
      for (int i = tid; i < length; i += threads)
        if (key_of(source[i]) >= low) { const float l = source[i] - peak - log_all; sum -= __expf(l) * l; }
      expected = block_sum(sum, (float*)bins);
      const u64 wanted = (u64)((double)params.typical_p * (double)all);
      u32 key = 0;
      for (int bit = 31; bit >= 0; bit--) {  // the highest distance with less than the wanted mass nearer than it
        const u32 tried = key | 1u << bit;
        u64 nearer = 0;
        for (int i = tid; i < length; i += threads) {
          if (key_of(source[i]) < low) continue;
          const float l = source[i] - peak - log_all;
          if (key_of(fabsf(-l - expected)) < tried) nearer += (u64)(__expf(l + log_all) * ONE);
        }
        if (block_sum_u64(nearer, scratch) < wanted) key = tried;
      }
      strange = key;
    }
    }
    high = -INFINITY;
    at_high = 0x7fffffff;
    for (int i = tid; i < length; i += threads) {
      const float z = source[i];
      if (z == -INFINITY || key_of(z) < low) continue;
      if (by_typical && key_of(fabsf(-(z - peak - log_all) - expected)) > strange) continue;
      const int token = near ? permutation[i] : i;
      const float u = ((float)mix((u32)params.seed_low, (u32)params.seed_high, (u32)position, (u32)token) + 0.5f) * 2.3283064e-10f;
      const float noisy = z - __logf(-__logf(fminf(u, 0.99999994f)));
      if (noisy > high || (noisy == high && token < at_high)) { high = noisy; at_high = token; }
    }
    chosen = largest(high, at_high);
  }

  if (tid == 0) {
    int* history = p.history + (size_t)row * p.context;
    const int next = position + 1, from = p.answer_from[row];
    if (chosen >= n) chosen = 0;  // every logit was NaN; the caller looks at the logits
    p.ids[row] = chosen;
    p.positions[row] = next;
    p.host_tokens[row * TOLD + next % TOLD] = chosen;
    if (next < p.context) {
      history[next] = chosen;
      seen[chosen]++;
      answered[chosen]++;
      const int left = next - params.range;  // the token that the penalties no longer see
      if (params.range > 0 && left >= 0) {
        seen[history[left]]--;
        if (left >= from) answered[history[left]]--;
      }
    }
  }
}
