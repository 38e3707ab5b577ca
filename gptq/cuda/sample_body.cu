// The body of the kernels that sample: of `sample`, which has SampleArguments p and a block for each row, and with GUESSED of
// `sample_guessed`, which is given GuessedArguments and has one block.
//
// There row 0 has computed its token, and the rows after it guesses at the next ones: each token is sampled as if it came alone,
// as long as the guess before it was right. The rows of guesses are idle afterwards. kernel_source.py writes the heads; so
// `sample` is the same machine code whether there are guesses or not.
#ifdef GUESSED
  SampleArguments p = {given.logits, given.params, given.bias, given.masks, given.seen, given.answered, given.history,
                       given.answer_from, given.work, given.ids, given.positions, given.host_tokens, given.vocabulary, given.context};
#endif
  __shared__ SampleShared shared;
  const int at_row = blockIdx.x;
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  if (p.positions[at_row] < 0) return;
#ifdef GUESSED
  for (int guess = 1;; guess++) {
#endif
  SampleRow row = {p.params[at_row], p.work + (size_t)at_row * p.vocabulary, p.vocabulary, p.positions[at_row]};
  const SampleParams& params = row.params;
  int chosen = adjust_logits(p, shared, row, at_row);
  row.peak = shared.largest;
  __syncthreads();
  if (params.temperature != 0.f) {
    row.by_k = params.top_k > 0 && params.top_k < row.n;
    row.by_p = params.top_p < 1.f;
    row.by_typical = params.typical_p < 1.f;
    row.sigma_floor = params.top_n_sigma > 0.f ? row.peak - params.top_n_sigma * deviation(shared, row) : -INFINITY;
    row.floor = params.min_p > 0.f ? max(row.sigma_floor, row.peak + __logf(params.min_p)) : row.sigma_floor;
    row.by_floor = row.floor > -INFINITY;
    Candidates candidates = collect_candidates(shared, row);
    Thresholds thresholds = {0, 0xffffffffu, 0.f, 0.f};
    if (candidates.listed && candidates.length <= SAMPLE_THREADS && !row.by_typical) filter_sorted(shared, row, candidates);
    else thresholds = find_thresholds(shared, row, candidates);
    chosen = draw_token(shared, row, candidates, thresholds);
  }
  if (threadIdx.x == 0) record_token(p, row, at_row, chosen);
#ifdef GUESSED
    __syncthreads();  // what was recorded is read for the next one
    if (guess >= given.guessed || p.positions[guess] < 0 || chosen != p.ids[guess]) break;
    p.logits += p.vocabulary;  // everything else is row 0's
  }
  __syncthreads();
  const int other = threadIdx.x + 1;
  if (other < given.guessed) p.positions[other] = -1;
#endif
