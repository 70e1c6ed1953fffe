// Attention of groups of tokens in training, a head of a group (a unit) at a time, so that scores stay in the cache.
//
// The forward pass works on bits, as that of packed networks. What it leaves is a bit for each sign of queries, keys and
// values, and one for whether the gradient passes it. The backward pass makes signs, scores and selected keys again from
// these; its products are float.

namespace {

// Bits of the keys each query may attend to, [token][word], of a byte each that is 1 where a key is masked.
void find_unmasked(const uint8_t* mask, int64_t tokens, int64_t words, uint32_t* allowed) {
    for (int64_t query = 0; query < tokens; query++, mask += tokens) {
        uint8_t* row = reinterpret_cast<uint8_t*>(allowed + query * words);
        for (int64_t key = 0; key < tokens; key += 8) {
            uint64_t bytes = 0;
            memcpy(&bytes, mask + key, tokens - key < 8 ? tokens - key : 8);
            row[key / 8] = (uint8_t)~(bytes * 0x0102040810204080u >> 56);  // moves bit 0 of byte i to bit 56 + i
        }
    }
}

// Ask for the memory of a head's channels. Rows of heads lie too far apart for processors to foresee.
SIMD void prefetch(const float* x, int64_t k) {
#if defined(__GNUC__)
    for (int64_t c = 0; c < k; c += 16) __builtin_prefetch(x + c);
    __builtin_prefetch(x + k - 1);
#endif
}

// What all units share, and the mask of a group, for its first head.
template <class Args>
void begin_unit(const Args* args, const HeadBitsScratch& s, int64_t unit, bool first) {
    const int64_t tokens = args->tokens, group = unit / args->heads;
    if (first)
        for (int64_t t = 0; t < s.padded_tokens; t++) s.no_bias[t] = t < tokens ? 0.0f : -INFINITY;
    if (args->mask && (first || unit % args->heads == 0))
        find_unmasked(args->mask + group % args->masks * tokens * tokens, tokens, s.token_words, s.allowed);
    memset(s.values, 0, s.token_words * s.head_blocks * 16 * sizeof(uint32_t));
}

// Select the keys of a query and return how many they are; their scores are left in memory if LEAVE. VECTORS of keys and
// WORDS of a head are 0 if only known at run time.
template <int VECTORS, int WORDS, bool LEAVE, class Args>
SIMD int select_in_training(const Args* args, const HeadBitsScratch& s, int64_t head, int64_t query, float* scores) {
    const float* bias = args->bias ? args->bias + (head * args->tokens + query) * s.padded_tokens : s.no_bias;
    return select_keys<LEAVE ? 0 : VECTORS>(
        s.queries + query, s.keys, WORDS ? WORDS : s.head_words, VECTORS ? VECTORS * 16 : s.padded_tokens, bias,
        args->mask ? s.allowed + query * s.token_words : nullptr, args->selection, head, scores, s.selected);
}

// Whether a head is one of those in windows of Swin: 7 x 7 tokens, 32 channels.
SIMD bool is_small(const HeadBitsScratch& s) { return s.padded_tokens == 64 && s.head_words == 1; }

// ---------------------------------------------------------------------------------------------------------------
// Forward

// Take the signs of the queries (part 0), keys (1) or values (2) of a unit, and where the gradient passes them.
template <int PART>
void take_signs(const AttentionBitsArgs* args, const HeadBitsScratch& s, int64_t unit) {
    const int64_t heads = args->heads, tokens = args->tokens, k = args->head_dim, row = 3 * heads * k;
    const int64_t last = args->groups * heads - 1, blocks = s.head_blocks, padded_tokens = s.padded_tokens;
    const auto start = [&](int64_t u) { return args->qkv + u / heads * tokens * row + (PART * heads + u % heads) * k; };
    const float *x = start(unit), *next = start(unit < last ? unit + 1 : unit);
    const float* gamma = args->gamma ? args->gamma + (PART * heads + unit % heads) * k : nullptr;
    const int64_t first = (unit * tokens * 3 + PART) * s.head_words * 2, stride = 3 * s.head_words * 2;  // in halves
    uint16_t* bits = args->bits ? halves(args->bits) + first : nullptr;
    uint16_t* inside = args->bits ? halves(args->inside) + first : nullptr;
    uint16_t* words = halves(PART == 0 ? s.queries : s.keys);
    uint32_t* values = s.values;
    for (int64_t t = 0; t < tokens; t++, x += row, next += row) {
        prefetch(next, k);
        for (int64_t b = 0; b < blocks; b++) {
            const int left = (int)(k - b * 16);
            F16 y = left < 16 ? load_f(x + b * 16, left) : load_f(x + b * 16);
            if (gamma) y = sub_f(y, left < 16 ? load_f(gamma + b * 16, left) : load_f(gamma + b * 16));
            const uint32_t real = left < 16 ? (1u << left) - 1 : 0xffff;
            const M16 set = at_least_f(y, zero_f());
            const uint16_t half = (uint16_t)(mask_bits(set) & real);
            if (bits) {
                bits[b] = half;
                inside[b] = (uint16_t)(mask_bits(at_least_f(broadcast_f(1.0f), max_f(y, sub_f(zero_f(), y)))) & real);
            }
            if (PART < 2) {
                words[(b / 2 * padded_tokens + t) * 2 + b % 2] = half;
            } else {
                uint32_t* word = values + (t / 32 * blocks + b) * 16;
                store(word, or_where(load(word), set, broadcast(1u << t % 32)));
            }
        }
        if (blocks % 2) {  // half of the last word stays empty
            if (bits) bits[blocks] = inside[blocks] = 0;
            if (PART < 2) words[(blocks / 2 * padded_tokens + t) * 2 + 1] = 0;
        }
        if (bits) bits += stride, inside += stride;
    }
}

template <int VECTORS, int WORDS>
void attend(const AttentionBitsArgs* args, const HeadBitsScratch& s, int64_t unit) {
    const int64_t group = unit / args->heads, head = unit % args->heads, k = args->head_dim;
    const int64_t token_words = VECTORS ? (VECTORS + 1) / 2 : s.token_words;
    for (int64_t query = 0; query < args->tokens; query++) {
        const int number = select_in_training<VECTORS, WORDS, false>(args, s, head, query, s.scores);
        const F16 all = broadcast_f((float)number), factor = broadcast_f(args->divide ? 1.0f / (float)number : 1.0f);
        float* out = args->out + ((group * args->tokens + query) * args->heads + head) * k;
        for (int64_t b = 0; b < s.head_blocks; b++) {
            const I16 set = count_selected(s.values + b * 16, s.head_blocks * 16, s.selected, token_words);
            const F16 y = mul_f(sub_f(to_float(add(set, set)), all), factor);
            b * 16 + 16 <= k ? store_f(out + b * 16, y) : store_f(out + b * 16, y, (int)(k - b * 16));
        }
    }
}

void attention_bits(const AttentionBitsArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const HeadBitsScratch s(args, worker->memory);
    for (int64_t unit = begin; unit < end; unit++) {
        begin_unit(args, s, unit, unit == begin);
        take_signs<0>(args, s, unit);
        take_signs<1>(args, s, unit);
        take_signs<2>(args, s, unit);
        timer.lap(PHASE_PACK);
        is_small(s) ? attend<4, 1>(args, s, unit) : attend<0, 0>(args, s, unit);
        timer.lap(PHASE_ATTENTION);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Backward

// Hand the product of `rows` rows of a and a matrix b (k, blocks * 16) to `emit(row, block, sums)`. TRANSPOSED: rows are
// the columns of a. A tile that is cut off at the end reads whole, and hands on what is there.
template <bool TRANSPOSED, int B, class Emit>
SIMD void multiply_blocks(const float* a, int64_t stride, int64_t rows, int64_t k, const float* b, int64_t b_stride,
                          int64_t block, const Emit& emit) {
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
        const float* first = a + row * (TRANSPOSED ? 1 : stride);
        F16 y[TILE_ROWS][B];
        for (int r = 0; r < TILE_ROWS; r++)
            for (int c = 0; c < B; c++) y[r][c] = zero_f();
        for (int64_t i = 0; i < k; i++) {
            F16 w[B];
            for (int c = 0; c < B; c++) w[c] = load_f(b + i * b_stride + (block + c) * 16);
            for (int r = 0; r < TILE_ROWS; r++) {
                const F16 x = broadcast_f(TRANSPOSED ? first[i * stride + r] : first[r * stride + i]);
                for (int c = 0; c < B; c++) y[r][c] = mul_add(x, w[c], y[r][c]);
            }
        }
        for (int r = 0; r < TILE_ROWS; r++)
            if (row + r < rows)
                for (int c = 0; c < B; c++) emit(row + r, block + c, y[r][c]);
    }
}

template <bool TRANSPOSED, class Emit>
void multiply(const float* a, int64_t stride, int64_t rows, int64_t k, const float* b, int64_t blocks, const Emit& emit) {
    int64_t block = 0;
    for (; block + TILE_BLOCKS <= blocks; block += TILE_BLOCKS)
        multiply_blocks<TRANSPOSED, TILE_BLOCKS>(a, stride, rows, k, b, blocks * 16, block, emit);
    if (TILE_BLOCKS > 2 && block + 2 <= blocks) {
        multiply_blocks<TRANSPOSED, 2>(a, stride, rows, k, b, blocks * 16, block, emit);
        block += 2;
    }
    if (TILE_BLOCKS > 1 && block < blocks)
        multiply_blocks<TRANSPOSED, 1>(a, stride, rows, k, b, blocks * 16, block, emit);
}

// Make signs of bits: those of queries and keys [token][channel], those of values [channel][token].
void restore_signs(const AttentionGradientsArgs* args, const HeadGradientsScratch& s, int64_t unit) {
    const int64_t tokens = args->tokens;
    for (int64_t t = 0; t < tokens; t++) {
        const uint32_t* bits = args->bits + (unit * tokens + t) * 3 * s.head_words;
        for (int64_t w = 0; w < s.head_words; w++) {
            s.queries[w * s.padded_tokens + t] = bits[w];
            s.keys[w * s.padded_tokens + t] = bits[s.head_words + w];
        }
        for (int64_t b = 0; b < s.head_blocks; b++) {
            const auto half = [&](int64_t part) { return bits[part * s.head_words + b / 2] >> b % 2 * 16 & 0xffff; };
            store_f(s.query_signs + t * s.stride + b * 16, signs_of(half(0)));
            store_f(s.key_signs + t * s.stride + b * 16, signs_of(half(1)));
            uint32_t* word = s.values + t / 32 * s.stride + b * 16;
            store(word, or_where(load(word), mask_from_bits(half(2)), broadcast(1u << t % 32)));
        }
    }
    for (int64_t c = 0; c < args->head_dim; c++)
        for (int64_t b = 0; b < s.padded_tokens / 16; b++)
            store_f(s.value_signs + c * s.padded_tokens + b * 16, signs_of(s.values[b / 2 * s.stride + c] >> b % 2 * 16));
}

// Softmax in place; masked keys and padding, whose scores are -inf, get exactly 0.
SIMD void softmax_row(float* scores, int64_t vectors) {
    F16 best = load_f(scores), sum = zero_f();
    for (int64_t v = 1; v < vectors; v++) best = max_f(best, load_f(scores + v * 16));
    const F16 highest = broadcast_f(max_lane(best)), lowest = sub_f(highest, broadcast_f(87.0f));
    for (int64_t v = 0; v < vectors; v++) {
        const F16 score = load_f(scores + v * 16);
        const F16 power = where_f(at_least_f(score, lowest), exp_f(sub_f(score, highest)), zero_f());
        sum = add_f(sum, power);
        store_f(scores + v * 16, power);
    }
    const F16 factor = broadcast_f(1.0f / sum_lanes(sum));
    for (int64_t v = 0; v < vectors; v++) store_f(scores + v * 16, mul_f(load_f(scores + v * 16), factor));
}

// Find weights, softmax and the gradient of the selected values' sum, for queries from `begin` on.
template <int VECTORS, int WORDS>
void score_again(const AttentionGradientsArgs* args, const HeadGradientsScratch& s, int64_t unit, int64_t begin,
                 int64_t queries) {
    const int64_t head = unit % args->heads, k = args->head_dim;
    const int64_t vectors = VECTORS ? VECTORS : s.padded_tokens / 16;
    const int64_t heads = args->heads, last = args->groups * heads - 1;
    const auto start = [&](int64_t u) { return args->grad + ((u / heads * args->tokens + begin) * heads + u % heads) * k; };
    const float *grad = start(unit), *next = start(unit < last ? unit + 1 : unit);
    for (int64_t q = 0; q < queries; q++, grad += heads * k, next += heads * k) {
        prefetch(next, k);
        float *softmax = s.softmax + q * s.padded_tokens, *weights = s.weights + q * s.padded_tokens;
        const int number = select_in_training<VECTORS, WORDS, true>(args, s, head, begin + q, softmax);
        softmax_row(softmax, vectors);
        for (int64_t v = 0; v < vectors; v++) {
            const M16 chosen = mask_from_bits(s.selected[v / 2] >> v % 2 * 16 & 0xffff);
            store_f(weights + v * 16, where_f(chosen, broadcast_f(1.0f), zero_f()));
        }
        const F16 factor = broadcast_f(args->divide ? 1.0f / (float)number : 1.0f);
        for (int64_t b = 0; b < s.head_blocks; b++) {
            const int left = (int)(k - b * 16);
            const F16 y = left < 16 ? load_f(grad + b * 16, left) : load_f(grad + b * 16);
            store_f(s.grad + q * s.stride + b * 16, mul_f(y, factor));
        }
    }
}

// The gradient of scores takes the place of the softmax: p * (dp - sum(p * dp)), dp in place of the weights.
void score_gradients(const HeadGradientsScratch& s, int64_t queries, float* grad_bias) {
    const int64_t vectors = s.padded_tokens / 16;
    for (int64_t q = 0; q < queries; q++) {
        float *softmax = s.softmax + q * s.padded_tokens, *grad = s.weights + q * s.padded_tokens;
        F16 sum = zero_f();
        for (int64_t v = 0; v < vectors; v++) sum = mul_add(load_f(softmax + v * 16), load_f(grad + v * 16), sum);
        const F16 mean = broadcast_f(sum_lanes(sum));
        for (int64_t v = 0; v < vectors; v++) {
            const F16 y = mul_f(load_f(softmax + v * 16), sub_f(load_f(grad + v * 16), mean));
            store_f(softmax + v * 16, y);
            if (!grad_bias) continue;
            float* total = grad_bias + q * s.padded_tokens + v * 16;
            store_f(total, add_f(load_f(total), y));
        }
    }
}

// Gradients of the queries (part 0), keys (1) or values (2) of a unit before the sign, and their sums.
struct ThroughSign {
    const uint32_t* inside;
    float *out, *sums;
    int64_t inside_stride, stride, k;  // of tokens

    ThroughSign(const AttentionGradientsArgs* args, const HeadGradientsScratch& s, int64_t unit, int64_t part)
        : inside(args->inside + (unit * args->tokens * 3 + part) * s.head_words),
          sums(s.sums + part * s.stride),
          inside_stride(3 * s.head_words),
          stride(3 * args->heads * args->head_dim),
          k(args->head_dim) {
        out = args->grad_qkv + unit / args->heads * args->tokens * stride + (part * args->heads + unit % args->heads) * k;
    }
    METHOD void operator()(int64_t token, int64_t block, F16 y) const {
        const int64_t left = k - block * 16;
        const uint32_t word = inside[token * inside_stride + block / 2];
        y = where_f(mask_from_bits(word >> block % 2 * 16 & 0xffff), y, zero_f());
        store_f(sums + block * 16, add_f(load_f(sums + block * 16), y));
        float* to = out + token * stride + block * 16;
        left < 16 ? store_f(to, y, (int)left) : store_f(to, y);
    }
};

void unit_gradients(const AttentionGradientsArgs* args, const HeadGradientsScratch& s, int64_t unit, float* grad_bias) {
    const int64_t tokens = args->tokens, vectors = s.padded_tokens / 16, head = unit % args->heads;
    const F16 scale = broadcast_f(args->selection.step[head] / 2);
    const ThroughSign to_queries(args, s, unit, 0), to_keys(args, s, unit, 1), to_values(args, s, unit, 2);
    restore_signs(args, s, unit);
    memset(s.sums, 0, 3 * s.stride * sizeof(float));
    for (int64_t begin = 0; begin < tokens; begin += ROWS_AT_A_TIME) {
        const int64_t queries = tokens - begin < ROWS_AT_A_TIME ? tokens - begin : ROWS_AT_A_TIME;
        const auto add_to = [&](float* sums) {
            return [=, &s](int64_t token, int64_t block, F16 y) {
                float* sum = sums + token * s.stride + block * 16;
                store_f(sum, begin ? add_f(load_f(sum), y) : y);
            };
        };
        is_small(s) ? score_again<4, 1>(args, s, unit, begin, queries) : score_again<0, 0>(args, s, unit, begin, queries);
        multiply<true>(s.weights, s.padded_tokens, tokens, queries, s.grad, s.head_blocks, add_to(s.grad_values));
        multiply<false>(s.grad, s.stride, queries, args->head_dim, s.value_signs, vectors,
                        [&](int64_t q, int64_t v, F16 y) { store_f(s.weights + q * s.padded_tokens + v * 16, y); });
        score_gradients(s, queries, grad_bias ? grad_bias + (head * tokens + begin) * s.padded_tokens : nullptr);
        multiply<false>(s.softmax, s.padded_tokens, queries, tokens, s.key_signs, s.head_blocks,
                        [&](int64_t q, int64_t b, F16 y) { to_queries(begin + q, b, mul_f(y, scale)); });
        multiply<true>(s.softmax, s.padded_tokens, tokens, queries, s.query_signs + begin * s.stride, s.head_blocks,
                       add_to(s.grad_keys));
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t b = 0; b < s.head_blocks; b++) {
            to_keys(t, b, mul_f(load_f(s.grad_keys + t * s.stride + b * 16), scale));
            to_values(t, b, load_f(s.grad_values + t * s.stride + b * 16));
        }
}

void attention_gradients(const AttentionGradientsArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const HeadGradientsScratch s(args, worker->memory);
    const int64_t range = begin / args->share, heads = args->heads, k = args->head_dim;
    const int64_t bias_size = heads * args->tokens * s.padded_tokens, signed_size = 3 * heads * k;
    float* grad_bias = args->grad_bias ? args->grad_bias + range * bias_size : nullptr;
    float* grad_signed = args->grad_signed ? args->grad_signed + range * signed_size : nullptr;
    if (grad_bias) memset(grad_bias, 0, bias_size * sizeof(float));
    if (grad_signed) memset(grad_signed, 0, signed_size * sizeof(float));
    for (int64_t unit = begin; unit < end; unit++) {
        begin_unit(args, s, unit, unit == begin);
        unit_gradients(args, s, unit, grad_bias);
        if (grad_signed)
            for (int64_t part = 0; part < 3; part++) {
                float* sums = grad_signed + (part * heads + unit % heads) * k;
                for (int64_t c = 0; c < k; c++) sums[c] += s.sums[part * s.stride + c];
            }
    }
    timer.lap(PHASE_ATTENTION);
}

}  // namespace
