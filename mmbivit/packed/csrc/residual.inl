// Networks with a shortcut around every binary layer (ReactNet, BinaryViT): between products lie floats, not bits.

namespace {

// Signs of x - threshold as a bit row.
SIMD void pack_row_above(const float* x, const float* threshold, int64_t k, uint32_t* out) {
    uint16_t* half = halves(out);
    int64_t c = 0;
    for (; c + 16 <= k; c += 16) store_bits(half++, at_least_f(load_f(x + c), load_f(threshold + c)));
    if (c < k) {
        const uint32_t bits = mask_bits(at_least_f(load_f(x + c, (int)(k - c)), load_f(threshold + c)));
        *half++ = (uint16_t)(bits & ((1u << (k - c)) - 1));
    }
    if (blocks_of(k) % 2) *half = 0;
}

// gain * x + shift, or 0 for padding; whole blocks are written.
SIMD void norm_row(const float* x, const float* gain, const float* shift, int64_t k, float* out) {
    for (int64_t c = 0; c < k; c += 16) {
        F16 y = zero_f();
        if (x) y = mul_add(c + 16 <= k ? load_f(x + c) : load_f(x + c, (int)(k - c)), load_f(gain + c), load_f(shift + c));
        store_f(out + c, y);
    }
}

template <int GROUP>
SIMD void average(const float* x, int64_t group, float* out, int64_t n) {
    const int64_t size = GROUP ? GROUP : group;
    for (int64_t c = 0; c < n; c++) {
        float sum = 0;
        for (int64_t i = 0; i < size; i++) sum += x[c * size + i];
        out[c] = sum / (float)size;
    }
}

// R(x) of BinaryViT, Eq. 3: copies of x, or means of adjacent channels; nothing where neither width fits the other.
SIMD void bring_to_width(const float* x, int64_t k, float* out, int64_t n) {
    if (n % k == 0)
        for (int64_t c = 0; c < n; c += k) memcpy(out + c, x, k * sizeof(float));
    else if (k == 2 * n)
        average<2>(x, 2, out, n);
    else if (k == 3 * n)
        average<3>(x, 3, out, n);
    else if (k == 4 * n)
        average<4>(x, 4, out, n);
    else if (k % n == 0)
        average<0>(x, k / n, out, n);
    else
        memset(out, 0, n * sizeof(float));
}

// RPReLU(scale * accumulator + bias + skip), where `skip` lay before; or added to other rows.
template <bool ADD>
struct ToResidual {
    float* skip;  // rows of `stride` floats
    int64_t stride;
    float* const* rows;
    const float* out;  // (5, padded)
    int64_t k, n, padded;

    METHOD I16 start(int64_t) const { return zero(); }
    METHOD void operator()(int64_t row, int64_t block, I16 count) const {
        const int64_t c = block * 16;
        float* here = skip + row * stride + c;
        F16 y = mul_add(to_float(accumulator(count, k)), load_f(out + c), load_f(out + padded + c));
        y = rprelu(add_f(y, load_f(here)), load_f(out + 2 * padded + c), load_f(out + 3 * padded + c),
                   load_f(out + 4 * padded + c));
        if (!ADD)
            store_f(here, y);
        else if (c + 16 <= n)
            store_f(rows[row] + c, add_f(load_f(rows[row] + c), y));
        else
            store_f(rows[row] + c, add_f(load_f(rows[row] + c, (int)(n - c)), y), (int)(n - c));
    }
};

template <bool ADD>
void multiply(const uint32_t* bits, int64_t rows, const ResidualLayer& layer, int64_t k, int64_t n, float* skip,
              int64_t stride, float* const* to) {
    const ToResidual<ADD> emit = {skip, stride, to, layer.out, k, n, blocks_of(n) * 16};
    count_differing(bits, rows, words_of(k), layer.weight, blocks_of(n), emit);
}

void residual_linear(const ResidualLinearArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const ResidualRowScratch s(args, worker->memory);
    const int64_t rows = end - begin, k = args->k, n = args->n;
    for (int64_t row = 0; row < rows; row++) {
        norm_row(args->x + (begin + row) * k, args->gain, args->shift, k, s.normed);
        pack_row_above(s.normed, args->layer.threshold, k, s.bits + row * words_of(k));
        bring_to_width(s.normed, k, s.out + row * s.out_stride, n);
    }
    timer.lap(PHASE_PACK);
    multiply<false>(s.bits, rows, args->layer, k, n, s.out, s.out_stride, nullptr);
    for (int64_t row = 0; row < rows; row++)
        memcpy(args->out + (begin + row) * n, s.out + row * s.out_stride, n * sizeof(float));
    timer.lap(PHASE_LINEAR);
}

// ---------------------------------------------------------------------------------------------------------------
// Attention

// Signs of the queries, keys and values of a token, in the places where select_keys and the values below look for them.
SIMD void head_signs(const ResidualAttentionArgs* args, const ResidualAttentionScratch& s, int64_t token) {
    const int64_t value_channels = args->heads * s.head_blocks * 16;
    uint16_t* const out[2] = {halves(s.queries), halves(s.keys)};
    for (int64_t part = 0; part < 3; part++)
        for (int64_t head = 0; head < args->heads; head++)
            for (int64_t b = 0; b < s.head_blocks; b++) {
                const int64_t c = part * args->channels + head * args->head_dim + b * 16;
                const int64_t left = args->head_dim - b * 16;
                const F16 y = load_f(s.qkv + token * s.qkv_stride + c);
                const F16 threshold =
                    left < 16 ? load_f(args->head_threshold + c, (int)left) : load_f(args->head_threshold + c);
                const M16 set = at_least_f(y, threshold);
                if (part < 2) {
                    const uint32_t bits = left < 16 ? mask_bits(set) & ((1u << left) - 1) : mask_bits(set);
                    const int64_t word = (head * s.head_words + b / 2) * s.padded_tokens + token;
                    out[part][word * 2 + b % 2] = (uint16_t)bits;
                } else {
                    uint32_t* word = s.values + token / 32 * value_channels + (head * s.head_blocks + b) * 16;
                    store(word, or_where(load(word), set, broadcast(1u << token % 32)));
                }
            }
}

void window_head(const ResidualAttentionArgs* args, const ResidualAttentionScratch& s, const SelectScratch& own,
                 int64_t head, int64_t begin, int64_t end) {
    select_values(args, s, own, head, begin, end, [&](int64_t q, int64_t b, I16 counts, int number) {
        const F16 sum = to_float(sub(add(counts, counts), broadcast((uint32_t)number)));
        const F16 y = mul_f(sum, broadcast_f(args->divide ? 1.0f / (float)number : 1.0f));
        float* out = s.out + q * s.stride + head * args->head_dim + b * 16;
        const int64_t left = args->head_dim - b * 16;
        left < 16 ? store_f(out, y, (int)left) : store_f(out, y);
    });
}

// What becomes of the heads' output of each query.
SIMD void finish_heads(const ResidualAttentionArgs* args, const ResidualAttentionScratch& s, int64_t begin, int64_t end) {
    const float* out = args->head_out;
    for (int64_t q = begin; q < end; q++) {
        const float* qkv = s.qkv + s.real[q] * s.qkv_stride;
        for (int64_t c = 0; c < args->channels; c += 16) {
            float* here = s.out + q * s.stride + c;
            F16 y = mul_add(load_f(here), load_f(out + c), load_f(out + s.stride + c));
            if (args->head_shortcut)
                for (int64_t part = 0; part < 3; part++) y = add_f(y, load_f(qkv + part * args->channels + c));
            store_f(here, rprelu(y, load_f(out + 2 * s.stride + c), load_f(out + 3 * s.stride + c),
                                 load_f(out + 4 * s.stride + c)));
        }
    }
}

void prepare(const ResidualAttentionArgs*, const ResidualAttentionScratch&) {}

void window_qkv(const ResidualAttentionArgs* args, const ResidualAttentionScratch& s, int64_t begin, int64_t end,
                Timer& timer) {
    const int64_t channels = args->channels, words = words_of(channels);
    for (int64_t t = begin; t < end; t++) {
        // Until the heads are done, a row of the output is free for the normed token.
        float* normed = s.out + t * s.stride;
        norm_row(s.rows[t] ? args->normed + (s.rows[t] - args->x) : nullptr, args->gain, args->shift, channels, normed);
        pack_row_above(normed, args->qkv.threshold, channels, s.bits + t * words);
        bring_to_width(normed, channels, s.qkv + t * s.qkv_stride, 3 * channels);
    }
    timer.lap(PHASE_PACK);
    multiply<false>(s.bits + begin * words, end - begin, args->qkv, channels, 3 * channels, s.qkv + begin * s.qkv_stride,
                    s.qkv_stride, nullptr);
    for (int64_t t = begin; t < end; t++) head_signs(args, s, t);
    timer.lap(PHASE_QKV);
}

void window_project(const ResidualAttentionArgs* args, const ResidualAttentionScratch& s, int64_t begin, int64_t end) {
    const int64_t channels = args->channels, words = words_of(channels);
    finish_heads(args, s, begin, end);
    for (int64_t q = begin; q < end; q++)
        pack_row_above(s.out + q * s.stride, args->proj.threshold, channels, s.bits + q * words);
    multiply<true>(s.bits + begin * words, end - begin, args->proj, channels, channels, s.out + begin * s.stride, s.stride,
                   s.real_rows + begin);
}

void residual_attention(const ResidualAttentionArgs* args, int64_t begin, int64_t end, Worker* worker) {
    worker->shared ? step_of_windows<ResidualAttentionScratch>(args, begin, worker)
                   : whole_windows<ResidualAttentionScratch>(args, begin, end, worker);
}

// ---------------------------------------------------------------------------------------------------------------
// The MLP over channels, and the one over tokens

// R(x) over tokens, for one output token of 16 channels.
SIMD F16 bring_to_token(const float* x, int64_t k, int64_t n, int64_t token) {
    if (n % k == 0) return load_f(x + token % k * 16);
    if (k % n) return zero_f();
    F16 sum = zero_f();
    for (int64_t i = 0; i < k / n; i++) sum = add_f(sum, load_f(x + (token * (k / n) + i) * 16));
    return mul_f(sum, broadcast_f(1.0f / (float)(k / n)));
}

// A layer over tokens of 16 channels, given their counts.
struct ToMixedTokens {
    const float *x, *out;
    int64_t k, n;

    METHOD F16 operator()(int64_t token, I16 count) const {
        const F16 y = mul_add(to_float(accumulator(count, k)), broadcast_f(out[token]), broadcast_f(out[n + token]));
        return rprelu(add_f(y, bring_to_token(x, k, n, token)), broadcast_f(out[2 * n + token]),
                      broadcast_f(out[3 * n + token]), broadcast_f(out[4 * n + token]));
    }
};

// Signs of values above a threshold each, [value][channel], along the values: [word][channel].
SIMD void pack_tokens_above(const float* values, const float* threshold, int64_t number, uint32_t* out) {
    for (int64_t w = 0; w < words_of(number); w++) {
        I16 word = zero();
        for (int64_t t = w * 32; t < number && t < w * 32 + 32; t++)
            word = or_where(word, at_least_f(load_f(values + t * 16), broadcast_f(threshold[t])), broadcast(1u << t % 32));
        store(out + w * 16, word);
    }
}

SIMD int channels_left(const ResidualMlpArgs* args, int64_t block) {
    return args->channels - block * 16 < 16 ? (int)(args->channels - block * 16) : 16;
}

// The hidden layer of 16 channels, [hidden][channel].
SIMD void mix_tokens_in(const ResidualMlpArgs* args, const ResidualMixScratch& s, int64_t block, float* hidden) {
    const int64_t c = block * 16;
    const int left = channels_left(args, block);
    const F16 gain = load_f(args->si_gain + c), shift = load_f(args->si_shift + c);
    for (int64_t t = 0; t < s.tokens; t++) {
        F16 y = zero_f();  // padding is 0 after the norm
        if (s.rows[t]) {
            const float* normed = args->normed + (s.rows[t] - args->x) + c;
            y = mul_add(left < 16 ? load_f(normed, left) : load_f(normed), gain, shift);
        }
        store_f(s.token_values + t * 16, y);
    }
    pack_tokens_above(s.token_values, args->si1.threshold, s.tokens, s.token_bits);
    const ToMixedTokens mixed = {s.token_values, args->si1.out, s.tokens, args->si_hidden};
    all_differing_tokens(s.token_bits, args->si1.weight, s.token_words, args->si_hidden,
                         [&](int64_t row, I16 count) { store_f(hidden + row * 16, mixed(row, count)); });
}

SIMD void mix_tokens_out(const ResidualMlpArgs* args, const ResidualMixScratch& s, int64_t block, const float* hidden) {
    const int64_t c = block * 16;
    const int left = channels_left(args, block);
    const F16 alpha = load_f(args->si_alpha + c);
    pack_tokens_above(hidden, args->si2.threshold, args->si_hidden, s.si_bits);
    const ToMixedTokens mixed = {hidden, args->si2.out, args->si_hidden, s.tokens};
    all_differing_tokens(s.si_bits, args->si2.weight, s.si_words, s.tokens, [&](int64_t token, I16 count) {
        if (!s.rows[token]) return;
        float* x = s.rows[token] + c;
        if (left < 16)
            store_f(x, mul_add(alpha, mixed(token, count), load_f(x, left)), left);
        else
            store_f(x, mul_add(alpha, mixed(token, count), load_f(x)));
    });
}

// See `mix` in mlp.inl; hidden values lie in `args->si_values`, [window][pair][block][hidden][channel].
template <bool IN>
void residual_mix(const ResidualMlpArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const ResidualMixScratch s(args, worker->memory);
    const int64_t blocks = blocks_of(args->channels), pairs = ceil_div(blocks, 2);
    for (int64_t unit = begin; unit < end; unit++) {
        if (unit == begin || unit % pairs == 0) find_tokens(args->layout, args->x, args->channels, unit / pairs, s);
        float* hidden = args->si_values + unit * 2 * args->si_hidden * 16;
        for (int64_t block = unit % pairs * 2; block < unit % pairs * 2 + 2 && block < blocks; block++) {
            IN ? mix_tokens_in(args, s, block, hidden) : mix_tokens_out(args, s, block, hidden);
            hidden += args->si_hidden * 16;
        }
    }
    timer.lap(PHASE_SI);
}

void residual_mix_in(const ResidualMlpArgs* args, int64_t begin, int64_t end, Worker* worker) {
    residual_mix<true>(args, begin, end, worker);
}
void residual_mix_out(const ResidualMlpArgs* args, int64_t begin, int64_t end, Worker* worker) {
    residual_mix<false>(args, begin, end, worker);
}

// See `mlp` in mlp.inl.
void residual_mlp(const ResidualMlpArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const ResidualMlpScratch s(args, worker->memory);
    const int64_t channels = args->channels, hidden = args->hidden, blocks = blocks_of(channels);
    const int64_t words = words_of(channels), hidden_words = words_of(hidden);
    const bool mixes = mixes_inside(args);
    for (int64_t unit = begin; unit < end; unit += mixes ? 1 : s.tokens) {
        if (mixes)
            find_tokens(args->layout, args->x, channels, unit, s);
        else
            for (int64_t t = 0; t < s.tokens; t++) s.rows[t] = unit + t < end ? args->x + (unit + t) * channels : nullptr;
        int64_t rows = 0;
        for (int64_t t = 0; t < s.tokens; t++) {
            if (!s.rows[t]) continue;
            norm_row(args->normed + (s.rows[t] - args->x), args->gain, args->shift, channels, s.normed);
            pack_row_above(s.normed, args->fc1.threshold, channels, s.bits + rows * words);
            bring_to_width(s.normed, channels, s.hidden + rows * s.hidden_stride, hidden);
            s.real_rows[rows++] = s.rows[t];
        }
        timer.lap(PHASE_PACK);
        for (int64_t b = 0; mixes && b < blocks; b++) mix_tokens_in(args, s, b, s.si_values + b * args->si_hidden * 16);
        timer.lap(PHASE_SI);
        multiply<false>(s.bits, rows, args->fc1, channels, hidden, s.hidden, s.hidden_stride, nullptr);
        timer.lap(PHASE_FC1);
        for (int64_t row = 0; row < rows; row++) {
            const float* values = s.hidden + row * s.hidden_stride;
            pack_row_above(values, args->fc2.threshold, hidden, s.hidden_bits + row * hidden_words);
            bring_to_width(values, hidden, s.skip + row * s.stride, channels);
        }
        multiply<true>(s.hidden_bits, rows, args->fc2, hidden, channels, s.skip, s.stride, s.real_rows);
        timer.lap(PHASE_FC2);
        for (int64_t b = 0; mixes && b < blocks; b++) mix_tokens_out(args, s, b, s.si_values + b * args->si_hidden * 16);
        timer.lap(PHASE_SI);
    }
}

}  // namespace
