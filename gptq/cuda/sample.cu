// From logits to the next token, on the GPU: a block for each row, the whole choice in one kernel.
//
// The order is that of transformers' generate: bias, penalties, temperature, top n sigma, top k, top p, min p, typical p. Every filter
// is a threshold, read from a sorted short list or found by bisection over the bits of a float. Masses are added as
// integers, so their order cannot matter. The token is the largest of logit + Gumbel noise (Gumbel-max: the same
// distribution as sampling from the softmax). The noise is a function of seed, position and token, so a seed gives the same
// token in every run and beside any other row.

#define CANDIDATES 4096
#define BINS 2048
#define BINS_PER_FOLD 64.f  // bins for each e-fold of probability, from the peak down
#define ONE 1099511627776.f  // a mass of 1 as an integer: 2^40

static_assert(SAMPLE_THREADS == 1024, "a block has at most 32 warps");
static_assert(CANDIDATES >= SAMPLE_THREADS, "the sort writes one candidate a thread");
static_assert((SAMPLE_THREADS & (SAMPLE_THREADS - 1)) == 0, "a bitonic network sorts powers of two");
static_assert(BINS % 32 == 0, "a lane adds up as many bins as every other");
static_assert(BINS * sizeof(u32) >= 33 * sizeof(float), "block_sum borrows the bins");

struct SampleShared {
  float list[CANDIDATES];  // the short list: logits and their tokens
  int tokens[CANDIDATES];
  u32 bins[BINS];
  u64 scratch[32];
  float best_value[32], largest;
  int best_token[32], found_bin, filled;
};

// One row, and which of its filters are on.
struct SampleRow {
  const SampleParams params;
  float* work;
  int n, position;
  float peak, floor;  // the highest logit; the lowest that top n sigma and min p keep
  float sigma_floor;  // the lowest that top n sigma keeps: it comes before top p, whose share is of what is left
  bool by_k, by_p, by_floor, by_typical;
};

// What may still be chosen: the whole vocabulary, or the short list.
struct Candidates {
  const float* logits;
  int length;
  bool listed;
  u64 everything;  // the mass of the vocabulary, where top p without top k needs it
};

// Which candidates the filters keep: keys not below `low`, and no further than `strange` from the expected surprise.
struct Thresholds {
  u32 low, strange;
  float expected, log_all;
};

// -- helpers -----------------------------------------------------------------------------------------------------------

DEVICE u32 key_of(float f) { u32 u = __float_as_uint(f); return u & 0x80000000u ? ~u : u | 0x80000000u; }  // keeps the order
DEVICE u64 mass_of(float exponent) { return (u64)(__expf(exponent) * ONE); }

DEVICE u64 block_sum_u64(u64 v, u64* scratch) {
#pragma unroll
  for (int at = 16; at; at >>= 1) v += __shfl_xor_sync(FULL, v, at);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  u64 total = 0;
  total = scratch[threadIdx.x % 32];
#pragma unroll
  for (int at = 16; at; at >>= 1) total += __shfl_xor_sync(FULL, total, at);
  __syncthreads();
  return total;
}

// The token with the largest value, of equals the first; the value is left in `shared.largest`.
DEVICE int block_largest(SampleShared& shared, float value, int token) {
  const int tid = threadIdx.x;
#pragma unroll
  for (int at = 16; at; at >>= 1) {
    const float other = __shfl_xor_sync(FULL, value, at);
    const int where = __shfl_xor_sync(FULL, token, at);
    if (other > value || (other == value && where < token)) { value = other; token = where; }
  }
  if (tid % 32 == 0) { shared.best_value[tid / 32] = value; shared.best_token[tid / 32] = token; }
  __syncthreads();
  for (int i = 0; i < SAMPLE_THREADS / 32; i++)
    if (shared.best_value[i] > value || (shared.best_value[i] == value && shared.best_token[i] < token)) {
      value = shared.best_value[i];
      token = shared.best_token[i];
    }
  if (tid == 0) shared.largest = value;
  __syncthreads();
  return token;
}

DEVICE u32 mix(u32 a, u32 b, u32 c, u32 d) {  // Jarzynski & Olano 2020, pcg4d: four counters to one well-mixed word
  a = a * 1664525u + 1013904223u; b = b * 1664525u + 1013904223u; c = c * 1664525u + 1013904223u; d = d * 1664525u + 1013904223u;
  a += b * d; b += c * a; c += a * b; d += b * c;
  a ^= a >> 16; b ^= b >> 16; c ^= c >> 16; d ^= d >> 16;
  a += b * d; b += c * a; c += a * b; d += b * c;
  return a;
}

// visit(i, z, count) for each number of a row that a thread has, and what `counts` says of it (without counts 0). AHEAD loads of
// four numbers are on their way before the first is looked at. What `visit` returns is written to `out`, unless that is null.
template <int AHEAD, class Visit>
DEVICE void each_of_row(const float* values, const u16* counts, float* out, int n, Visit visit) {
  if (n % 4) {  // rows begin anywhere
    for (int i = threadIdx.x; i < n; i += SAMPLE_THREADS) {
      const float z = visit(i, values[i], counts ? counts[i] : 0);
      if (out) out[i] = z;
    }
    return;
  }
  for (int first = threadIdx.x; first < n / 4; first += AHEAD * SAMPLE_THREADS) {
    float4 z[AHEAD];
    ushort4 count[AHEAD];
#pragma unroll
    for (int at = 0; at < AHEAD; at++) {
      const int four = first + at * SAMPLE_THREADS;
      if (four < n / 4) {
        z[at] = ((const float4*)values)[four];
        count[at] = counts ? ((const ushort4*)counts)[four] : ushort4{0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int at = 0; at < AHEAD; at++) {
      const int four = first + at * SAMPLE_THREADS, i = 4 * four;
      if (i >= n) break;
      z[at].x = visit(i, z[at].x, count[at].x);
      z[at].y = visit(i + 1, z[at].y, count[at].y);
      z[at].z = visit(i + 2, z[at].z, count[at].z);
      z[at].w = visit(i + 3, z[at].w, count[at].w);
      if (out) ((float4*)out)[four] = z[at];
    }
  }
}

// -- the phases --------------------------------------------------------------------------------------------------------

// Logits with bias, penalties and temperature, into `work`. Returns the likeliest token; its logit is `shared.largest`.
DEVICE int adjust_logits(const SampleArguments& p, SampleShared& shared, const SampleRow& row, int at_row) {
  const SampleParams& params = row.params;
  const float* logits = p.logits + (size_t)at_row * row.n;
  const float* bias = p.bias + (size_t)at_row * row.n;
  const u32* mask = p.masks + (size_t)at_row * ((row.n + 31) / 32);
  const u16 *seen = p.seen + (size_t)at_row * row.n, *answered = p.answered + (size_t)at_row * row.n;
  const float cooler = params.temperature == 0.f ? 1.f : 1.f / params.temperature;
  const bool penalties = params.repetition_penalty != 1.f, counts = params.presence_penalty != 0.f || params.frequency_penalty != 0.f;
  float high = -INFINITY;
  int at_high = 0x7fffffff;
  float* kept = params.temperature != 0.f ? row.work : nullptr;  // the likeliest is looked for only once
  each_of_row<4>(logits, penalties ? seen : nullptr, kept, row.n, [&](int i, float z, int before) {
    if (params.biased) z += bias[i];
    if (before) z = z < 0.f ? z * params.repetition_penalty : z / params.repetition_penalty;
    if (counts && answered[i]) z -= params.presence_penalty + params.frequency_penalty * answered[i];
    z *= cooler;
    if (params.masked && !(mask[i / 32] >> i % 32 & 1)) z = -INFINITY;
    if (z > high) { high = z; at_high = i; }
    return z;
  });
  return block_largest(shared, high, at_high);
}

// The standard deviation of the finite logits in `work`.
DEVICE float deviation(SampleShared& shared, const SampleRow& row) {
  float* scratch = (float*)shared.bins;
  float sum = 0.f, count = 0.f, squares = 0.f;
#pragma unroll 4
  for (int i = threadIdx.x; i < row.n; i += SAMPLE_THREADS)
    if (row.work[i] > -INFINITY) { sum += row.work[i]; count += 1.f; }
  count = block_sum(count, scratch);
  const float mean = block_sum(sum, scratch) / count;
#pragma unroll 4
  for (int i = threadIdx.x; i < row.n; i += SAMPLE_THREADS)
    if (row.work[i] > -INFINITY) { const float off = row.work[i] - mean; squares += off * off; }
  return sqrtf(block_sum(squares, scratch) / count);
}

// The last bin that the short list takes: by top k the first with k tokens down to its end, else the last that still fits.
DEVICE int last_bin(SampleShared& shared, const SampleRow& row) {
  const int tid = threadIdx.x;
  if (tid < 32) {
    u32 mine = 0;
    for (int i = 0; i < BINS / 32; i++) mine += shared.bins[tid * (BINS / 32) + i];
    u32 before = mine;
#pragma unroll
    for (int at = 1; at < 32; at <<= 1) { const u32 other = __shfl_up_sync(FULL, before, at); if (tid >= at) before += other; }
    before -= mine;
    int found = row.by_k ? BINS - 1 : -1;
    u32 sum = before;
    for (int i = 0; i < BINS / 32; i++) {
      sum += shared.bins[tid * (BINS / 32) + i];
      if (row.by_k && sum >= row.params.top_k) { found = tid * (BINS / 32) + i; break; }
      if (!row.by_k && sum <= CANDIDATES) found = tid * (BINS / 32) + i;
    }
#pragma unroll
    for (int at = 16; at; at >>= 1) { const int other = __shfl_xor_sync(FULL, found, at); found = row.by_k ? min(found, other) : max(found, other); }
    if (tid == 0) shared.found_bin = found;
  }
  __syncthreads();
  return shared.found_bin;
}

// Whatever the first filter can keep goes into the short list, if the list is long enough for it.
DEVICE Candidates collect_candidates(SampleShared& shared, const SampleRow& row) {
  const int tid = threadIdx.x, threads = SAMPLE_THREADS;
  Candidates found = {row.work, row.n, false, 0};
  if (!row.by_k && !row.by_p && !row.by_floor) return found;
  auto bin_of = [&](float z) { return min(BINS - 1, (int)((row.peak - z) * BINS_PER_FOLD)); };
  for (int i = tid; i < BINS; i += threads) shared.bins[i] = 0;
  if (tid == 0) shared.filled = 0;
  __syncthreads();
  int cut = BINS - 1;
  if (row.by_k || row.by_p) {
    u64 mass = 0;
    each_of_row<2>(row.work, nullptr, nullptr, row.n, [&](int, float z, int) {
      if (z == -INFINITY) return z;  // of a grammar's mask nearly all
      atomicAdd(&shared.bins[bin_of(z)], 1);
      if (!row.by_k && z >= row.sigma_floor) mass += mass_of(z - row.peak);
      return z;
    });
    if (!row.by_k) found.everything = block_sum_u64(mass, shared.scratch);
    __syncthreads();
    cut = last_bin(shared, row);
  }
  u64 mass = 0;
  each_of_row<2>(row.work, nullptr, nullptr, row.n, [&](int i, float z, int) {
    if (z == -INFINITY || (row.by_k || row.by_p ? bin_of(z) > cut : z < row.floor)) return z;
    const int place = atomicAdd(&shared.filled, 1);
    if (place < CANDIDATES) { shared.list[place] = z; shared.tokens[place] = i; }
    mass += mass_of(z - row.peak);
    return z;
  });
  __syncthreads();
  bool enough = shared.filled > 0 && shared.filled <= CANDIDATES;
  if (row.by_p && !row.by_k) {  // where the distribution is flat, top p may keep more than the list holds
    mass = block_sum_u64(mass, shared.scratch);
    enough = enough && (double)mass >= (double)row.params.top_p * (double)found.everything;
  }
  if (enough) { found.logits = shared.list; found.length = shared.filled; found.listed = true; }
  __syncthreads();
  return found;
}

// Sort the short list, one candidate a thread, the likeliest first; of equals the first token. A bitonic network.
DEVICE float sort_candidates(SampleShared& shared, int length) {
  const int tid = threadIdx.x, threads = SAMPLE_THREADS;
  float z = tid < length ? shared.list[tid] : -INFINITY;
  int token = tid < length ? shared.tokens[tid] : 0x7fffffff;
  __syncthreads();
  for (int size = 2; size <= threads && size < 2 * length; size *= 2) {
    for (int apart = size / 2; apart; apart /= 2) {
      float other;
      int where;
      if (apart >= 32) {
        shared.list[tid] = z; shared.tokens[tid] = token;
        __syncthreads();
        other = shared.list[tid ^ apart]; where = shared.tokens[tid ^ apart];
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
  shared.list[tid] = z; shared.tokens[tid] = token;
  __syncthreads();
  return z;
}

// The filters on a short list of at most one candidate a thread: what they drop becomes -infinity.
DEVICE void filter_sorted(SampleShared& shared, const SampleRow& row, Candidates& candidates) {
  const int tid = threadIdx.x, threads = SAMPLE_THREADS, length = candidates.length;
  const float z = sort_candidates(shared, length), lowest = row.by_k ? shared.list[min(row.params.top_k, length) - 1] : -INFINITY;
  __syncthreads();  // the list is read before it is written again
  bool kept = tid < length && z >= lowest && z >= row.sigma_floor;
  if (row.by_p) {
    u64 mass = kept ? mass_of(z - row.peak) : 0, before = mass;  // of this one; of those that are likelier
#pragma unroll
    for (int at = 1; at < 32; at <<= 1) { const u64 other = __shfl_up_sync(FULL, before, at); if (tid % 32 >= at) before += other; }
    if (tid % 32 == 31) shared.scratch[tid / 32] = before;
    __syncthreads();
    u64 all = 0;
    for (int i = 0; i < threads / 32; i++) { if (i < tid / 32) before += shared.scratch[i]; all += shared.scratch[i]; }
    if (!row.by_k) all = candidates.everything;
    before -= mass;
    kept = kept && (tid == 0 || (double)before < (double)row.params.top_p * (double)all);
  }
  if (row.by_floor) kept = kept && (tid == 0 || z >= row.floor);
  if (!kept) shared.list[tid] = -INFINITY;
  candidates.length = min(length, threads);
  __syncthreads();
}

// The largest key that has `wanted` candidates at or above it.
DEVICE u32 key_by_count(SampleShared& shared, const Candidates& candidates, u64 wanted) {
  u32 key = 0;
  for (int bit = 31; bit >= 0; bit--) {
    const u32 tried = key | 1u << bit;
    u64 count = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < candidates.length; i += SAMPLE_THREADS) count += key_of(candidates.logits[i]) >= tried;
    if (block_sum_u64(count, shared.scratch) >= wanted) key = tried;
  }
  return key;
}

// The mass of the candidates above `key` (or also equal to it) and not below `low`.
DEVICE u64 mass_above(SampleShared& shared, const SampleRow& row, const Candidates& candidates, u32 key, bool equal, u32 low) {
  u64 sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < candidates.length; i += SAMPLE_THREADS) {
    const u32 k = key_of(candidates.logits[i]);
    if ((equal ? k >= key : k > key) && k >= low) sum += mass_of(candidates.logits[i] - row.peak);
  }
  return block_sum_u64(sum, shared.scratch);
}

// The lowest key with less than the wanted mass above it.
DEVICE u32 key_by_mass(SampleShared& shared, const SampleRow& row, const Candidates& candidates, u64 wanted, u32 low) {
  u32 key = 0;
  for (int bit = 31; bit >= 0; bit--) {
    const u32 tried = key | ((1u << bit) - 1);  // can the threshold lie at or below this?
    if (mass_above(shared, row, candidates, tried, false, low) >= max(wanted, (u64)1)) key |= 1u << bit;
  }
  return key;
}

// Typical p (Meister et al. 2022): the largest distance from the expected surprise with less than the wanted mass nearer.
DEVICE void find_typical(SampleShared& shared, const SampleRow& row, const Candidates& candidates, Thresholds& t) {
  const u64 all = mass_above(shared, row, candidates, 0, true, t.low);
  t.log_all = __logf((float)((double)all / 1099511627776.0));
  float sum = 0.f;
#pragma unroll 4
  for (int i = threadIdx.x; i < candidates.length; i += SAMPLE_THREADS)
    if (key_of(candidates.logits[i]) >= t.low) { const float l = candidates.logits[i] - row.peak - t.log_all; sum -= __expf(l) * l; }
  t.expected = block_sum(sum, (float*)shared.bins);
  const u64 wanted = (u64)((double)row.params.typical_p * (double)all);
  u32 key = 0;
  for (int bit = 31; bit >= 0; bit--) {
    const u32 tried = key | 1u << bit;
    u64 nearer = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < candidates.length; i += SAMPLE_THREADS) {
      if (key_of(candidates.logits[i]) < t.low) continue;
      const float l = candidates.logits[i] - row.peak - t.log_all;
      if (key_of(fabsf(-l - t.expected)) < tried) nearer += mass_of(l + t.log_all);
    }
    if (block_sum_u64(nearer, shared.scratch) < wanted) key = tried;
  }
  t.strange = key;
}

// The filters on any number of candidates, as thresholds.
DEVICE Thresholds find_thresholds(SampleShared& shared, const SampleRow& row, const Candidates& candidates) {
  Thresholds t = {0, 0xffffffffu, 0.f, 0.f};
  if (row.by_k) t.low = key_by_count(shared, candidates, row.params.top_k);
  t.low = max(t.low, key_of(row.sigma_floor));
  if (row.by_p) {
    const u64 all = row.by_k ? mass_above(shared, row, candidates, 0, true, t.low) : candidates.everything;
    t.low = max(t.low, key_by_mass(shared, row, candidates, (u64)((double)row.params.top_p * (double)all), t.low));
  }
  if (row.by_floor) t.low = max(t.low, key_of(row.floor));
  t.low = min(t.low, key_of(row.peak));  // the likeliest token is never dropped
  if (row.by_typical) find_typical(shared, row, candidates, t);
  return t;
}

// Gumbel-max over what is kept.
DEVICE int draw_token(SampleShared& shared, const SampleRow& row, const Candidates& candidates, const Thresholds& t) {
  float high = -INFINITY;
  int at_high = 0x7fffffff;
#pragma unroll 4
  for (int i = threadIdx.x; i < candidates.length; i += SAMPLE_THREADS) {
    const float z = candidates.logits[i];
    if (z == -INFINITY || key_of(z) < t.low) continue;
    if (row.by_typical && key_of(fabsf(-(z - row.peak - t.log_all) - t.expected)) > t.strange) continue;
    const int token = candidates.listed ? shared.tokens[i] : i;
    const u32 word = mix((u32)row.params.seed_low, (u32)row.params.seed_high, (u32)row.position, (u32)token);
    const float u = ((float)word + 0.5f) * 2.3283064e-10f;
    const float noisy = z - __logf(-__logf(fminf(u, 0.99999994f)));
    if (noisy > high || (noisy == high && token < at_high)) { high = noisy; at_high = token; }
  }
  return block_largest(shared, high, at_high);
}

// The token becomes the next one, for the model, the penalties and the host. One thread.
DEVICE void record_token(const SampleArguments& p, const SampleRow& row, int at_row, int chosen) {
  u16 *seen = p.seen + (size_t)at_row * row.n, *answered = p.answered + (size_t)at_row * row.n;
  int* history = p.history + (size_t)at_row * p.context;
  const int next = row.position + 1, from = p.answer_from[at_row];
  if (chosen >= row.n) chosen = 0;  // every logit was NaN; the caller looks at the logits
  p.ids[at_row] = chosen;
  p.positions[at_row] = next;
  p.host_tokens[at_row * HOST_TOKENS + next % HOST_TOKENS] = chosen;
  if (next >= p.context) return;
  history[next] = chosen;
  seen[chosen]++;
  answered[chosen]++;
  const int left = next - row.params.repetition_range;  // the token that the penalties no longer see
  if (row.params.repetition_range > 0 && left >= 0) {
    seen[history[left]]--;
    if (left >= from) answered[history[left]]--;
  }
}
