// Products of one row (gemv.cu) in several forms, each against the plainest: two warps a tile, chunk after chunk, without a norm. A
// line for each: its name and how far it is from that one.

static std::mt19937 numbers(5);

struct Product {
  std::vector<u8> words;
  std::vector<u32> scales;
  std::vector<u16> x, norm;
  std::vector<float> out;
  GemvArguments p = {};
};

static u16 random_half(float low, float high) { return to_half(std::uniform_real_distribution<float>(low, high)(numbers)); }

template <int BITS, bool SYM, int UNITS, int SPAN> static Product random_product(int tiles, int chunks) {
  Product r;
  const int groups = chunks * UNITS / SPAN;
  r.words.resize((size_t)tiles * chunks * BITS * 128);
  for (auto& each : r.words) each = numbers();
  r.scales.resize((size_t)tiles * groups * (SYM ? 8 : 16));
  for (size_t i = 0; i < r.scales.size(); i++) {
    auto zero = [] { return to_half(1024 + numbers() % (1 << BITS)); };
    r.scales[i] = SYM || i % 2 == 0 ? pair(random_half(0.005, 0.02), random_half(0.005, 0.02)) : pair(zero(), zero());
  }
  for (int i = 0; i < chunks * CHUNK; i++) {
    r.x.push_back(random_half(-2, 2));
    r.norm.push_back(to_half(numbers() % 2 ? 0.5f : 2.f));  // a product with it is exact
  }
  r.x[7] = to_half(300);
  r.out.resize(tiles * TILE);
  r.p.tiles = tiles; r.p.chunks = chunks; r.p.groups = groups; r.p.n = tiles * TILE; r.p.k = chunks * CHUNK;
  r.p.unit_to_group = SPAN == 2 ? 1 << 15 : 1 << 16;
  r.p.eps = 1e-5f;
  return r;
}

template <int BITS, bool SYM, int UNITS, int SPAN, int KS, int BATCH, int STAGES, int NORM, bool EVEN, int INPUT = FRAGMENTS>
static std::vector<float> multiplied(Product r, int blocks, int teams, int first) {
  r.out.assign(r.out.size(), NAN);
  r.p.weights = r.words.data(); r.p.scales = r.scales.data(); r.p.x = r.x.data(); r.p.norm = r.norm.data(); r.p.out = r.out.data();
  r.p.first_batches = first;
  auto kernel = [&r] { gemv<BITS, SYM, UNITS, KS, BATCH, STAGES, FLOAT, NORM, EVEN, INPUT, SPAN>(r.p); };
  launch(blocks, 32 * KS * teams, 32 * KS, kernel);
  return r.out;
}

static double apart(const std::vector<float>& found, const std::vector<float>& wanted, double scale = 1) {
  double difference = 0, all = 0;
  for (size_t i = 0; i < found.size(); i++) {
    difference += pow(found[i] - wanted[i] * scale, 2);
    all += pow(wanted[i] * scale, 2);
  }
  return sqrt(difference / all);  // NaN if one number was not written
}

template <int BITS, bool SYM, int UNITS, int SPAN> static void compare() {
  const Product r = random_product<BITS, SYM, UNITS, SPAN>(5, 16);
  auto say = [](const char* form, double found) {
    printf("%d bits %s, %d units, %d chunks a scale, %s: %g\n", BITS, SYM ? "symmetric" : "asymmetric", UNITS, SPAN, form, found);
  };
  const auto plain = multiplied<BITS, SYM, UNITS, SPAN, 2, 2, 2, 0, false>(r, 2, 2, 2);
  say("groups of four, all batches first", apart(multiplied<BITS, SYM, UNITS, SPAN, 2, 8, 2, 0, true>(r, 2, 2, 2), plain));
  say("a warp a tile, x first", apart(multiplied<BITS, SYM, UNITS, SPAN, 1, 8, 3, 0, true>(r, 2, 2, 0), plain));
  say("two groups a batch, one team too many", apart(multiplied<BITS, SYM, UNITS, SPAN, 1, 16, 2, 0, true>(r, 3, 2, 0), plain));
  say("four warps a tile, x first", apart(multiplied<BITS, SYM, UNITS, SPAN, 4, 4, 2, 0, true>(r, 3, 1, 0), plain));
  say("four stages, one first", apart(multiplied<BITS, SYM, UNITS, SPAN, 2, 4, 4, 0, true>(r, 1, 2, 1), plain));
  say("five stages, two first", apart(multiplied<BITS, SYM, UNITS, SPAN, 4, 2, 5, 0, true>(r, 3, 1, 2), plain));
  say("uneven, x first", apart(multiplied<BITS, SYM, UNITS, SPAN, 3, 2, 3, 0, false>(r, 2, 1, 0), plain));

  Product times_weight = r;
  double squares = 0;
  for (size_t i = 0; i < r.x.size(); i++) {
    squares += pow(to_float(r.x[i]), 2);
    times_weight.x[i] = to_half(to_float(r.x[i]) * to_float(r.norm[i]));
  }
  const double scale = 1 / sqrt(squares / r.x.size() + r.p.eps);
  const auto normed = multiplied<BITS, SYM, UNITS, SPAN, 2, 2, 2, 0, false>(times_weight, 2, 2, 2);
  say("norm, groups, x first", apart(multiplied<BITS, SYM, UNITS, SPAN, 2, 8, 2, 1, true>(r, 2, 2, 0), normed, scale));
  say("norm, two runs a thread", apart(multiplied<BITS, SYM, UNITS, SPAN, 1, 8, 3, 2, true>(r, 2, 2, 1), normed, scale));
  say("norm, uneven", apart(multiplied<BITS, SYM, UNITS, SPAN, 2, 2, 2, 1, false>(r, 2, 2, 2), normed, scale));
}

// Inputs in bf16, far beyond fp16 or far below it: exactly what fp16 gives of the same numbers times a power of two.
template <int BITS, int UNITS, int SPAN> static void compare_bfloat() {
  Product r = random_product<BITS, true, UNITS, SPAN == 2 ? 2 : 1>(5, 16);
  const int padded = r.p.k, k = padded - 12;  // the last inputs are padding
  std::vector<u16> order(padded), natural(padded), mixed(padded + 8), ones(padded), mixed_ones(padded), weights(padded), mixed_weights(padded);
  std::vector<int> places(k);
  for (int i = 0; i < k; i++) places[i] = i;
  std::shuffle(places.begin(), places.end(), numbers);
  r.p.eps = 0;
  for (int power : {20, -90}) {
    for (int at = 0; at < padded; at++) {
      const float x = from_bfloat(to_bfloat(std::uniform_real_distribution<float>(0.25, 2)(numbers) * (numbers() % 2 ? 1 : -1)));
      const int input = at / CHUNK * CHUNK + at % 16 / 4 * 16 + at % CHUNK / 16 * 4 + at % 4, place = input < k ? places[input] : k;
      r.x[at] = input < k ? to_half(x) : 0;
      order[at] = place;
      if (input >= k) continue;
      natural[input] = mixed[place] = to_bfloat(ldexpf(x, power));
      ones[input] = mixed_ones[place] = to_bfloat(8);  // a norm divides by a power of two
      weights[input] = mixed_weights[place] = to_bfloat(ldexpf(x, power));
    }
    const auto plain = multiplied<BITS, true, UNITS, SPAN, 2, 2, 2, 0, false>(r, 2, 2, 2);
    auto say = [&](const char* form, const std::vector<float>& found) {
      printf("%d bits, %d units, %d chunks a scale, bf16 times 2^%d %s: %g\n", BITS, UNITS, SPAN, power, form, apart(found, plain, ldexp(1., power)));
    };
    Product other = r;
    other.p.k = k;
    other.p.order = order.data();
    other.x = natural;
    say("in its own order", multiplied<BITS, true, UNITS, SPAN, 2, 2, 2, 0, false, NATURAL_BFLOAT>(other, 2, 2, 2));
    other.x = mixed;
    say("in any order", multiplied<BITS, true, UNITS, SPAN, 2, 2, 2, 0, false, ORDERED_BFLOAT>(other, 2, 2, 2));
    other.x = ones, other.norm = weights;
    say("by a norm", multiplied<BITS, true, UNITS, SPAN, 2, 2, 2, 1, false, NATURAL_BFLOAT>(other, 2, 2, 2));
    other.x = mixed_ones, other.norm = mixed_weights;
    say("by a norm in any order", multiplied<BITS, true, UNITS, SPAN, 2, 2, 2, 2, false, ORDERED_BFLOAT>(other, 2, 2, 2));
  }
}

int main() {
  compare<2, true, 1, 2>(); compare<2, false, 1, 2>(); compare<2, true, 1, 1>(); compare<2, false, 2, 1>();
  compare<3, true, 1, 2>(); compare<3, false, 1, 1>();
  compare_bfloat<4, 1, 2>(); compare_bfloat<4, 4, 0>(); compare_bfloat<8, 1, 0>();
  compare<4, true, 1, 2>(); compare<4, false, 1, 2>(); compare<4, false, 1, 1>(); compare<4, true, 2, 1>();
}
