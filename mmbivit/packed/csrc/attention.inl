// Window attention on bits. Window partition and cyclic shift are index arithmetic.

namespace {

// Which third of a shifted axis a position belongs to: parts of one window that were not neighbours.
SIMD int region_of(int64_t position, int64_t length, int64_t window, int64_t shift) {
    return shift ? (position >= length - window) + (position >= length - shift) : 0;
}

// Find the tokens of a window; returns whether some of them must not attend to others.
bool find_tokens(const Layout& layout, float* x, int64_t channels, int64_t index, const WindowScratch& scratch) {
    const int64_t high = layout.window_height, wide = layout.window_width;
    const int64_t height = ceil_div(layout.height, high) * high, width = ceil_div(layout.width, wide) * wide;
    const int64_t across = width / wide, per_image = height / high * across;
    const int64_t image = index / per_image, top = index % per_image / across * high, left = index % across * wide;
    bool regions = false;
    int64_t t = 0;
    for (int64_t y = top; y < top + high; y++) {
        // the shift is less than a window, so that a side is passed once
        const int64_t source_y = y + layout.shift < height ? y + layout.shift : y + layout.shift - height;
        const int region_y = region_of(y, height, high, layout.shift) * 3;
        float* row = x + (image * layout.height + source_y) * layout.width * channels;
        for (int64_t x_ = left; x_ < left + wide; x_++, t++) {
            const int64_t source_x = x_ + layout.shift < width ? x_ + layout.shift : x_ + layout.shift - width;
            const bool real = source_y < layout.height && source_x < layout.width;
            scratch.rows[t] = real ? row + source_x * channels : nullptr;
            scratch.regions[t] = region_y + region_of(x_, width, wide, layout.shift);
            if (!real && layout.mask_padding) scratch.regions[t] = -1;
            regions |= scratch.regions[t] != scratch.regions[0];
        }
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

// Select the keys of one query, given how many bits of each vector of them differ, and return how many they are. VECTORS is
// the number of key vectors, 0 if only known at run time; their scores then lie in `memory`.
template <int VECTORS, class Counts>
SIMD int select_counted(const Counts& differing, int64_t padded, const float* bias, const uint32_t* allowed,
                        const Selection& choice, int64_t head, float* memory, uint32_t* selected) {
    const int vectors = VECTORS ? VECTORS : (int)(padded / 16);
    const F16 step = broadcast_f(-choice.step[head]);
    F16 fixed[VECTORS ? VECTORS : 1];
    const auto score = [&](int v) { return VECTORS ? fixed[VECTORS ? v : 0] : load_f(memory + v * 16); };
    F16 best = broadcast_f(-INFINITY);
    for (int v = 0; v < vectors; v++) {
        F16 y = mul_add(to_float(differing(v)), step, load_f(bias + v * 16));
        if (allowed) y = where_f(mask_from_bits(allowed[v / 2] >> v % 2 * 16 & 0xffff), y, broadcast_f(-INFINITY));
        if (VECTORS)
            fixed[VECTORS ? v : 0] = y;
        else
            store_f(memory + v * 16, y);
        best = max_f(best, y);
    }
    const float highest = max_lane(best);
    float lowest = choice.limit[head];
    if (choice.kind == SELECT_BELOW_BEST) lowest += highest;
    if (choice.kind == SELECT_SHARE) {
        F16 sum = zero_f();
        for (int v = 0; v < vectors; v++) sum = add_f(sum, exp_f(sub_f(score(v), broadcast_f(highest))));
        lowest += highest + logf(sum_lanes(sum));
    }
    const F16 limit = broadcast_f(lowest);
    int number = 0;
    for (int v = 0; v < vectors; v += 2) {
        uint32_t bits = mask_bits(at_least_f(score(v), limit));
        if (v + 1 < vectors) bits |= mask_bits(at_least_f(score(v + 1), limit)) << 16;
        selected[v / 2] = bits;
        number += popcount(bits);
    }
    return number;
}

template <int VECTORS>
SIMD int select_keys(const uint32_t* query, const uint32_t* keys, int64_t head_words, int64_t padded,
                     const float* bias, const uint32_t* allowed, const Selection& choice, int64_t head,
                     float* memory, uint32_t* selected) {
    const auto differing = [&](int v) {
        I16 counts = zero();
        for (int64_t w = 0; w < head_words; w++)
            counts = add_counts(counts, count_bits(bit_xor(broadcast(query[w * padded]), load(keys + w * padded + v * 16))));
        return widen_counts(counts);
    };
    return select_counted<VECTORS>(differing, padded, bias, allowed, choice, head, memory, selected);
}

// Count the set bits of 16 channels of the selected values.
SIMD I16 count_selected(const uint32_t* values, int64_t stride, const uint32_t* selected, int64_t words) {
    I16 total = zero();
    for (int64_t start = 0; start < words; start += COUNTS_AT_MOST) {
        const int64_t end = words - start < COUNTS_AT_MOST ? words : start + COUNTS_AT_MOST;
        I16 counts = zero();
        for (int64_t w = start; w < end; w++)
            counts = add_counts(counts, count_bits(bit_and(load(values + w * stride), broadcast(selected[w]))));
        total = add(total, widen_counts(counts));
    }
    return total;
}

// ---------------------------------------------------------------------------------------------------------------
// The steps of a window. One thread takes them all, or several share the tokens, heads and queries of a large window.

template <class Args>
SIMD void begin_window(const Args* args, const HeadScratch& s, int64_t window) {
    s.window->masked = find_tokens(args->layout, args->x, args->channels, window, s);
    if (s.window->masked) find_allowed(s.regions, s.tokens, s.token_words, s.allowed);
    int64_t queries = 0;
    for (int64_t t = 0; t < s.tokens; t++) {
        if (!s.rows[t]) continue;
        s.real[queries] = (int32_t)t;
        s.real_rows[queries++] = s.rows[t];
    }
    s.window->queries = queries;
    if (!args->bias)
        for (int64_t t = 0; t < s.padded_tokens; t++) s.no_bias[t] = t < s.tokens ? 0.0f : -INFINITY;
    memset(s.values, 0, s.token_words * args->heads * s.head_blocks * 16 * sizeof(uint32_t));
    if (s.head_blocks % 2) {  // half of the last word stays empty
        memset(s.queries, 0, args->heads * s.head_words * s.padded_tokens * sizeof(uint32_t));
        memset(s.keys, 0, args->heads * s.head_words * s.padded_tokens * sizeof(uint32_t));
    }
}

// Hand the selected values of each query of a head, as the counts of their set bits, to `emit(query, block, counts,
// number)`. VECTORS of keys and WORDS of a head are 0 if only known at run time.
template <int VECTORS, int WORDS, class Args, class Emit>
void select_values(const Args* args, const HeadScratch& s, const SelectScratch& own, int64_t head, int64_t begin,
                   int64_t end, const Emit& emit) {
    const int64_t value_channels = args->heads * s.head_blocks * 16, head_blocks = s.head_blocks;
    const int64_t padded = VECTORS ? VECTORS * 16 : s.padded_tokens, head_words = WORDS ? WORDS : s.head_words;
    const int64_t words = head * head_words * padded;
    const int64_t token_words = VECTORS ? (VECTORS + 1) / 2 : s.token_words;
    const uint32_t *queries = s.queries + words, *keys = s.keys + words, *values = s.values + head * head_blocks * 16;
    const uint32_t* allowed = s.window->masked ? s.allowed : nullptr;
    const float* biases = args->bias ? args->bias + head * s.tokens * padded : nullptr;
    const int32_t* real = s.real;
    const Selection choice = args->selection;
    uint32_t* selected = own.selected;
    for (int64_t q = begin; q < end; q++) {
        const int64_t token = real[q];
        const int number = select_keys<VECTORS>(
            queries + token, keys, head_words, padded, biases ? biases + token * padded : s.no_bias,
            allowed ? allowed + token * token_words : nullptr, choice, head, own.scores, selected);
        for (int64_t b = 0; b < head_blocks; b++)
            emit(q, b, count_selected(values + b * 16, value_channels, selected, token_words), number);
    }
}

#ifdef LOOKUP_PAIRS
// The same of windows of 49 to 64 tokens and heads of one word, by half bytes.
template <class Args, class Emit>
void select_looked_up(const Args* args, const HeadScratch& s, int64_t head, int64_t begin, int64_t end, const Emit& emit) {
    const int64_t blocks = s.head_blocks;
    alignas(32) uint8_t keys[9 * 2 * 32] = {0}, values[18 * 32] = {0};
    for (int half = 0; half < 2; half++) {
        const uint32_t* words = s.keys + head * 64 + half * 32;
        take_apart(words, words + 16, keys + half * 32, 64);
        words = s.values + (half * args->heads + head) * blocks * 16;
        take_apart(words, words + (blocks - 1) * 16, values + half * 8 * 32, 32);
    }
    // Step by step for all queries, so that they do not wait for each other.
    const int64_t number = end - begin;
    const int32_t* real = s.real + begin;
    const float* biases = args->bias ? args->bias + head * s.tokens * 64 : nullptr;
    const Selection choice = args->selection;
    uint32_t queries[64], selected[64][2];
    int numbers[64];
    Pair differing[64][2];
    for (int64_t q = 0; q < number; q++) queries[q] = s.queries[head * 64 + real[q]];
    look_up_rows<2>(DIFFERING_BITS, RowsToCount(queries, number, 1), keys, ToPairs<2>{differing});
    for (int64_t q = 0; q < number; q++)
        numbers[q] = select_counted<4>(
            [&](int v) { return differing[q][v / 2].block(v % 2); }, 64, biases ? biases + real[q] * 64 : s.no_bias,
            s.window->masked ? s.allowed + real[q] * 2 : nullptr, choice, head, nullptr, selected[q]);
    Pair set[64][1];
    look_up_rows<1>(COMMON_BITS, RowsToCount(selected[0], number, 2), values, ToPairs<1>{set});
    for (int64_t q = 0; q < number; q++)
        for (int64_t b = 0; b < blocks; b++) emit(begin + q, b, set[q][0].block((int)b), numbers[q]);
}
#endif

template <class Args, class Emit>
void select_values(const Args* args, const HeadScratch& s, const SelectScratch& own, int64_t head, int64_t begin,
                   int64_t end, const Emit& emit) {
    if (s.padded_tokens == 64 && s.head_words == 1)
#ifdef LOOKUP_PAIRS
        select_looked_up(args, s, head, begin, end, emit);
#else
        select_values<4, 1>(args, s, own, head, begin, end, emit);
#endif
    else if (s.padded_tokens == 64)
        select_values<4, 0>(args, s, own, head, begin, end, emit);
    else if (s.padded_tokens == 16)
        select_values<1, 0>(args, s, own, head, begin, end, emit);
    else
        select_values<0, 0>(args, s, own, head, begin, end, emit);
}

void window_qkv(const AttentionArgs* args, const AttentionScratch& s, int64_t begin, int64_t end, Timer& timer) {
    const int64_t words = words_of(args->channels), blocks = args->heads * s.head_blocks, padded = blocks * 16;
    for (int64_t t = begin; t < end; t++) {
        if (s.rows[t])
            pack_row(args->normed + (s.rows[t] - args->x), args->gain, args->shift, args->channels, s.bits + t * words);
        else
            memcpy(s.bits + t * words, args->padding, words * sizeof(uint32_t));
    }
    timer.lap(PHASE_PACK);
    const uint32_t *low = args->qkv_low, *width = args->qkv_width, *weight = args->qkv_weight;
    uint32_t* values = s.values + begin / 32 * padded;
    const RowsToCount rows(s.bits + begin * words, end - begin, words);
    const ToHeadBits to_queries = {{low, width}, halves(s.queries) + begin * 2, s.offsets};
    const ToHeadBits to_keys = {{low + padded, width + padded}, halves(s.keys) + begin * 2, s.offsets};
    count_differing(rows, weight, blocks, to_queries);
    count_differing(rows, weight + padded * words, blocks, to_keys);
    low += 2 * padded, width += 2 * padded, weight += 2 * padded * words;
#ifdef LOOKUP
    uint32_t* bits = s.out + begin * s.out_words;  // free until the heads are done
    count_differing(rows, weight, blocks, ToRowBits{{low, width}, halves(bits), s.out_words * 2});
    for (int64_t t = 0; t < rows.number; t += 32)
        for (int64_t c = 0; c < padded; c += 32) {
            const int64_t tokens = rows.number - t < 32 ? rows.number - t : 32, channels = padded - c < 32 ? padded - c : 32;
            transpose_bits(bits + t * s.out_words + c / 32, s.out_words, tokens, channels, values + t / 32 * padded + c);
        }
#else
    count_differing(rows, weight, blocks, ToTokenBits{{low, width}, values, padded});
#endif
    timer.lap(PHASE_QKV);
}

void window_head(const AttentionArgs* args, const AttentionScratch& s, const SelectScratch& own, int64_t head,
                 int64_t begin, int64_t end) {
    const int64_t first = head * s.head_blocks, stride = s.out_words * 2;
    const float* ratio = args->value_ratio + first * 16;
    const float* offset = args->value_offset ? args->value_offset + first * 16 : nullptr;
    uint16_t* out = halves(s.out) + first;
    select_values(args, s, own, head, begin, end, [=](int64_t q, int64_t b, I16 counts, int number) {
        F16 needed = mul_f(load_f(ratio + b * 16), broadcast_f((float)number));
        if (offset) needed = add_f(needed, load_f(offset + b * 16));
        store_bits(out + q * stride + b, at_least_f(to_float(counts), needed));
    });
}

void window_project(const AttentionArgs* args, const AttentionScratch& s, int64_t begin, int64_t end) {
    float* const* rows = s.real_rows + begin;
    const ToFloats<true, false> to_x = {rows, rows, args->proj_scale, args->proj_bias,
                                        nullptr, args->heads * args->head_dim, args->channels, 0};
    count_differing(s.out + begin * s.out_words, end - begin, s.out_words, args->proj_weight, blocks_of(args->channels),
                    to_x);
}

void prepare(const AttentionArgs* args, const AttentionScratch& s) {
    const int64_t blocks = args->heads * s.head_blocks, head_size = s.head_words * s.padded_tokens;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t part = b % s.head_blocks;
        s.offsets[b] = (int32_t)((b / s.head_blocks * head_size + part / 2 * s.padded_tokens) * 2 + part % 2);
    }
    if (blocks % 2) memset(s.out, 0, s.tokens * s.out_words * sizeof(uint32_t));
}

template <class Memory, class Args>
void whole_windows(const Args* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const Memory s(args, worker->memory);
    const SelectScratch own(args->layout, worker->memory + s.words);
    prepare(args, s);
    for (int64_t window = begin; window < end; window++) {
        begin_window(args, s, window);
        window_qkv(args, s, 0, s.tokens, timer);
        for (int64_t head = 0; head < args->heads; head++) window_head(args, s, own, head, 0, s.window->queries);
        timer.lap(PHASE_ATTENTION);
        window_project(args, s, 0, s.window->queries);
        timer.lap(PHASE_PROJ);
    }
}

// One step of all windows, whose memory is shared. A range counts windows, tokens, queries of heads, or queries.
template <class Memory, class Args>
void step_of_windows(const Args* args, int64_t unit, Worker* worker) {
    Timer timer(worker);
    const int64_t words = Memory(args, nullptr).words, tokens = tokens_of(args->layout);
    const int64_t parts = attention_parts(args->layout, args->heads, worker->step);
    const int64_t window = unit / parts, part = unit % parts, head = part % args->heads;
    const Memory s(args, worker->shared + window * words);
    const SelectScratch own(args->layout, worker->memory);
    const auto range = [&](int64_t chunk, int64_t size, int64_t most, int64_t* end) {
        *end = (chunk + 1) * size < most ? (chunk + 1) * size : most;
        return chunk * size;
    };
    int64_t end;
    if (worker->step == STEP_BEGIN) {
        prepare(args, s);
        begin_window(args, s, window);
        timer.lap(PHASE_PACK);
    } else if (worker->step == STEP_QKV) {
        const int64_t begin = range(part, TOKENS_AT_A_TIME, tokens, &end);
        window_qkv(args, s, begin, end, timer);
    } else if (worker->step == STEP_HEADS) {
        const int64_t begin = range(part / args->heads, TOKENS_AT_A_TIME, s.window->queries, &end);
        window_head(args, s, own, head, begin, end);
        timer.lap(PHASE_ATTENTION);
    } else {
        const int64_t begin = range(part, TOKENS_AT_A_TIME, s.window->queries, &end);
        if (begin < end) window_project(args, s, begin, end);
        timer.lap(PHASE_PROJ);
    }
}

void attention(const AttentionArgs* args, int64_t begin, int64_t end, Worker* worker) {
    worker->shared ? step_of_windows<AttentionScratch>(args, begin, worker)
                   : whole_windows<AttentionScratch>(args, begin, end, worker);
}

}  // namespace
