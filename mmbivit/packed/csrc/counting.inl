// Signs, counts of differing bits, and what becomes of a count.
//
// A count is the number of differing bits of an activation row and a weight row. With K inputs in {-1, +1} their
// product sum is K - 2 * count; padding bits are 0 on both sides and never differ.

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
        store_bits(half++, at_least_f(mul_add(load_f(x + c), load_f(gain + c), load_f(shift + c)), zero_f()));
    if (c < k) {
        const F16 tail = mul_add(load_f(x + c, (int)(k - c)), load_f(gain + c), load_f(shift + c));
        *half++ = (uint16_t)(mask_bits(at_least_f(tail, zero_f())) & ((1u << (k - c)) - 1));
    }
    if (blocks_of(k) % 2) *half = 0;
}

// ---------------------------------------------------------------------------------------------------------------
// Counts of differing bits, a tile of rows and blocks at a time: from `emit.start(block)` on, handed to
// `emit(row, block, counts)`

// Weight rows of whole blocks.
struct Weights {
    const uint32_t* bits;  // [block][word][16]
    int64_t words;         // of a block
};

// Add the counts of `words` words from `first` of the weights on; those of a row lie `stride` apart.
template <int R, int B>
SIMD void add_differing(const uint32_t* a, int64_t stride, const Weights& weights, int64_t first, int64_t words,
                        I16 (&total)[R][B]) {
    const uint32_t* weight = weights.bits + first * 16;
    for (int64_t start = 0; start < words; start += COUNTS_AT_MOST) {
        const int64_t end = words - start < COUNTS_AT_MOST ? words : start + COUNTS_AT_MOST;
        I16 counts[R][B];
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) counts[r][b] = COUNTS_ARE_WIDE ? total[r][b] : zero();
        for (int64_t k = start; k < end; k++) {
            I16 w[B];
            for (int b = 0; b < B; b++) w[b] = load(weight + (b * weights.words + k) * 16);
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
}

// Rows of bits.
struct Rows {
    const uint32_t* bits;
    int64_t number, words;

    METHOD Rows(const uint32_t* bits, int64_t number, int64_t words) : bits(bits), number(number), words(words) {}
};

template <int R, int B, class Emit>
SIMD void tile(const Rows& rows, const Weights& weights, int64_t row, int64_t block, const Emit& emit) {
    I16 total[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) total[r][b] = emit.start(block + b);
    add_differing<R, B>(rows.bits + row * rows.words, rows.words, weights, 0, rows.words, total);
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) emit(row + r, block + b, total[r][b]);
}

template <int B, class Emit>
SIMD void rows_of_tiles(const Rows& rows, const Weights& weights, int64_t block, const Emit& to) {
    const Emit emit = to;  // its pointers stay in registers, as no store can reach them
    int64_t row = 0;
    for (; row + COUNT_ROWS <= rows.number; row += COUNT_ROWS) tile<COUNT_ROWS, B>(rows, weights, row, block, emit);
    for (; row < rows.number; row++) tile<1, B>(rows, weights, row, block, emit);
}

// Integer accumulators.
struct ToIntegers {
    int32_t* out;
    int64_t k, n;

    METHOD I16 start(int64_t) const { return zero(); }
    METHOD void operator()(int64_t row, int64_t block, I16 count) const {
        const int64_t left = n - block * 16;
        store_i(out + row * n + block * 16, accumulator(count, k), left < 16 ? (int)left : 16);
    }
};

SIMD F16 rprelu(F16 y, F16 gamma, F16 slope, F16 zeta) {
    // The second operand of max and min is the one that lets NaN through.
    const F16 shifted = sub_f(y, gamma);
    return add_f(add_f(max_f(zero_f(), shifted), mul_f(min_f(zero_f(), shifted), slope)), zeta);
}

// scale * accumulator + bias, through RPReLU if there is one, plus what `add` holds if anything is added.
template <bool ADD, bool RPRELU>
struct ToFloats {
    float* const* out;
    const float* const* add;
    const float *scale, *bias, *act;
    int64_t k, n, padded;

    METHOD I16 start(int64_t) const { return zero(); }
    METHOD void operator()(int64_t row, int64_t block, I16 count) const {
        const int64_t c = block * 16;
        F16 y = mul_add(to_float(accumulator(count, k)), load_f(scale + c), load_f(bias + c));
        if (RPRELU) y = rprelu(y, load_f(act + c), load_f(act + padded + c), load_f(act + 2 * padded + c));
        if (c + 16 <= n) {
            if (ADD) y = add_f(y, load_f(add[row] + c));
            store_f(out[row] + c, y);
        } else {
            if (ADD) y = add_f(y, load_f(add[row] + c, (int)(n - c)));
            store_f(out[row] + c, y, (int)(n - c));
        }
    }
};

// Base of what makes bits of counts: see `outside`. Counts start at -low, so that one comparison is left.
struct ToBits {
    const uint32_t *low, *width;

    METHOD I16 start(int64_t block) const { return sub(zero(), load(low + block * 16)); }
    METHOD M16 set(int64_t block, I16 count) const { return at_least(count, load(width + block * 16)); }
};

// Bits of a row, in the order of the channels.
struct ToRowBits : ToBits {
    uint16_t* out;
    int64_t stride;  // halves of a row

    METHOD void operator()(int64_t row, int64_t block, I16 count) const {
        store_bits(out + row * stride + block, set(block, count));
    }
    METHOD void store(int64_t row, int64_t block, uint16_t bits) const { out[row * stride + block] = bits; }
};

// Bits of queries or keys, [head][word][token]: one vector holds the same word of 16 tokens.
struct ToHeadBits : ToBits {
    uint16_t* out;
    const int32_t* offsets;  // of each block, in halves

    METHOD void operator()(int64_t row, int64_t block, I16 count) const {
        store_bits(out + offsets[block] + row * 2, set(block, count));
    }
    METHOD void store(int64_t row, int64_t block, uint16_t bits) const { out[offsets[block] + row * 2] = bits; }
};

#ifdef LOOKUP
#include "lookup.inl"
#else
typedef Rows RowsToCount;

// Bits of values along the tokens, [token word][channel]; `out` starts as 0.
struct ToTokenBits : ToBits {
    uint32_t* out;
    int64_t channels;

    METHOD void operator()(int64_t row, int64_t block, I16 count) const {
        uint32_t* word = out + row / 32 * channels + block * 16;
        store(word, or_where(load(word), set(block, count), broadcast(1u << row % 32)));
    }
};
#endif

template <class Emit>
void count_differing(const RowsToCount& rows, const uint32_t* weight, int64_t blocks, const Emit& emit) {
    const int64_t words = rows.words;
#ifdef LOOKUP
    if (words <= LOOKUP_WORDS) return look_up_groups(weight, words, blocks, LookRows<Emit>{rows, blocks, emit});
#endif
    int64_t block = 0;
    for (; block + COUNT_BLOCKS <= blocks; block += COUNT_BLOCKS)
        rows_of_tiles<COUNT_BLOCKS>(rows, {weight + block * words * 16, words}, block, emit);
    for (; block < blocks; block++) rows_of_tiles<1>(rows, {weight + block * words * 16, words}, block, emit);
}

template <class Emit>
void count_differing(const uint32_t* a, int64_t rows, int64_t words, const uint32_t* weight, int64_t blocks,
                     const Emit& emit) {
    count_differing(RowsToCount(a, rows, words), weight, blocks, emit);
}

}  // namespace
