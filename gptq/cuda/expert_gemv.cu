// The product of one row (gemv.cu) and the weights of chosen experts.

// A row of blocks for each choice: its expert's weights are read where they lie, so no one else has to know which it is.
template <int BITS, bool SYM, int UNITS, int KS, int BATCH, int STAGES, int EPILOGUE, int NORM, bool EVEN, int INPUT, int SPAN>
DEVICE void expert_gemv(const ExpertGemvArguments& e) {
  static_assert(NORM == 0 && EPILOGUE != RESIDUAL && EPILOGUE != SILU, "experts take no norm and no residual");
  // The choice is made by the previous kernel, so nothing can be loaded before it has ended; but those that are always the same.
  if ((int)blockIdx.y < e.made) wait_for_previous_kernel();
  const u64 asked = e.chosen[blockIdx.y], last = e.experts - 1;
  const u64 expert = asked < last ? asked : last;
  constexpr bool GATE = EPILOGUE == GATED || EPILOGUE == GATED_BFLOAT;
  constexpr int WIDTH = EPILOGUE == FLOAT ? 4 : 2;
  GemvArguments p = {};
  p.weights = e.weights + expert * e.weight_bytes;
  p.scales = (const u32*)((const u8*)e.scales + expert * e.scale_bytes);
  p.x = e.x + (size_t)(blockIdx.y / e.share) * (INPUT == FRAGMENTS ? e.chunks * CHUNK : e.k);
  p.order = e.order + expert * e.order_length;
  p.out = (u8*)e.out + (size_t)blockIdx.y * (GATE ? e.n / 2 : e.n) * WIDTH;
  p.n = e.n; p.tiles = e.tiles; p.chunks = e.chunks; p.groups = e.groups; p.unit_to_group = e.unit_to_group; p.k = e.k;
  p.activation = e.activation;
  gemv<BITS, SYM, UNITS, KS, BATCH, STAGES, EPILOGUE, NORM, EVEN, INPUT, SPAN, 0, GemvArguments, false>(p);
}
