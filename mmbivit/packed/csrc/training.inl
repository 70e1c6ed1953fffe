// Training: signs with the bits of their straight-through gradient, binary weights, and what the backward pass takes from
// bits. Sums over rows are added up step by step (`step` rows each), so that they depend on no schedule.

namespace {

SIMD uint32_t inside_bits(F16 x) {
    return mask_bits(at_least_f(x, broadcast_f(-1.0f))) & mask_bits(at_least_f(broadcast_f(1.0f), x));
}

// Signs of x - shift as bits, and where |x - shift| <= 1; `shift(c)` returns 16 lanes, `read(c, n)` those of x.
template <class Read, class Shift>
SIMD void sign_row(int64_t k, const Read& read, const Shift& shift, uint32_t* bits, uint32_t* inside) {
    uint16_t *sign_half = halves(bits), *inside_half = halves(inside);
    for (int64_t c = 0; c < k; c += 16) {
        const int n = k - c < 16 ? (int)(k - c) : 16;
        const uint32_t valid = n < 16 ? (1u << n) - 1 : 0xffffu;
        const F16 x = sub_f(read(c, n), shift(c, n));
        *sign_half++ = (uint16_t)(mask_bits(at_least_f(x, zero_f())) & valid);
        *inside_half++ = (uint16_t)(inside_bits(x) & valid);
    }
    if (blocks_of(k) % 2) *sign_half = *inside_half = 0;
}

SIMD F16 load_some(const float* p, int n) { return n < 16 ? load_f(p, n) : load_f(p); }
SIMD void store_some(float* p, F16 x, int n) { n < 16 ? store_f(p, x, n) : store_f(p, x); }

// -1 and +1 of the lower 16 bits.
SIMD F16 signs_of(uint32_t bits) {
    return where_f(mask_from_bits(bits & 0xffff), broadcast_f(1.0f), broadcast_f(-1.0f));
}

SIMD uint32_t half_of(const uint32_t* words, int64_t c) { return reinterpret_cast<const uint16_t*>(words)[c / 16]; }

void sign_bits(const SignBitsArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const int64_t k = args->k, words = words_of(k);
    for (int64_t row = begin; row < end; row++) {
        const float* x = args->x + row * k;
        uint32_t* bits = args->bits + row * words;
        const auto read = [&](int64_t c, int n) { return load_some(x + c, n); };
        if (args->gamma)
            sign_row(k, read, [&](int64_t c, int n) { return load_some(args->gamma + c, n); }, bits, args->inside + row * words);
        else
            sign_row(k, read, [&](int64_t, int) { return zero_f(); }, bits, args->inside + row * words);
        if (args->signs)
            for (int64_t c = 0; c < k; c += 16)
                store_some(args->signs + row * k + c, signs_of(half_of(bits, c)), k - c < 16 ? (int)(k - c) : 16);
    }
    timer.lap(PHASE_PACK);
}

// Bits as -scale and +scale.
void unpack(const UnpackArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const int64_t k = args->k, words = words_of(k);
    for (int64_t row = begin; row < end; row++) {
        const uint32_t* bits = args->bits + row * words;
        const F16 scale = broadcast_f(args->scale ? args->scale[row] : 1.0f);
        for (int64_t c = 0; c < k; c += 16)
            store_some(args->out + row * k + c, mul_f(signs_of(half_of(bits, c)), scale), k - c < 16 ? (int)(k - c) : 16);
    }
    timer.lap(PHASE_PACK);
}

// grad *= inside, and the sums of its columns.
void pass_inside(const PassInsideArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const int64_t k = args->k, words = words_of(k);
    float* sums = args->sums ? args->sums + begin / args->step * blocks_of(k) * 16 : nullptr;
    for (int64_t row = begin; row < end; row++) {
        const uint32_t* inside = args->inside + row * words;
        float* grad = args->grad + row * k;
        for (int64_t c = 0; c < k; c += 16) {
            const int n = k - c < 16 ? (int)(k - c) : 16;
            const F16 passed = where_f(mask_from_bits(half_of(inside, c)), load_some(grad + c, n), zero_f());
            store_some(grad + c, passed, n);
            if (sums) store_f(sums + c, add_f(load_f(sums + c), passed));
        }
    }
    timer.lap(PHASE_PACK);
}

// scale * sum + bias, and RPReLU if there is one, of bit rows.
void bits_linear(const BitsLinearArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const int64_t words = words_of(args->k), blocks = blocks_of(args->n);
    float* rows[ROWS_AT_A_TIME];
    for (int64_t first = begin; first < end; first += ROWS_AT_A_TIME) {
        const int64_t number = end - first < ROWS_AT_A_TIME ? end - first : ROWS_AT_A_TIME;
        for (int64_t row = 0; row < number; row++) rows[row] = args->out + (first + row) * args->n;
        const auto multiply = [&](const auto& emit) {
            count_differing(args->bits + first * words, number, words, args->weight, blocks, emit);
        };
        if (args->rprelu)
            multiply(ToFloats<false, true>{rows, nullptr, args->scale, args->bias, args->rprelu, args->k, args->n, blocks * 16});
        else
            multiply(ToFloats<false, false>{rows, nullptr, args->scale, args->bias, nullptr, args->k, args->n, 0});
    }
    timer.lap(PHASE_LINEAR);
}

// The gradient of RPReLU at y of row and channels c to c + n: of its input, and added to the sums of gamma, slope, zeta.
struct RPReLUGradient {
    const float *act, *grad;
    float *out, *sums;
    int64_t n, padded;

    METHOD void operator()(int64_t row, int64_t c, F16 y) const {
        const int left = n - c < 16 ? (int)(n - c) : 16;
        const F16 shifted = sub_f(y, load_f(act + c)), grad_out = load_some(grad + row * n + c, left);
        const F16 negative = min_f(shifted, zero_f());
        const F16 falls = mul_f(grad_out, load_f(act + padded + c));
        // where shifted is 0, so is its slope's side: as torch has it, the gradient takes the slope there
        const F16 passed = where_f(at_least_f(zero_f(), shifted), falls, grad_out);
        store_some(out + row * n + c, passed, left);
        float *gamma = sums + c, *slope = sums + padded + c, *zeta = sums + 2 * padded + c;
        store_f(gamma, sub_f(load_f(gamma), passed));
        store_f(slope, mul_add(grad_out, negative, load_f(slope)));
        store_f(zeta, add_f(load_f(zeta), grad_out));
    }
};

struct ToRPReLUGradient {
    RPReLUGradient gradient;
    const float *scale, *bias;
    int64_t k, first;

    METHOD I16 start(int64_t) const { return zero(); }
    METHOD void operator()(int64_t row, int64_t block, I16 count) const {
        const int64_t c = block * 16;
        gradient(first + row, c, mul_add(to_float(accumulator(count, k)), load_f(scale + c), load_f(bias + c)));
    }
};

// The product's input of an RPReLU is computed again from bits, or given.
void rprelu_gradients(const RPReLUGradientsArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const int64_t words = words_of(args->k), blocks = blocks_of(args->n), padded = blocks * 16;
    float* sums = args->sums + begin / args->step * 3 * padded;
    const RPReLUGradient gradient = {args->rprelu, args->grad, args->out, sums, args->n, padded};
    if (args->bits) {
        const ToRPReLUGradient emit = {gradient, args->scale, args->bias, args->k, begin};
        count_differing(args->bits + begin * words, end - begin, words, args->weight, blocks, emit);
    } else {
        for (int64_t row = begin; row < end; row++)
            for (int64_t c = 0; c < args->n; c += 16)
                gradient(row, c, load_some(args->y + row * args->n + c, args->n - c < 16 ? (int)(args->n - c) : 16));
    }
    timer.lap(PHASE_LINEAR);
}

// RPReLU of rows, in place.
void rprelu_rows(const RPReLUArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const int64_t n = args->n, padded = blocks_of(n) * 16;
    for (int64_t row = begin; row < end; row++)
        for (int64_t c = 0; c < n; c += 16) {
            const int left = n - c < 16 ? (int)(n - c) : 16;
            const float* act = args->rprelu + c;
            float* y = args->y + row * n + c;
            store_some(y, rprelu(load_some(y, left), load_f(act), load_f(act + padded), load_f(act + 2 * padded)), left);
        }
    timer.lap(PHASE_LINEAR);
}

SIMD float row_sum(const float* x, int64_t k, bool magnitudes) {
    double total = 0;  // of parts whose sums are exact enough in float
    for (int64_t start = 0; start < k; start += 256) {
        F16 sum = zero_f();
        for (int64_t c = start; c < k && c < start + 256; c += 16) {
            const F16 part = load_some(x + c, k - c < 16 ? (int)(k - c) : 16);
            sum = add_f(sum, magnitudes ? max_f(part, sub_f(zero_f(), part)) : part);
        }
        total += sum_lanes(sum);
    }
    return (float)total;
}

// Mean and mean magnitude of each row, and the signs of what lies around the mean.
void weight_bits(const WeightBitsArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const int64_t k = args->k, words = words_of(k);
    for (int64_t row = begin; row < end; row++) {
        const float* w = args->weight + row * k;
        if (args->centered) args->mean[row] = row_sum(w, k, false) / (float)k;
        args->scale[row] = row_sum(w, k, true) / (float)k;
        const F16 mean = broadcast_f(args->mean[row]);
        uint16_t* half = halves(args->bits + row * words);
        for (int64_t c = 0; c < k; c += 16) {
            const int n = k - c < 16 ? (int)(k - c) : 16;
            const uint32_t valid = n < 16 ? (1u << n) - 1 : 0xffffu;
            *half++ = (uint16_t)(mask_bits(at_least_f(sub_f(load_some(w + c, n), mean), zero_f())) & valid);
        }
        if (blocks_of(k) % 2) *half = 0;
    }
    timer.lap(PHASE_PACK);
}

// The gradient of latent weights: clipped, times the scale if it is asked for, less its mean if the weights were centred.
void weight_gradients(const WeightGradientsArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const int64_t k = args->k;
    for (int64_t row = begin; row < end; row++) {
        const float* w = args->weight + row * k;
        float* grad = args->grad + row * k;
        const F16 mean = broadcast_f(args->mean[row]), factor = broadcast_f(args->factor ? args->factor[row] : 1.0f);
        for (int64_t c = 0; c < k; c += 16) {
            const int n = k - c < 16 ? (int)(k - c) : 16;
            const uint32_t inside = inside_bits(sub_f(load_some(w + c, n), mean));
            const F16 passed = mul_f(load_some(grad + c, n), factor);
            store_some(grad + c, where_f(mask_from_bits(inside), passed, zero_f()), n);
        }
        if (!args->centered) continue;
        const F16 common = broadcast_f(row_sum(grad, k, false) / (float)k);
        for (int64_t c = 0; c < k; c += 16) {
            const int n = k - c < 16 ? (int)(k - c) : 16;
            store_some(grad + c, sub_f(load_some(grad + c, n), common), n);
        }
    }
    timer.lap(PHASE_PACK);
}

}  // namespace
