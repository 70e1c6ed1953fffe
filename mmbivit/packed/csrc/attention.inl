// Window attention on bits. Window partition and cyclic shift are index arithmetic.

namespace {

// Which third of a shifted axis a position belongs to: parts of one window that were not neighbours.
SIMD int region_of(int64_t position, int64_t length, int64_t window, int64_t shift) {
    return shift ? (position >= length - window) + (position >= length - shift) : 0;
}

// Find the tokens of a window; returns whether some of them must not attend to others.
bool find_tokens(const Layout& layout, float* x, int64_t channels, int64_t index, const WindowScratch& scratch) {
    const int64_t size = layout.window;
    const int64_t height = ceil_div(layout.height, size) * size, width = ceil_div(layout.width, size) * size;
    const int64_t across = width / size, per_image = height / size * across;
    const int64_t image = index / per_image, top = index % per_image / across * size, left = index % across * size;
    bool regions = false;
    for (int64_t t = 0; t < size * size; t++) {
        const int64_t y = top + t / size, x_ = left + t % size;
        const int64_t source_y = (y + layout.shift) % height, source_x = (x_ + layout.shift) % width;
        const bool real = source_y < layout.height && source_x < layout.width;
        scratch.rows[t] = real ? x + ((image * layout.height + source_y) * layout.width + source_x) * channels : nullptr;
        scratch.regions[t] = region_of(y, height, size, layout.shift) * 3 + region_of(x_, width, size, layout.shift);
        if (!real && layout.mask_padding) scratch.regions[t] = -1;
        regions |= scratch.regions[t] != scratch.regions[0];
    }
    return regions;
}

// Bits of the keys each query may attend to, [token][word].
void find_allowed(const int32_t* regions, int64_t tokens, int64_t words, uint32_t* allowed) {
    for (int64_t query = 0; query < tokens; query++) {
        uint32_t* row = allowed + query * words;
        int64_t same = 0;
        while (regions[same] != regions[query]) same++;
        if (same < query) {  // the mask of a region is found once
            memcpy(row, allowed + same * words, words * sizeof(uint32_t));
            continue;
        }
        memset(row, 0, words * sizeof(uint32_t));
        for (int64_t key = 0; key < tokens; key++)
            row[key / 32] |= (uint32_t)(regions[key] == regions[query]) << key % 32;
    }
}

// e^x of x <= 0: 2^n times the Taylor series of what is left of x, up to half of ln 2.
SIMD F16 exp_f(F16 x) {
    x = max_f(x, broadcast_f(-87.0f));
    const F16 whole = broadcast_f(12582912.0f);  // 1.5 * 2^23: floats from here on are whole numbers
    const F16 shifted = mul_add(x, broadcast_f(1.44269504f), whole);
    const F16 n = sub_f(shifted, whole);
    // ln 2 in two parts, so that the first product is exact
    const F16 left = mul_add(n, broadcast_f(2.12194440e-4f), mul_add(n, broadcast_f(-0.693359375f), x));
    F16 y = broadcast_f(1.0f / 5040);
    const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float factor : factors) y = mul_add(y, left, broadcast_f(factor));
    return mul_f(y, as_floats(add(to_exponent(as_bits(shifted)), broadcast(127u << 23))));
}

SIMD float sum_lanes(F16 a) {
    float lanes[16], sum = 0;
    store_f(lanes, a);
    for (float lane : lanes) sum += lane;
    return sum;
}

// Select the keys of one query and return how many they are. VECTORS is the number of key vectors, 0 if only known
// at run time.
template <int VECTORS>
SIMD int select_keys(const uint32_t* query, const uint32_t* keys, int64_t head_words, int64_t padded,
                     const float* bias, const uint32_t* allowed, const Selection& choice, int64_t head,
                     uint32_t* selected) {
    const int vectors = VECTORS ? VECTORS : (int)(padded / 16);
    const F16 step = broadcast_f(-choice.step[head]);
    F16 scores[VECTORS ? VECTORS : MOST_TOKEN_VECTORS];
    F16 best = broadcast_f(-INFINITY);
    for (int v = 0; v < vectors; v++) {
        I16 counts = zero();
        for (int64_t w = 0; w < head_words; w++)
            counts = add_counts(counts, count_bits(bit_xor(broadcast(query[w * padded]), load(keys + w * padded + v * 16))));
        scores[v] = mul_add(to_float(widen_counts(counts)), step, load_f(bias + v * 16));
        if (allowed)
            scores[v] = where_f(mask_from_bits(allowed[v / 2] >> v % 2 * 16 & 0xffff), scores[v], broadcast_f(-INFINITY));
        best = max_f(best, scores[v]);
    }
    const float highest = max_lane(best);
    float lowest = choice.limit[head];
    if (choice.kind == SELECT_BELOW_BEST) lowest += highest;
    if (choice.kind == SELECT_SHARE) {
        F16 sum = zero_f();
        for (int v = 0; v < vectors; v++) sum = add_f(sum, exp_f(sub_f(scores[v], broadcast_f(highest))));
        lowest += highest + logf(sum_lanes(sum));
    }
    const F16 limit = broadcast_f(lowest);
    int number = 0;
    for (int v = 0; v < vectors; v += 2) {
        uint32_t bits = mask_bits(at_least_f(scores[v], limit));
        if (v + 1 < vectors) bits |= mask_bits(at_least_f(scores[v + 1], limit)) << 16;
        selected[v / 2] = bits;
        number += popcount(bits);
    }
    return number;
}

template <int VECTORS>
void attend(const AttentionArgs* args, const AttentionScratch& s, int64_t queries, bool masked) {
    const int64_t head_channels = s.head_blocks * 16, channels = args->heads * head_channels;
    for (int64_t head = 0; head < args->heads; head++) {
        const uint32_t* keys = s.keys + head * s.head_words * s.padded_tokens;
        for (int64_t q = 0; q < queries; q++) {
            const int64_t token = s.real[q];
            const float number = (float)select_keys<VECTORS>(
                s.queries + head * s.head_words * s.padded_tokens + token, keys, s.head_words, s.padded_tokens,
                args->bias + (head * s.tokens + token) * s.padded_tokens,
                masked ? s.allowed + token * s.token_words : nullptr, args->selection, head, s.selected);
            for (int64_t b = 0; b < s.head_blocks; b++) {
                const int64_t c = head * head_channels + b * 16;
                I16 counts = zero();
                for (int64_t w = 0; w < s.token_words; w++)
                    counts = add_counts(
                        counts, count_bits(bit_and(load(s.values + w * channels + c), broadcast(s.selected[w]))));
                F16 needed = mul_f(load_f(args->value_ratio + c), broadcast_f(number));
                if (args->value_offset) needed = add_f(needed, load_f(args->value_offset + c));
                halves(s.out + q * s.out_words)[c / 16] =
                    (uint16_t)mask_bits(at_least_f(to_float(widen_counts(counts)), needed));
            }
        }
    }
}

void attention(const AttentionArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const AttentionScratch s(args, worker->memory);
    const int64_t words = words_of(args->channels), blocks = args->heads * s.head_blocks, padded = blocks * 16;
    const int64_t head_size = s.head_words * s.padded_tokens;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t part = b % s.head_blocks;
        s.offsets[b] = (int32_t)((b / s.head_blocks * head_size + part / 2 * s.padded_tokens) * 2 + part % 2);
    }
    if (s.head_blocks % 2) {  // half of the last word stays empty
        memset(s.queries, 0, args->heads * head_size * sizeof(uint32_t));
        memset(s.keys, 0, args->heads * head_size * sizeof(uint32_t));
    }
    if (blocks % 2) memset(s.out, 0, s.tokens * s.out_words * sizeof(uint32_t));
    for (int64_t window = begin; window < end; window++) {
        const bool masked = find_tokens(args->layout, args->x, args->channels, window, s);
        if (masked) find_allowed(s.regions, s.tokens, s.token_words, s.allowed);
        int64_t queries = 0;
        for (int64_t t = 0; t < s.tokens; t++) {
            if (s.rows[t]) {
                const float* normed = args->normed + (s.rows[t] - args->x);
                pack_row(normed, args->gain, args->shift, args->channels, s.bits + t * words);
                s.real[queries] = (int32_t)t;
                s.real_rows[queries++] = s.rows[t];
            } else {
                memcpy(s.bits + t * words, args->padding, words * sizeof(uint32_t));
            }
        }
        timer.lap(PHASE_PACK);
        const uint32_t *low = args->qkv_low, *width = args->qkv_width, *weight = args->qkv_weight;
        const ToHeadBits to_queries = {low, width, halves(s.queries), s.offsets};
        const ToHeadBits to_keys = {low + padded, width + padded, halves(s.keys), s.offsets};
        const ToTokenBits to_values = {low + 2 * padded, width + 2 * padded, s.values, padded};
        memset(s.values, 0, s.token_words * padded * sizeof(uint32_t));
        count_differing(s.bits, s.tokens, words, weight, blocks, to_queries);
        count_differing(s.bits, s.tokens, words, weight + padded * words, blocks, to_keys);
        count_differing(s.bits, s.tokens, words, weight + 2 * padded * words, blocks, to_values);
        timer.lap(PHASE_QKV);
        (s.padded_tokens == 64 ? attend<4> : s.padded_tokens == 16 ? attend<1> : attend<0>)(args, s, queries, masked);
        timer.lap(PHASE_ATTENTION);
        const ToFloats<true, false> to_x = {s.real_rows, s.real_rows, args->proj_scale, args->proj_bias,
                                            nullptr, args->heads * args->head_dim, args->channels, 0};
        count_differing(s.out, queries, s.out_words, args->proj_weight, blocks_of(args->channels), to_x);
        timer.lap(PHASE_PROJ);
    }
}

}  // namespace
