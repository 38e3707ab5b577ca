// Of a mixture: the gate of one family, the sum of what its experts give, and the choice for several tokens.

// What the chosen experts of each token give, times their weights.
template <class T> DEVICE void combine(const CombineArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int token = blockIdx.y;
  const float* y = p.y + (size_t)token * p.choices * p.n;
  for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < p.n; at += gridDim.x * blockDim.x) {
    float sum = 0.f;
#pragma unroll 4
    for (int i = 0; i < p.choices; i++) {
      const int w = token * p.choices + i;
      const float bias = p.bias ? __ldg(p.bias + min(__ldcg(p.chosen + w), (u64)p.experts - 1) * p.n + at) : 0.f;
      sum += (__ldcg(y + (size_t)i * p.n + at) + bias) * (p.wide ? __ldcg((const float*)p.weights + w) : T::wide(__ldcg((const u16*)p.weights + w)));
    }
    p.out[(size_t)token * p.n + at] = T::narrow(sum);
  }
}

// The gate of GPT-OSS: ups are clamped, gates from above only; (up + 1) * gate * sigmoid(alpha * gate). The numbers are fp16.
template <class T> DEVICE void clamped_gate(const ClampedGateArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const size_t choice = blockIdx.y, expert = min(__ldcg(p.chosen + choice), (u64)p.experts - 1);
  for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < p.n; at += gridDim.x * blockDim.x) {
    const u32 both = __ldcg((const u32*)p.y + choice * p.n + at);
    float gate = to_float((u16)both), up = to_float((u16)(both >> 16));
    if (p.bias) {
      const float2 bias = __ldg((const float2*)p.bias + expert * p.n + at);
      gate += bias.x;
      up += bias.y;
    }
    gate = fminf(gate, p.limit);
    up = fminf(fmaxf(up, -p.limit), p.limit);
    p.out[choice * p.n + at] = to_half((up + 1.f) * gate / (1.f + __expf(-p.alpha * gate)));
  }
}

// As choose_experts, of several tokens, which do not wait for each other: a row of blocks for each.
template <class T, bool WIDE> DEVICE void choose_of_rows(const RouteArguments& given) {
  RouteArguments p = given;
  const size_t row = blockIdx.y;
  p.x += row * p.k;
  p.logits += row * (p.experts + 1);
  p.all = (u8*)p.all + row * p.experts * (p.wide ? 4 : 2);
  p.scores = (u8*)p.scores + row * p.choices * (p.wide_scores ? 4 : 2);
  p.chosen += row * p.choices;
  choose_experts<T, false, WIDE>(p);
}
template <class T> DEVICE void route_rows(const RouteArguments& p) { choose_of_rows<T, false>(p); }
template <class T> DEVICE void route_rows_wide(const RouteArguments& p) { choose_of_rows<T, true>(p); }
