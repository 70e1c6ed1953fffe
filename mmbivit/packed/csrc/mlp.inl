// The dual branch: an MLP over channels, and the spatial interaction over the tokens of a window.

namespace {

// Count the differing bits of 16 channels (vectors of token words) and each of ROWS weight rows along the tokens.
template <int ROWS>
SIMD void differing_tokens(const uint32_t* tokens, const uint32_t* weight, int64_t words, I16* total) {
    for (int r = 0; r < ROWS; r++) total[r] = zero();
    for (int64_t start = 0; start < words; start += COUNTS_AT_MOST) {
        const int64_t end = words - start < COUNTS_AT_MOST ? words : start + COUNTS_AT_MOST;
        I16 counts[ROWS];
        for (int r = 0; r < ROWS; r++) counts[r] = zero();
        for (int64_t w = start; w < end; w++) {
            const I16 bits = load(tokens + w * 16);
            for (int r = 0; r < ROWS; r++)
                counts[r] = add_counts(counts[r], count_bits(bit_xor(bits, broadcast(weight[r * words + w]))));
        }
        for (int r = 0; r < ROWS; r++) total[r] = add(total[r], widen_counts(counts[r]));
    }
}

// Hand the count of each weight row to `emit(row, count)`, several rows at a time.
template <class Emit>
SIMD void all_differing_tokens(const uint32_t* tokens, const uint32_t* weight, int64_t words, int64_t rows,
                               const Emit& emit) {
    I16 counts[4];
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
        differing_tokens<4>(tokens, weight + row * words, words, counts);
        for (int r = 0; r < 4; r++) emit(row + r, counts[r]);
    }
    for (; row < rows; row++) {
        differing_tokens<1>(tokens, weight + row * words, words, counts);
        emit(row, counts[0]);
    }
}

// The branch's output of 16 channels, added to a real token.
struct ToTokens {
    float* const* rows;
    const float *scale, *bias;
    F16 alpha;
    int64_t hidden, channel;
    int left;

    METHOD void operator()(int64_t token, I16 count) const {
        if (!rows[token]) return;
        float* x = rows[token] + channel;
        const F16 mixed = mul_add(to_float(accumulator(count, hidden)), broadcast_f(scale[token]), broadcast_f(bias[token]));
        if (left < 16)
            store_f(x, mul_add(alpha, mixed, load_f(x, left)), left);
        else
            store_f(x, mul_add(alpha, mixed, load_f(x)));
    }
};

SIMD int channels_left(const MlpArgs* args, int64_t block) {
    return args->channels - block * 16 < 16 ? (int)(args->channels - block * 16) : 16;
}

// A token of 16 channels after the norm, which leaves padding 0.
SIMD F16 normed_token(const MlpArgs* args, const MixScratch& s, int64_t t, int64_t block, F16 gain, F16 shift) {
    if (!s.rows[t]) return zero_f();
    const float* x = args->normed + (s.rows[t] - args->x) + block * 16;
    const int left = channels_left(args, block);
    return mul_add(left < 16 ? load_f(x, left) : load_f(x), gain, shift);
}

SIMD ToTokens to_tokens(const MlpArgs* args, const MixScratch& s, int64_t block) {
    return {s.rows, args->si2_scale, args->si2_bias, load_f(args->si_alpha + block * 16), args->si_hidden, block * 16,
            channels_left(args, block)};
}

#ifdef LOOKUP_PAIRS
#include "mix.inl"
#else
// Hidden bits of 16 channels, [hidden word][channel]; `out` starts as 0.
struct ToMixedBits {
    const uint32_t *low, *width;
    uint32_t* out;

    METHOD void operator()(int64_t row, I16 count) const {
        uint32_t* word = out + row / 32 * 16;
        const M16 set = outside(count, broadcast(low[row]), broadcast(width[row]));
        store(word, or_where(load(word), set, broadcast(1u << row % 32)));
    }
};

// The branch for two blocks of channels at a time; hidden bits of each take 16 channels x hidden words.
struct Mixer {
    const MlpArgs* args;
    const MixScratch& s;

    METHOD Mixer(const MlpArgs* args, const MixScratch& s, bool) : args(args), s(s) {}
    // Signs along the tokens, then the hidden layer as bits.
    METHOD void in(int64_t pair, uint32_t* hidden) const {
        for (int64_t block = 2 * pair; block < 2 * pair + 2 && block < s.blocks; block++, hidden += s.si_words * 16) {
            const F16 gain = load_f(args->si_gain + block * 16), shift = load_f(args->si_shift + block * 16);
            for (int64_t w = 0; w < s.token_words; w++) {
                I16 word = zero();
                for (int64_t t = w * 32; t < s.tokens && t < w * 32 + 32; t++) {
                    const F16 y = normed_token(args, s, t, block, gain, shift);
                    word = or_where(word, at_least_f(y, broadcast_f(args->si_gamma[t])), broadcast(1u << t % 32));
                }
                store(s.token_bits + w * 16, word);
            }
            memset(hidden, 0, s.si_words * 16 * sizeof(uint32_t));
            const ToMixedBits emit = {args->si1_low, args->si1_width, hidden};
            all_differing_tokens(s.token_bits, args->si1_weight, s.token_words, args->si_hidden, emit);
        }
    }
    METHOD void out(int64_t pair, const uint32_t* hidden) const {
        for (int64_t block = 2 * pair; block < 2 * pair + 2 && block < s.blocks; block++, hidden += s.si_words * 16)
            all_differing_tokens(hidden, args->si2_weight, s.si_words, s.tokens, to_tokens(args, s, block));
    }
};
#endif

// One half of the spatial interaction alone, for two blocks of channels of a window at a time: where windows are so large
// that whole ones are too few to share out. Hidden bits lie in `args->si_bits`, 16 channels x hidden words for each block.
template <bool IN>
void mix(const MlpArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const MixScratch s(args, worker->memory);
    const Mixer mixer(args, s, true);
    const int64_t pairs = ceil_div(s.blocks, 2);
    for (int64_t unit = begin; unit < end; unit++) {
        if (unit == begin || unit % pairs == 0) find_tokens(args->layout, args->x, args->channels, unit / pairs, s);
        uint32_t* hidden = args->si_bits + unit * 2 * s.si_words * 16;
        IN ? mixer.in(unit % pairs, hidden) : mixer.out(unit % pairs, hidden);
    }
    timer.lap(PHASE_SI);
}

void mix_in(const MlpArgs* args, int64_t begin, int64_t end, Worker* worker) { mix<true>(args, begin, end, worker); }
void mix_out(const MlpArgs* args, int64_t begin, int64_t end, Worker* worker) { mix<false>(args, begin, end, worker); }

// Both branches of a window at a time; or the MLP of rows, without a spatial interaction or with that in `mix`.
void mlp(const MlpArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const MlpScratch s(args, worker->memory);
    const bool mixes = mixes_inside(args);
    const Mixer mixer(args, s, mixes);
    const int64_t words = words_of(args->channels), hidden_words = words_of(args->hidden);
    const int64_t hidden_blocks = blocks_of(args->hidden), pairs = ceil_div(s.blocks, 2), pair_words = 2 * s.si_words * 16;
    if (hidden_blocks % 2) memset(s.hidden, 0, s.tokens * hidden_words * sizeof(uint32_t));
    for (int64_t unit = begin; unit < end; unit += mixes ? 1 : s.tokens) {
        if (mixes)
            find_tokens(args->layout, args->x, args->channels, unit, s);
        else
            for (int64_t t = 0; t < s.tokens; t++) s.rows[t] = unit + t < end ? args->x + (unit + t) * args->channels : nullptr;
        int64_t rows = 0;
        for (int64_t t = 0; t < s.tokens; t++) {
            if (!s.rows[t]) continue;
            const float* normed = args->normed + (s.rows[t] - args->x);
            pack_row(normed, args->gain, args->shift, args->channels, s.bits + rows * words);
            s.real_rows[rows++] = s.rows[t];
        }
        timer.lap(PHASE_PACK);
        if (mixes) {
            for (int64_t p = 0; p < pairs; p++) mixer.in(p, s.si_hidden + p * pair_words);
            timer.lap(PHASE_SI);
        }
        const ToRowBits to_hidden = {{args->fc1_low, args->fc1_width}, halves(s.hidden), hidden_words * 2};
        count_differing(s.bits, rows, words, args->fc1_weight, hidden_blocks, to_hidden);
        timer.lap(PHASE_FC1);
        const ToFloats<true, false> to_x = {s.real_rows, s.real_rows, args->fc2_scale, args->fc2_bias,
                                            nullptr, args->hidden, args->channels, 0};
        count_differing(s.hidden, rows, hidden_words, args->fc2_weight, s.blocks, to_x);
        timer.lap(PHASE_FC2);
        if (mixes) {
            for (int64_t p = 0; p < pairs; p++) mixer.out(p, s.si_hidden + p * pair_words);
            timer.lap(PHASE_SI);
        }
    }
}

}  // namespace
