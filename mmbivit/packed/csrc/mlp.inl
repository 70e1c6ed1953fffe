// The dual branch: an MLP over channels, and the spatial interaction over the tokens of a window.

namespace {

// Count the differing bits of 16 channels (vectors of token words) and one weight row along the tokens.
SIMD I16 differing_tokens(const uint32_t* tokens, const uint32_t* weight, int64_t words) {
    I16 counts = zero();
    for (int64_t w = 0; w < words; w++)
        counts = add_counts(counts, count_bits(bit_xor(load(tokens + w * 16), broadcast(weight[w]))));
    return widen_counts(counts);
}

// Signs along the tokens of 16 channels, then the hidden layer as bits, [hidden word][channel].
SIMD void mix_tokens_in(const MlpArgs* args, const MlpScratch& s, int64_t block) {
    const int64_t c = block * 16, left = args->channels - c, tokens = s.rows_at_once;
    const F16 gain = load_f(args->si_gain + c), shift = load_f(args->si_shift + c);
    for (int64_t w = 0; w < s.token_words; w++) {
        I16 word = zero();
        for (int64_t t = w * 32; t < tokens && t < w * 32 + 32; t++) {
            F16 y = zero_f();  // padding is 0 after the norm
            if (s.rows[t]) y = mul_add(left < 16 ? load_f(s.rows[t] + c, (int)left) : load_f(s.rows[t] + c), gain, shift);
            word = or_where(word, at_least_f(y, broadcast_f(args->si_gamma[t])), broadcast(1u << t % 32));
        }
        store(s.token_bits + w * 16, word);
    }
    for (int64_t w = 0; w < s.si_words; w++) {
        I16 word = zero();
        for (int64_t j = w * 32; j < args->si_hidden && j < w * 32 + 32; j++) {
            const I16 count = differing_tokens(s.token_bits, args->si1_weight + j * s.token_words, s.token_words);
            const M16 set = outside(count, broadcast(args->si1_low[j]), broadcast(args->si1_width[j]));
            word = or_where(word, set, broadcast(1u << j % 32));
        }
        store(s.si_hidden + (block * s.si_words + w) * 16, word);
    }
}

// The branch's output of 16 channels, added to the real tokens.
SIMD void mix_tokens_out(const MlpArgs* args, const MlpScratch& s, int64_t block) {
    const int64_t c = block * 16, left = args->channels - c;
    const F16 alpha = load_f(args->si_alpha + c);
    for (int64_t t = 0; t < s.rows_at_once; t++) {
        if (!s.rows[t]) continue;
        const uint32_t* hidden = s.si_hidden + block * s.si_words * 16;
        const I16 count = differing_tokens(hidden, args->si2_weight + t * s.si_words, s.si_words);
        const F16 mixed = mul_add(to_float(accumulator(count, args->si_hidden)), broadcast_f(args->si2_scale[t]),
                                  broadcast_f(args->si2_bias[t]));
        float* x = s.rows[t] + c;
        if (left < 16)
            store_f(x, mul_add(alpha, mixed, load_f(x, (int)left)), (int)left);
        else
            store_f(x, mul_add(alpha, mixed, load_f(x)));
    }
}

void mlp(const MlpArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const MlpScratch s(args, worker->memory);
    const int64_t words = words_of(args->channels), hidden_words = words_of(args->hidden);
    const int64_t blocks = blocks_of(args->channels), hidden_blocks = blocks_of(args->hidden);
    const int64_t all_rows = args->layout.batch * args->layout.height * args->layout.width;
    if (hidden_blocks % 2) memset(s.hidden, 0, s.rows_at_once * hidden_words * sizeof(uint32_t));
    for (int64_t unit = begin; unit < end; unit++) {
        if (args->si_gain)
            find_tokens(args->layout, args->x, args->channels, unit, s);
        else
            for (int64_t t = 0, row = unit * ROWS_AT_A_TIME; t < s.rows_at_once; t++, row++)
                s.rows[t] = row < all_rows ? args->x + row * args->channels : nullptr;
        int64_t rows = 0;
        for (int64_t t = 0; t < s.rows_at_once; t++) {
            if (!s.rows[t]) continue;
            pack_row(s.rows[t], args->gain, args->shift, args->channels, s.bits + rows * words);
            s.real_rows[rows++] = s.rows[t];
        }
        timer.lap(PHASE_PACK);
        if (args->si_gain) {
            for (int64_t b = 0; b < blocks; b++) mix_tokens_in(args, s, b);
            timer.lap(PHASE_SI);
        }
        const ToRowBits to_hidden = {args->fc1_low, args->fc1_width, halves(s.hidden), hidden_words * 2};
        count_differing(s.bits, rows, words, args->fc1_weight, hidden_blocks, to_hidden);
        timer.lap(PHASE_FC1);
        const ToFloats<true, false> to_x = {s.real_rows, s.real_rows, args->fc2_scale, args->fc2_bias,
                                            nullptr, args->hidden, args->channels, 0};
        count_differing(s.hidden, rows, hidden_words, args->fc2_weight, blocks, to_x);
        timer.lap(PHASE_FC2);
        if (args->si_gain) {
            for (int64_t b = 0; b < blocks; b++) mix_tokens_out(args, s, b);
            timer.lap(PHASE_SI);
        }
    }
}

}  // namespace
