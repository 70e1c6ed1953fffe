// The branch over tokens by half bytes: bits of 32 channels lie in vectors of bytes, as weights do in `look_up`, and weight
// rows take the place of rows.

// Bytes of all bits, or none, of two blocks.
SIMD __m256i bytes_of(M16 first, M16 second) {
    const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(first.a, first.b), _mm256_packs_epi32(second.a, second.b));
    return _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Where the half byte with value i lies; see `find_places`.
SIMD int64_t half_byte_of(int64_t i) { return i / 32 * 8 + i % 8 / 4 * 4 + i % 32 / 8; }

// Hidden bits; `out` starts as 0.
struct ToMixedBits {
    const uint32_t *low, *width;
    __m256i* out;

    METHOD void operator()(int64_t row, int, Pair counts) const {
        const __m256i first = _mm256_set1_epi16((short)low[row]), range = _mm256_set1_epi16((short)width[row]);
        const __m256i bit = _mm256_set1_epi8((char)(1 << row % 8));
        const __m256i bits = _mm256_and_si256(outside(counts, {first, first}, {range, range}), bit);
        _mm256_store_si256(out + row / 8, _mm256_or_si256(_mm256_load_si256(out + row / 8), bits));
    }
};

// The branch's output of two blocks.
struct ToPairTokens {
    ToTokens first, second;
    bool both;

    METHOD void operator()(int64_t token, int, Pair counts) const {
        first(token, counts.block(0));
        if (both) second(token, counts.block(1));
    }
};

// For two blocks of channels at a time; hidden bits of both are vectors of bytes, [hidden byte][channel].
struct Mixer {
    const MlpArgs* args;
    const MixScratch& s;
    const RowsToCount in_rows, out_rows;

    METHOD Mixer(const MlpArgs* args, const MixScratch& s, bool used)
        : args(args),
          s(s),
          in_rows(args->si1_weight, used ? args->si_hidden : 0, s.token_words),
          out_rows(args->si2_weight, used ? s.tokens : 0, s.si_words) {}
    METHOD __m256i* half_bytes() const { return reinterpret_cast<__m256i*>(s.token_bits); }
    METHOD void clear_from(int64_t i) const {
        for (; i % 3; i++) _mm256_store_si256(half_bytes() + i, _mm256_setzero_si256());
    }
    // Signs along the tokens, then the hidden layer as bits.
    METHOD void in(int64_t pair, uint32_t* hidden) const {
        const int64_t block = 2 * pair, other = block + 1 < s.blocks ? block + 1 : block;
        const F16 gain[2] = {load_f(args->si_gain + block * 16), load_f(args->si_gain + other * 16)};
        const F16 shift[2] = {load_f(args->si_shift + block * 16), load_f(args->si_shift + other * 16)};
        __m256i* signs = half_bytes();
        for (int64_t t = 0; t < s.token_words * 32; t += 4) {
            __m256i bits = _mm256_setzero_si256();
            for (int64_t i = t; i < t + 4 && i < s.tokens; i++) {
                const F16 gamma = broadcast_f(args->si_gamma[i]);
                const M16 first = at_least_f(normed_token(args, s, i, block, gain[0], shift[0]), gamma);
                const M16 second = at_least_f(normed_token(args, s, i, other, gain[1], shift[1]), gamma);
                bits = _mm256_or_si256(bits, _mm256_and_si256(bytes_of(first, second), _mm256_set1_epi8((char)(1 << i % 4))));
            }
            _mm256_store_si256(signs + half_byte_of(t), bits);
        }
        clear_from(s.token_words * 8);
        memset(hidden, 0, s.si_words * 128);
        const ToMixedBits to_hidden = {args->si1_low, args->si1_width, reinterpret_cast<__m256i*>(hidden)};
        look_up_rows<1>(DIFFERING_BITS, in_rows, reinterpret_cast<const uint8_t*>(signs), to_hidden);
    }
    METHOD void out(int64_t pair, const uint32_t* hidden) const {
        const int64_t block = 2 * pair, other = block + 1 < s.blocks ? block + 1 : block;
        const __m256i low = _mm256_set1_epi8(15);
        __m256i* bits = half_bytes();
        for (int64_t i = 0; i < s.si_words * 4; i++) {
            const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(hidden) + i);
            _mm256_store_si256(bits + half_byte_of(i * 8), _mm256_and_si256(bytes, low));
            _mm256_store_si256(bits + half_byte_of(i * 8 + 4), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
        }
        clear_from(s.si_words * 8);
        const ToPairTokens to_x = {to_tokens(args, s, block), to_tokens(args, s, other), other > block};
        look_up_rows<1>(DIFFERING_BITS, out_rows, reinterpret_cast<const uint8_t*>(bits), to_x);
    }
};
