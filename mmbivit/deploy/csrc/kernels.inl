// The kernels, written once for 16 lanes of 32 bits; each path_*.cpp compiles them for its instructions.
//
// A count is the number of differing bits of an activation row and a weight row. With K inputs in {-1, +1} their
// product sum is K - 2 * count; padding bits are 0 on both sides and never differ.

#include "scratch.h"

namespace {

// A bit is set unless its count lies in [low, low + width), modulo 2^32; see thresholds.py.
SIMD M16 outside(I16 count, I16 low, I16 width) { return at_least(sub(count, low), width); }

SIMD F16 zero_f() { return broadcast_f(0.0f); }

SIMD I16 accumulator(I16 count, int64_t k) { return sub(broadcast((uint32_t)k), add(count, count)); }

SIMD uint16_t* halves(uint32_t* words) { return reinterpret_cast<uint16_t*>(words); }

class Timer {
   public:
    explicit Timer(const Worker* worker) : seconds(worker->seconds), last(seconds ? mmbivit_now() : 0.0) {}
    void lap(Phase phase) {
        if (!seconds) return;
        const double now = mmbivit_now();
        seconds[phase] += now - last;
        last = now;
    }

   private:
    double* seconds;
    double last;
};

// ---------------------------------------------------------------------------------------------------------------
// Signs

SIMD void pack_row(const float* x, const float* gain, const float* shift, int64_t k, uint32_t* out) {
    uint16_t* half = halves(out);
    int64_t c = 0;
    for (; c + 16 <= k; c += 16)
        *half++ = (uint16_t)mask_bits(at_least_f(mul_add(load_f(x + c), load_f(gain + c), load_f(shift + c)), zero_f()));
    if (c < k) {
        const F16 tail = mul_add(load_f(x + c, (int)(k - c)), load_f(gain + c), load_f(shift + c));
        *half++ = (uint16_t)(mask_bits(at_least_f(tail, zero_f())) & ((1u << (k - c)) - 1));
    }
    if (blocks_of(k) % 2) *half = 0;
}

// ---------------------------------------------------------------------------------------------------------------
// Counts of differing bits, a tile of rows and blocks at a time, handed to `emit(row, block, counts)`

template <int R, int B, class Emit>
SIMD void tile(const uint32_t* a, int64_t stride, const uint32_t* weight, int64_t words, int64_t row, int64_t block,
               const Emit& emit) {
    I16 total[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) total[r][b] = zero();
    for (int64_t start = 0; start < words; start += COUNTS_AT_MOST) {
        const int64_t end = words - start < COUNTS_AT_MOST ? words : start + COUNTS_AT_MOST;
        I16 counts[R][B];
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) counts[r][b] = COUNTS_ARE_WIDE ? total[r][b] : zero();
        for (int64_t k = start; k < end; k++) {
            I16 w[B];
            for (int b = 0; b < B; b++) w[b] = load(weight + (b * words + k) * 16);
            for (int r = 0; r < R; r++) {
                const I16 bits = broadcast(a[r * stride + k]);
                for (int b = 0; b < B; b++)
                    counts[r][b] = add_counts(counts[r][b], count_bits(bit_xor(bits, w[b])));
            }
        }
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++)
                total[r][b] = COUNTS_ARE_WIDE ? counts[r][b] : add(total[r][b], widen_counts(counts[r][b]));
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) emit(row + r, block + b, total[r][b]);
}

template <int B, class Emit>
SIMD void rows_of_tiles(const uint32_t* a, int64_t rows, int64_t words, const uint32_t* weight, int64_t block,
                        const Emit& emit) {
    int64_t row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
        tile<TILE_ROWS, B>(a + row * words, words, weight, words, row, block, emit);
    for (; row < rows; row++) tile<1, B>(a + row * words, words, weight, words, row, block, emit);
}

template <class Emit>
void count_differing(const uint32_t* a, int64_t rows, int64_t words, const uint32_t* weight, int64_t blocks,
                     const Emit& emit) {
    int64_t block = 0;
    for (; block + TILE_BLOCKS <= blocks; block += TILE_BLOCKS)
        rows_of_tiles<TILE_BLOCKS>(a, rows, words, weight + block * words * 16, block, emit);
    for (; block < blocks; block++) rows_of_tiles<1>(a, rows, words, weight + block * words * 16, block, emit);
}

// Integer accumulators.
struct ToIntegers {
    int32_t* out;
    int64_t k, n;

    METHOD void operator()(int64_t row, int64_t block, I16 count) const {
        const int64_t left = n - block * 16;
        store_i(out + row * n + block * 16, accumulator(count, k), left < 16 ? (int)left : 16);
    }
};

// scale * accumulator + bias, through RPReLU if there is one, plus what `add` holds if anything is added.
template <bool ADD, bool RPRELU>
struct ToFloats {
    float* const* out;
    const float* const* add;
    const float *scale, *bias, *rprelu;
    int64_t k, n, padded;

    METHOD void operator()(int64_t row, int64_t block, I16 count) const {
        const int64_t c = block * 16;
        F16 y = mul_add(to_float(accumulator(count, k)), load_f(scale + c), load_f(bias + c));
        if (RPRELU) {
            const F16 shifted = sub_f(y, load_f(rprelu + c));
            const F16 negative = mul_f(min_f(shifted, zero_f()), load_f(rprelu + padded + c));
            y = add_f(add_f(max_f(shifted, zero_f()), negative), load_f(rprelu + 2 * padded + c));
        }
        if (c + 16 <= n) {
            if (ADD) y = add_f(y, load_f(add[row] + c));
            store_f(out[row] + c, y);
        } else {
            if (ADD) y = add_f(y, load_f(add[row] + c, (int)(n - c)));
            store_f(out[row] + c, y, (int)(n - c));
        }
    }
};

// Bits of a row, in the order of the channels.
struct ToRowBits {
    const uint32_t *low, *width;
    uint16_t* out;
    int64_t stride;  // halves of a row

    METHOD void operator()(int64_t row, int64_t block, I16 count) const {
        out[row * stride + block] = (uint16_t)mask_bits(outside(count, load(low + block * 16), load(width + block * 16)));
    }
};

// Bits of queries or keys, [head][word][token]: one vector holds the same word of 16 tokens.
struct ToHeadBits {
    const uint32_t *low, *width;
    uint16_t* out;
    const int32_t* offsets;  // of each block, in halves

    METHOD void operator()(int64_t row, int64_t block, I16 count) const {
        out[offsets[block] + row * 2] =
            (uint16_t)mask_bits(outside(count, load(low + block * 16), load(width + block * 16)));
    }
};

// Bits of values along the tokens, [token word][channel]; `out` starts as 0.
struct ToTokenBits {
    const uint32_t *low, *width;
    uint32_t* out;
    int64_t channels;

    METHOD void operator()(int64_t row, int64_t block, I16 count) const {
        uint32_t* word = out + row / 32 * channels + block * 16;
        const M16 set = outside(count, load(low + block * 16), load(width + block * 16));
        store(word, or_where(load(word), set, broadcast(1u << row % 32)));
    }
};

// ---------------------------------------------------------------------------------------------------------------
// Operators over rows

void pack(const PackArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    for (int64_t row = begin; row < end; row++)
        pack_row(args->x + row * args->k, args->gain, args->shift, args->k, args->out + row * words_of(args->k));
    timer.lap(PHASE_PACK);
}

void matmul(const MatmulArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const int64_t words = words_of(args->k);
    const ToIntegers emit = {args->out + begin * args->n, args->k, args->n};
    count_differing(args->a + begin * words, end - begin, words, args->weight, blocks_of(args->n), emit);
    timer.lap(PHASE_LINEAR);
}

void linear(const LinearArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const RowScratch scratch(args->k, worker->memory);
    const int64_t words = words_of(args->k), blocks = blocks_of(args->n), rows = end - begin;
    for (int64_t row = 0; row < rows; row++) {
        pack_row(args->x + (begin + row) * args->k, args->gain, args->shift, args->k, scratch.bits + row * words);
        scratch.out[row] = args->out + (begin + row) * args->n;
        if (args->residual) scratch.add[row] = args->residual + (begin + row) * args->n;
    }
    timer.lap(PHASE_PACK);
    const auto multiply = [&](const auto& emit) {
        count_differing(scratch.bits, rows, words, args->weight, blocks, emit);
    };
#define TO_FLOATS(ADD, RPRELU) \
    ToFloats<ADD, RPRELU> { scratch.out, scratch.add, args->scale, args->bias, args->rprelu, args->k, args->n, blocks * 16 }
    if (args->residual)
        args->rprelu ? multiply(TO_FLOATS(true, true)) : multiply(TO_FLOATS(true, false));
    else
        args->rprelu ? multiply(TO_FLOATS(false, true)) : multiply(TO_FLOATS(false, false));
#undef TO_FLOATS
    timer.lap(PHASE_LINEAR);
}

void merge(const MergeArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const MergeScratch scratch(args, worker->memory);
    const int64_t channels = args->channels, k = 4 * channels, words = words_of(k), blocks = blocks_of(args->n);
    const int64_t height = ceil_div(args->height, 2), width = ceil_div(args->width, 2);
    for (int64_t row = 0; row < end - begin; row++) {
        const int64_t token = begin + row, image = token / (height * width);
        const int64_t y = token / width % height, x = token % width;
        for (int64_t part = 0; part < 4; part++) {  // top left, bottom left, top right, bottom right
            const int64_t source_y = 2 * y + part % 2, source_x = 2 * x + part / 2;
            float* target = scratch.row + part * channels;
            if (source_y < args->height && source_x < args->width)
                memcpy(target, args->x + ((image * args->height + source_y) * args->width + source_x) * channels,
                       channels * sizeof(float));
            else
                memset(target, 0, channels * sizeof(float));
        }
        pack_row(scratch.row, args->gain, args->shift, k, scratch.bits + row * words);
        scratch.out[row] = args->out + token * args->n;
    }
    const ToFloats<false, false> emit = {scratch.out, nullptr, args->scale, args->bias, nullptr, k, args->n, 0};
    count_differing(scratch.bits, end - begin, words, args->weight, blocks, emit);
    timer.lap(PHASE_MERGE);
}

// ---------------------------------------------------------------------------------------------------------------
// The float ends of the network

template <int R, int B>
SIMD void float_tile(const float* a, int64_t k, const float* weight, int64_t stride, const float* bias, float* out,
                     int64_t n) {
    F16 y[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) y[r][b] = load_f(bias + b * 16);
    for (int64_t i = 0; i < k; i++) {
        F16 w[B];
        for (int b = 0; b < B; b++) w[b] = load_f(weight + i * stride + b * 16);
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) y[r][b] = mul_add(broadcast_f(a[r * k + i]), w[b], y[r][b]);
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) store_f(out + r * n + b * 16, y[r][b]);
}

// The last block of channels may be partly padding.
SIMD void float_row_end(const float* a, int64_t k, const float* weight, int64_t stride, const float* bias, float* out,
                        int64_t left) {
    F16 y = load_f(bias);
    for (int64_t i = 0; i < k; i++) y = mul_add(broadcast_f(a[i]), load_f(weight + i * stride), y);
    store_f(out, y, (int)left);
}

void embed(const EmbedArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const EmbedScratch scratch(args, worker->memory);
    const int64_t size = args->patch, k = args->in_channels * size * size, n = args->channels, rows = end - begin;
    const int64_t height = ceil_div(args->height, size), width = ceil_div(args->width, size);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t token = begin + row, image = token / (height * width);
        const int64_t y = token / width % height * size, x = token % width * size;
        const int64_t across = args->width - x < size ? args->width - x : size;
        float* patch = scratch.patches + row * k;
        for (int64_t channel = 0; channel < args->in_channels; channel++)
            for (int64_t dy = 0; dy < size; dy++, patch += size) {
                const bool inside = y + dy < args->height;
                const int64_t line = (image * args->in_channels + channel) * args->height + y + dy;
                for (int64_t dx = 0; dx < size; dx++)
                    patch[dx] = inside && dx < across ? args->images[line * args->width + x + dx] : 0.0f;
            }
    }
    const int64_t stride = blocks_of(n) * 16;
    float* out = args->out + begin * n;
    int64_t c = 0;
    for (; c + TILE_BLOCKS * 16 <= n; c += TILE_BLOCKS * 16) {
        int64_t row = 0;
        for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
            float_tile<TILE_ROWS, TILE_BLOCKS>(scratch.patches + row * k, k, args->weight + c, stride, args->bias + c,
                                               out + row * n + c, n);
        for (; row < rows; row++)
            float_tile<1, TILE_BLOCKS>(scratch.patches + row * k, k, args->weight + c, stride, args->bias + c,
                                       out + row * n + c, n);
    }
    for (; c < n; c += 16)
        for (int64_t row = 0; row < rows; row++)
            float_row_end(scratch.patches + row * k, k, args->weight + c, stride, args->bias + c, out + row * n + c,
                          n - c < 16 ? n - c : 16);
    timer.lap(PHASE_EMBED);
}

// A range counts groups of ROWS_AT_A_TIME tokens; each image has its own.
void map(const MapArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    float lines[ROWS_AT_A_TIME][16];
    const int64_t groups = ceil_div(args->tokens, ROWS_AT_A_TIME);
    for (int64_t group = begin; group < end; group++) {
        const int64_t image = group / groups, first = group % groups * ROWS_AT_A_TIME;
        const int64_t rows = args->tokens - first < ROWS_AT_A_TIME ? args->tokens - first : ROWS_AT_A_TIME;
        for (int64_t c = 0; c < args->channels; c += 16) {
            const int left = args->channels - c < 16 ? (int)(args->channels - c) : 16;
            const F16 gain = load_f(args->gain + c), shift = load_f(args->shift + c);
            for (int64_t row = 0; row < rows; row++) {
                const float* x = args->x + (image * args->tokens + first + row) * args->channels + c;
                store_f(lines[row], mul_add(left < 16 ? load_f(x, left) : load_f(x), gain, shift));
            }
            for (int lane = 0; lane < left; lane++) {
                float* out = args->out + (image * args->channels + c + lane) * args->tokens + first;
                for (int64_t row = 0; row < rows; row++) out[row] = lines[row][lane];
            }
        }
    }
    timer.lap(PHASE_OUTPUT);
}

// ---------------------------------------------------------------------------------------------------------------
// Windows: partition and cyclic shift are index arithmetic

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

// Select the keys of one query and return how many they are. VECTORS is the number of key vectors, 0 if only known
// at run time.
template <int VECTORS>
SIMD int select_keys(const uint32_t* query, const uint32_t* keys, int64_t head_words, int64_t padded,
                     const float* bias, const uint32_t* allowed, float step, float margin, uint32_t* selected) {
    const int vectors = VECTORS ? VECTORS : (int)(padded / 16);
    F16 scores[VECTORS ? VECTORS : MOST_TOKEN_VECTORS];
    F16 best = broadcast_f(-INFINITY);
    for (int v = 0; v < vectors; v++) {
        I16 counts = zero();
        for (int64_t w = 0; w < head_words; w++)
            counts = add_counts(counts, count_bits(bit_xor(broadcast(query[w * padded]), load(keys + w * padded + v * 16))));
        scores[v] = mul_add(to_float(widen_counts(counts)), broadcast_f(-step), load_f(bias + v * 16));
        if (allowed)
            scores[v] = where_f(mask_from_bits(allowed[v / 2] >> v % 2 * 16 & 0xffff), scores[v], broadcast_f(-INFINITY));
        best = max_f(best, scores[v]);
    }
    const F16 limit = broadcast_f(max_lane(best) - margin);
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
                masked ? s.allowed + token * s.token_words : nullptr, args->score_step, args->score_margin, s.selected);
            for (int64_t b = 0; b < s.head_blocks; b++) {
                const int64_t c = head * head_channels + b * 16;
                I16 counts = zero();
                for (int64_t w = 0; w < s.token_words; w++)
                    counts = add_counts(
                        counts, count_bits(bit_and(load(s.values + w * channels + c), broadcast(s.selected[w]))));
                const F16 needed = mul_f(load_f(args->value_ratio + c), broadcast_f(number));
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
                pack_row(s.rows[t], args->gain, args->shift, args->channels, s.bits + t * words);
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

// ---------------------------------------------------------------------------------------------------------------
// The dual branch

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
