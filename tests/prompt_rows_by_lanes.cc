// Rows of a prompt between its products (prompt_rows.cu): "right", or what is not.

static u16 random_number(std::mt19937& numbers, int power) {
  return to_bfloat(ldexpf(std::uniform_real_distribution<float>(-2, 2)(numbers), power));
}

static void say(const char* what, int row, bool right) { printf("%s of row %d: %s\n", what, row, right ? "right" : "WRONG"); }

int main() {
  std::mt19937 numbers(7);
  const int rows = 6, k = 264, padded = 320;
  const int powers[rows] = {0, 30, -100, 120, 0, 0};
  std::vector<u16> x(rows * k), order(padded), out(rows * padded);
  std::vector<float> found(rows);
  for (int row = 0; row < rows; row++)
    for (int i = 0; i < k; i++) x[row * k + i] = row == 4 ? 0 : random_number(numbers, powers[row]);
  x[5 * k + 100] = 0x7fc0;  // no number
  for (int i = 0; i < padded; i++) order[i] = i < k ? i : k;
  std::shuffle(order.begin(), order.end(), numbers);
  OrderInputsArguments p = {};
  p.x = x.data(); p.out = out.data(); p.order = order.data(); p.powers = found.data(); p.k = k; p.padded = padded;
  auto kernel = [&p] { order_inputs<Bfloat>(p); };
  launch(rows, 64, 64, kernel);
  for (int row = 0; row < rows - 1; row++) {
    float largest = 0, apart = 0, most = 0;
    for (int i = 0; i < k; i++) largest = fmaxf(largest, fabsf(from_bfloat(x[row * k + i])));
    for (int at = 0; at < padded; at++) {
      const double wanted = order[at] < k ? from_bfloat(x[row * k + order[at]]) : 0., own = to_float(out[row * padded + at]);
      most = fmaxf(most, fabs(own));
      apart = fmaxf(apart, fabs(own * found[row] - wanted) / (largest ? largest : 1.f));
    }
    int exponent;
    say("division", row, frexpf(found[row], &exponent) == 0.5f && most < 64 && (most >= 32 || row == 4) && apart < 1e-8);
  }
  say("what is no number", rows - 1, std::isnan(found[rows - 1]));

  p.powers = nullptr;  // as fp16, cut off
  launch(rows, 64, 64, kernel);
  for (int row : {0, 1}) {
    bool right = true;
    for (int at = 0; at < padded; at++) {
      const float wanted = order[at] < k ? from_bfloat(x[row * k + order[at]]) : 0.f;
      right = right && fabsf(to_float(out[row * padded + at]) - fminf(fmaxf(wanted, -65504.f), 65504.f)) <= 1e-3f * fabsf(wanted);
    }
    say("cutting off", row, right);
  }

  const int inner = 48, width = 2 * inner + 16;
  std::vector<u16> y(2 * width), bias(width), gated(2 * inner);
  for (auto& each : y) each = to_half(std::uniform_real_distribution<float>(-2, 2)(numbers));
  for (auto& each : bias) each = to_half(std::uniform_real_distribution<float>(-2, 2)(numbers));
  for (bool biased : {false, true}) {
    const float powers_of_rows[2] = {1.f, 1048576.f};
    GateRowsArguments g = {};
    g.y = y.data(); g.out = gated.data(); g.powers = powers_of_rows; g.bias = biased ? bias.data() : nullptr;
    g.inner = inner; g.width = width; g.activation = 3;  // ReLU
    auto gate = [&g] { gate_rows<Bfloat>(g); };
    launch(2, 32, 32, gate);
    for (int row = 0; row < 2; row++) {
      bool right = true;
      for (int i = 0; i < inner; i++) {
        auto number = [&](int at) { return to_float(y[row * width + at]) * powers_of_rows[row] + (biased ? to_float(bias[at]) : 0.f); };
        const float wanted = fmaxf(number(i / 8 * 16 + i % 8), 0.f) * number(i / 8 * 16 + 8 + i % 8);
        right = right && fabsf(from_bfloat(gated[row * inner + i]) - wanted) <= 4e-3f * fabsf(wanted);
      }
      say(biased ? "gating with a bias" : "gating", row, right);
    }
  }
}
