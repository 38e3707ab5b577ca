// Products of two to eight rows (octet.cu) in several forms, each against sums in double. A line for each: its name, how far it is from
// them, and whether each row is what it is alone.

static std::mt19937 numbers(7);

struct Product {
  std::vector<u8> words;
  std::vector<u32> scales;
  std::vector<u16> x, norm;
  std::vector<int> permutation;
  std::vector<double> wanted, normed;  // [8][n]
  OctetArguments p = {};
};

static u16 random_half(float low, float high) { return to_half(std::uniform_real_distribution<float>(low, high)(numbers)); }

// The number of a weight, as unpack.cu says where it lies: `j` of four in step `step` of lane `lane`, of output r or r + 8.
template <int BITS> static float number_of(const u8* chunk, int lane, int step, int j, bool second) {
  u32 a[4];
  const Words<BITS> words = read_words<BITS>(chunk, lane);
  fragment<BITS>(words, step, H2_1024, H2_1024, a);
  return to_float(a[second + j / 2 * 2] >> j % 2 * 16);
}

template <int BITS, bool SYM, int UNITS, int SPAN> static Product random_product(int tiles, int chunks) {
  Product r;
  const int groups = chunks * UNITS / SPAN, n = tiles * TILE, k = chunks * CHUNK;
  r.words.resize((size_t)tiles * chunks * BITS * 128);
  for (auto& each : r.words) each = numbers();
  r.scales.resize((size_t)tiles * groups * (SYM ? 8 : 16));
  for (size_t i = 0; i < r.scales.size(); i++) {
    auto zero = [] { return to_half(1024 + numbers() % ((1 << BITS) + 1)); };
    r.scales[i] = SYM || i % 2 == 0 ? pair(random_half(0.005, 0.02), random_half(0.005, 0.02)) : pair(zero(), zero());
  }
  for (int i = 0; i < 8 * k; i++) r.x.push_back(i / k == 6 ? 0 : random_half(-2, 2));  // row 6 is zeros
  for (int i = 0; i < k; i++) r.norm.push_back(random_half(0.5, 2));
  r.x[7] = to_half(500);
  for (int i = 0; i < CHUNK * 2; i++) r.x[3 * k + i] = 0;  // a block of zeros
  for (int i = 0; i < n; i++) r.permutation.push_back(i * 7 % n);
  r.wanted.assign(8 * n, 0);
  r.normed.assign(8 * n, 0);
  for (int row = 0; row < 8; row++) {
    double squares = 0;
    for (int i = 0; i < k; i++) squares += pow(to_float(r.x[row * k + i]), 2);
    const double scale = 1 / sqrt(squares / k + 1e-5);
    for (int tile = 0; tile < tiles; tile++)
      for (int chunk = 0; chunk < chunks; chunk++)
        for (int lane = 0; lane < 32; lane++)
          for (int i = 0; i < 32; i++) {
            const int step = i / 8, j = i / 2 % 4, second = i % 2, at = chunk * CHUNK + lane % 4 * 16 + step * 4 + j;
            const u32* scales = r.scales.data() + ((size_t)tile * groups + (chunk * UNITS + step * UNITS / 4) / SPAN) * (SYM ? 8 : 16);
            const u32 own = scales[SYM ? lane / 4 : lane / 4 * 2], zeros = SYM ? 0 : scales[lane / 4 * 2 + 1];
            const double zero = SYM ? 1 << (BITS - 1) : to_float(zeros >> 16 * second) - 1024;
            const double q = number_of<BITS>(r.words.data() + ((size_t)tile * chunks + chunk) * BITS * 128, lane, step, j, second);
            const double w = (q - zero) * to_float(own >> 16 * second), x = to_float(r.x[row * k + at]);
            const int to = row * n + tile * TILE + lane / 4 + 8 * second;
            r.wanted[to] += w * x;
            r.normed[to] += w * x * to_float(r.norm[at]) * scale;
          }
  }
  r.p.tiles = tiles; r.p.chunks = chunks; r.p.groups = groups; r.p.n = n; r.p.k = k;
  r.p.unit_to_group = SPAN == 2 ? 1 << 15 : 1 << 16;
  r.p.eps = 1e-5f;
  return r;
}

template <int BITS, bool SYM, int UNITS, int ROWS, int KS, int BATCH, int STAGES, int TEAMS, int NORM, bool EVEN, int CLUSTER, int SPAN, bool FOLLOW = (SPAN > 0), int SHARERS = 1>
static std::vector<float> multiplied(const Product& r, const std::vector<int>& rows, int blocks, int first) {
  std::vector<u16> x, out(rows.size() * r.p.n);
  for (int row : rows) x.insert(x.end(), r.x.begin() + row * r.p.k, r.x.begin() + (row + 1) * r.p.k);
  std::vector<float> residual(rows.size() * r.p.n, 0.f);
  OctetArguments p = r.p;
  p.weights = r.words.data(); p.scales = r.scales.data(); p.x = x.data(); p.norm = r.norm.data(); p.out = out.data();
  p.residual = residual.data(); p.permutation = r.permutation.data(); p.rows = rows.size(); p.out_stride = p.n; p.first_batches = first;
  auto kernel = [&p] { octet<BITS, SYM, UNITS, ROWS, KS, BATCH, STAGES, TEAMS, RESIDUAL, NORM, EVEN, CLUSTER, SPAN, FOLLOW, SHARERS>(p); };
  launch(blocks * CLUSTER, 32 * KS * TEAMS, 32 * KS, kernel, CLUSTER * SHARERS);
  for (size_t i = 0; i < residual.size(); i++)
    if (out[i / p.n * p.n + p.permutation[i % p.n]] != to_half(residual[i])) return {};
  return residual;
}

template <int BITS, bool SYM, int UNITS, int ROWS, int KS, int BATCH, int STAGES, int TEAMS, int NORM, bool EVEN, int CLUSTER, int SPAN, bool FOLLOW = (SPAN > 0), int SHARERS = 1>
static void say(const Product& r, const std::vector<int>& rows, int blocks, int first) {
  auto run = [&](const std::vector<int>& own) {
    return multiplied<BITS, SYM, UNITS, ROWS, KS, BATCH, STAGES, TEAMS, NORM, EVEN, CLUSTER, SPAN, FOLLOW, SHARERS>(r, own, blocks, first);
  };
  const std::vector<float> found = run(rows), alone = run({rows.back()});
  double worst = found.empty() ? NAN : 0;
  for (size_t i = 0; i < rows.size() && !found.empty(); i++) {
    double apart = 0, all = 1e-30;
    for (int n = 0; n < r.p.n; n++) {
      const double wanted = (NORM ? r.normed : r.wanted)[rows[i] * r.p.n + n];
      apart += pow(found[i * r.p.n + n] - wanted, 2);
      all += pow(wanted, 2);
    }
    worst = std::max(worst, sqrt(apart / all));
    if (std::isnan(apart)) worst = NAN;
  }
  const bool same = !found.empty() && std::equal(alone.begin(), alone.end(), found.end() - r.p.n);
  printf("%d bits %s, %d units, %d rows of %d, %d warps a tile, %d chunks of %d, %d teams, norm %d, even %d, clusters of %d, %d sharers, %s, first %d: %s %g\n", BITS,
         SYM ? "symmetric" : "asymmetric", UNITS, (int)rows.size(), ROWS, KS, BATCH, STAGES, TEAMS, NORM, EVEN, CLUSTER, SHARERS,
         SPAN ? SPAN == 2 ? "digits of pairs" : "digits" : "fp16", first, same ? "same" : "other", worst);
}

template <int BITS, bool SYM, int UNITS, int SPAN, bool FP16 = true> static void compare() {
  const Product r = random_product<BITS, SYM, UNITS, SPAN>(5, 16);
  const std::vector<int> two = {3, 0}, four = {5, 0, 2, 4}, five = {5, 7, 2, 4, 0}, eight = {7, 1, 6, 3, 2, 5, 4, 0};
  if constexpr (FP16) {
    say<BITS, SYM, UNITS, 2, 2, 4, 2, 2, 0, true, 1, 0, true>(r, two, 2, 0);
    say<BITS, SYM, UNITS, 8, 2, 2, 3, 1, 2, true, 1, 0, true>(r, five, 2, 1);
    say<BITS, SYM, UNITS, 4, 2, 2, 2, 1, 0, false, 2, 0>(r, four, 2, 0);
  }
  say<BITS, SYM, UNITS, 2, 1, 8, 3, 2, 2, true, 1, SPAN>(r, two, 2, 0);
  say<BITS, SYM, UNITS, 2, 2, 2, 2, 1, 0, false, 2, SPAN>(r, two, 2, 1);
  say<BITS, SYM, UNITS, 2, 3, 2, 3, 1, 2, false, 1, SPAN>(r, {0}, 3, 3);
  say<BITS, SYM, UNITS, 4, 2, 4, 3, 2, 1, true, 1, SPAN>(r, four, 2, 1);
  say<BITS, SYM, UNITS, 4, 2, 2, 4, 1, 0, true, 4, SPAN>(r, {0, 5, 2}, 1, 0);
  say<BITS, SYM, UNITS, 8, 2, 4, 2, 2, 1, true, 1, SPAN>(r, eight, 2, 2);
  say<BITS, SYM, UNITS, 8, 2, 4, 3, 1, 2, true, 1, SPAN>(r, five, 3, 0);
  say<BITS, SYM, UNITS, 8, 1, 2, 2, 2, 0, true, 2, SPAN>(r, eight, 2, 0);
  say<BITS, SYM, UNITS, 4, 2, 2, 2, 1, 0, false, 4, SPAN>(random_product<BITS, SYM, UNITS, SPAN>(2, 2), {0, 3, 2}, 1, 0);  // blocks without inputs
  say<BITS, SYM, UNITS, 2, 1, 2, 3, 2, 1, true, 2, SPAN>(r, two, 2, 1);
  say<BITS, SYM, UNITS, 8, 2, 2, 2, 2, 1, true, 4, SPAN>(r, eight, 1, 0);
  say<BITS, SYM, UNITS, 8, 2, 4, 2, 2, 1, true, 1, SPAN, true, 2>(r, five, 2, 0);
  say<BITS, SYM, UNITS, 4, 2, 2, 3, 1, 0, false, 1, SPAN, true, 4>(r, {0, 5, 2}, 4, 1);
  say<BITS, SYM, UNITS, 2, 2, 4, 2, 1, 1, true, 1, SPAN, true, 4>(random_product<BITS, SYM, UNITS, SPAN>(2, 8), two, 4, 0);  // sharers without runs, and without tiles
}

int main() {
  compare<2, true, 1, 2, false>(); compare<2, false, 2, 1, false>();
  compare<3, false, 1, 2, false>(); compare<3, true, 1, 1, false>();
  compare<4, true, 1, 2, false>(); compare<4, false, 1, 2, false>(); compare<4, true, 1, 1>(); compare<4, false, 1, 1, false>(); compare<4, true, 2, 1, false>();
}
