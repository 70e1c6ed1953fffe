// Counts by half bytes, for AVX2 and AVX-512BW. How many bits of the half bytes of two rows differ from each of the 16 that a
// weight's may be is a row of a table, and the half bytes of 32 channels, or of 64, are looked up there at once.

#define LOOKUP_WORDS 510                                          // of a row, at most
#define LOOKUP_BYTES (LOOKUP_WORDS * 8 * (int64_t)sizeof(Bytes))  // of weights that were taken apart: a vector of pairs

// The count of the first row in the lower half of a byte, that of the second in the upper.
struct HalfByteCounts {
    alignas(64) uint8_t of[16][16][16];  // [second][first][weight]

    explicit constexpr HalfByteCounts(bool differing) : of() {
        for (int i = 0; i < 16 * 16 * 16; i++) {
            const int weight = i % 16, first = i / 16 % 16, second = i / 256;
            of[second][first][weight] = (uint8_t)(differing ? bits(first ^ weight) | bits(second ^ weight) << 4
                                                            : bits(first & weight) | bits(second & weight) << 4);
        }
    }
    static constexpr int bits(int x) { return x % 2 + x / 2 % 2 + x / 4 % 2 + x / 8; }
};
constexpr HalfByteCounts DIFFERING_BITS(true), COMMON_BITS(false);

// How many half bytes rows of words have, and those that fill the last step of three, which are 0.
SIMD int64_t half_bytes_of(int64_t words) { return ceil_div(words * 8, 3) * 3; }

// Half bytes of two rows as places in that table, 8 for each word: the lower ones of its bytes, then the upper ones.
SIMD void find_places(const uint32_t* first, const uint32_t* second, int64_t words, uint16_t* places) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int64_t k = 0; k < words; k += 4) {
        const __m128i inside = _mm_cmpgt_epi32(_mm_set1_epi32((int)(words - k)), _mm_setr_epi32(0, 1, 2, 3));
        __m256i a = _mm256_cvtepu32_epi64(_mm_maskload_epi32((const int*)first + k, inside));
        __m256i b = _mm256_cvtepu32_epi64(_mm_maskload_epi32((const int*)second + k, inside));
        a = _mm256_andnot_si256(mask, _mm256_or_si256(_mm256_slli_epi64(a, 4), _mm256_slli_epi64(a, 32)));
        b = _mm256_and_si256(mask, _mm256_or_si256(b, _mm256_slli_epi64(b, 28)));
        const __m256i even = _mm256_unpacklo_epi8(a, b), odd = _mm256_unpackhi_epi8(a, b);
        _mm256_storeu_si256((__m256i*)(places + 8 * k), _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_storeu_si256((__m256i*)(places + 8 * k + 16), _mm256_permute2x128_si256(even, odd, 0x31));
    }
}

// Rows of bits, and their places, found once where all of them fit. Two rows at a time: the last may be alone, and stands
// for both.
struct RowsToCount : Rows {
    static const int64_t MOST = ROWS_AT_A_TIME / 2 * 96 * 8;
    int64_t half_bytes;
    bool all;
    alignas(64) uint16_t memory[MOST + 32];

    METHOD RowsToCount(const uint32_t* bits, int64_t number, int64_t words)
        : Rows(bits, number, words), half_bytes(half_bytes_of(words)), all((number + 1) / 2 * half_bytes <= MOST) {
        for (int64_t row = 0; all && row < number; row += 2) find(row, memory + row / 2 * half_bytes);
    }
    METHOD void find(int64_t row, uint16_t* out) const {
        find_places(bits + row * words, bits + (row + 1 < number ? row + 1 : row) * words, words, out);
        for (int64_t k = words * 8; k < half_bytes; k++) out[k] = 0;
    }
    // Places of a row and the next, if need be in `own`.
    METHOD const uint16_t* places(int64_t row, uint16_t* own) const {
        if (all) return memory + row / 2 * half_bytes;
        find(row, own);
        return own;
    }
};

// Byte i of each of 32 words, as vector i.
SIMD void transpose_bytes(const uint32_t* first, const uint32_t* second, __m256i (&out)[4]) {
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i halves = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i x[4];
    for (int i = 0; i < 4; i++) {
        const __m256i words = _mm256_loadu_si256((const __m256i*)((i < 2 ? first : second) + i % 2 * 8));
        x[i] = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(words, bytes), halves);
    }
    const __m256i even[2] = {_mm256_unpacklo_epi64(x[0], x[1]), _mm256_unpacklo_epi64(x[2], x[3])};
    const __m256i odd[2] = {_mm256_unpackhi_epi64(x[0], x[1]), _mm256_unpackhi_epi64(x[2], x[3])};
    out[0] = _mm256_permute2x128_si256(even[0], even[1], 0x20);
    out[1] = _mm256_permute2x128_si256(odd[0], odd[1], 0x20);
    out[2] = _mm256_permute2x128_si256(even[0], even[1], 0x31);
    out[3] = _mm256_permute2x128_si256(odd[0], odd[1], 0x31);
}

// Bits of up to 32 rows, whose words lie `stride` apart, along the rows: a word of each channel.
SIMD void transpose_bits(const uint32_t* rows, int64_t stride, int64_t number, int64_t channels, uint32_t* out) {
    uint32_t words[32] = {0}, turned[32];
    for (int64_t row = 0; row < number; row++) words[row] = rows[row * stride];
    __m256i bytes[4];
    transpose_bytes(words, words + 16, bytes);
    for (int i = 0; i < 4; i++)
        for (int bit = 7; bit >= 0; bit--) {
            turned[i * 8 + bit] = (uint32_t)_mm256_movemask_epi8(bytes[i]);
            bytes[i] = _mm256_add_epi8(bytes[i], bytes[i]);
        }
    memcpy(out, turned, channels * sizeof(uint32_t));
}

// Half bytes of a word of each of 32 channels, `stride` apart, in the order of `find_places`.
SIMD void take_apart(const uint32_t* first, const uint32_t* second, uint8_t* out, int64_t stride) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i bytes[4];
    transpose_bytes(first, second, bytes);
    for (int i = 0; i < 4; i++) {
        _mm256_store_si256((__m256i*)(out + i * stride), _mm256_and_si256(bytes[i], low));
        _mm256_store_si256((__m256i*)(out + (i + 4) * stride), _mm256_and_si256(_mm256_srli_epi16(bytes[i], 4), low));
    }
}

// Half bytes of the weights of a few pairs of blocks, [half byte][pair][32]. A pair may lack its second block, and the last
// vector of pairs one of them.
struct Apart {
    alignas(64) uint8_t memory[LOOKUP_BYTES];

    METHOD void take(const uint32_t* weight, int64_t words, int64_t blocks, int pairs) {
        const uint32_t none[16] = {0};
        for (int pair = 0; pair < pairs; pair++)
            for (int64_t k = 0; k < words; k++) {
                const uint32_t *first = weight + (2 * pair * words + k) * 16, *second = first + words * 16;
                take_apart(2 * pair < blocks ? first : none, 2 * pair + 1 < blocks ? second : none,
                           memory + (k * 8 * pairs + pair) * 32, pairs * 32);
            }
        memset(memory + words * 8 * pairs * 32, 0, (half_bytes_of(words) - words * 8) * pairs * 32);
    }
};

// Counts of 32 channels, 16 bits each: 0 to 7 and 16 to 23, and 8 to 15 and 24 to 31.
struct Pair {
    __m256i low, high;

    METHOD I16 block(int i) const { return i ? widen_second(low, high) : widen_first(low, high); }
};

SIMD Pair pair_of(I16 first, I16 second) { return {narrow_low(first, second), narrow_high(first, second)}; }

// Bytes of all bits where a bit is set, see `outside` of 32-bit counts; channels are in order.
SIMD __m256i outside(Pair counts, Pair low, Pair width) {
    const auto set = [](__m256i count, __m256i from, __m256i range) {
        const __m256i above = _mm256_sub_epi16(count, from);
        return _mm256_cmpeq_epi16(_mm256_max_epu16(above, range), above);
    };
    return _mm256_packs_epi16(set(counts.low, low.low, width.low), set(counts.high, low.high, width.high));
}

// Those of all pairs of a vector.
struct Counts {
    Bytes low, high;

    METHOD Pair pair(int i) const { return {part_of(low, i), part_of(high, i)}; }
};

// Count two rows and V vectors of pairs of blocks.
template <int V>
SIMD void look_up(const HalfByteCounts& counts_of, const uint16_t* places, const uint8_t* weights, int64_t half_bytes,
                  Counts (&total)[2][V]) {
    const Bytes none = all_bytes(0), low = all_bytes(15);
    const int64_t size = sizeof(Bytes);
    for (int v = 0; v < V; v++) total[0][v] = total[1][v] = {none, none};
    for (int64_t start = 0; start < half_bytes; start += 60) {  // a byte holds 63 counts
        const int64_t end = half_bytes - start < 60 ? half_bytes : start + 60;
        Bytes first[V], second[V];
        for (int v = 0; v < V; v++) first[v] = second[v] = none;
        for (int64_t k = start; k < end; k += 3) {  // half a byte holds 3 counts
            Bytes both[V];
            for (int i = 0; i < 3; i++) {
                const Bytes of_weights = repeat_16_bytes(counts_of.of[0][0] + places[k + i]);
                for (int v = 0; v < V; v++) {
                    const Bytes counts = pick_bytes(of_weights, load_bytes(weights + ((k + i) * V + v) * size));
                    both[v] = i ? add_bytes(both[v], counts) : counts;
                }
            }
            for (int v = 0; v < V; v++) {
                first[v] = add_bytes(first[v], and_bytes(both[v], low));
                second[v] = add_bytes(second[v], shift_right<4>(both[v]));
            }
        }
        for (int v = 0; v < V; v++) {
            // the shift above brought first counts of odd bytes into the bytes before them
            second[v] = subtract_bytes(second[v], shift_right<8>(shift_left<12>(shift_right<8>(first[v]))));
            total[0][v] = {add_halves(total[0][v].low, low_halves(first[v])),
                           add_halves(total[0][v].high, high_halves(first[v]))};
            total[1][v] = {add_halves(total[1][v].low, low_halves(second[v])),
                           add_halves(total[1][v].high, high_halves(second[v]))};
        }
    }
}

// What becomes of the counts of P pairs of blocks from `block` on, of `blocks` in all: numbers of 32 bits, block by block.
template <int P, class Emit>
struct ToLanes {
    const Emit emit;
    int64_t block, blocks;

    METHOD void operator()(int64_t row, int p, Pair counts) const {
        const int64_t first = block + 2 * p;
        if (first < blocks) emit(row, first, counts.block(0));
        if (first + 1 < blocks) emit(row, first + 1, counts.block(1));
    }
};

// Or bits: no row is so long that 16 bits would not tell where a count lies, see `outside`.
template <int P, class Emit>
struct ToPairBits {
    const Emit emit;
    int64_t block, blocks;
    Pair lows[P], widths[P];

    METHOD ToPairBits(const Emit& emit, int64_t block, int64_t blocks) : emit(emit), block(block), blocks(blocks) {
        for (int p = 0; p < P; p++) {
            const int64_t first = block + 2 * p < blocks ? block + 2 * p : block;
            const int64_t second = first + 1 < blocks ? first + 1 : first;
            lows[p] = pair_of(load(emit.low + first * 16), load(emit.low + second * 16));
            widths[p] = pair_of(load(emit.width + first * 16), load(emit.width + second * 16));
        }
    }
    METHOD void operator()(int64_t row, int p, Pair counts) const {
        const int64_t first = block + 2 * p;
        const uint32_t bits = (uint32_t)_mm256_movemask_epi8(outside(counts, lows[p], widths[p]));
        if (first < blocks) emit.store(row, first, (uint16_t)bits);
        if (first + 1 < blocks) emit.store(row, first + 1, (uint16_t)(bits >> 16));
    }
};

template <int P, class Emit>
SIMD ToLanes<P, Emit> pairs_for(const Emit& emit, const void*, int64_t block, int64_t blocks) {
    return {emit, block, blocks};
}
template <int P, class Emit>
SIMD ToPairBits<P, Emit> pairs_for(const Emit& emit, const ToBits*, int64_t block, int64_t blocks) {
    return {emit, block, blocks};
}

// The counts of P pairs of blocks themselves.
template <int P>
struct ToPairs {
    Pair (*out)[P];

    METHOD void operator()(int64_t row, int p, Pair counts) const { out[row][p] = counts; }
};

// Two rows from `row` on, or one if it is the last.
template <int V, class Emit>
SIMD void look_up_tile(const HalfByteCounts& counts_of, const uint16_t* places, const uint8_t* weights, int64_t half_bytes,
                       int64_t row, int64_t rows, const Emit& emit) {
    Counts total[2][V];
    look_up<V>(counts_of, places, weights, half_bytes, total);
    for (int r = 0; r < 2 && row + r < rows; r++)
        for (int p = 0; p < V * PAIRS; p++) emit(row + r, p, total[r][p / PAIRS].pair(p % PAIRS));
}

template <int V, class Emit>
SIMD void look_up_rows(const HalfByteCounts& counts_of, const RowsToCount& rows, const uint8_t* weights, const Emit& emit) {
    uint16_t own[LOOKUP_WORDS * 8 + 32];
    for (int64_t row = 0; row < rows.number; row += 2)
        look_up_tile<V>(counts_of, rows.places(row, own), weights, rows.half_bytes, row, rows.number, emit);
}

// Take groups of blocks apart, and hand them to `look.template up<vectors>(weights, first block)`.
template <class Look>
void look_up_groups(const uint32_t* weight, int64_t words, int64_t blocks, const Look& look) {
    Apart apart;
    const int64_t most = LOOKUP_BYTES / (half_bytes_of(words) * (int64_t)sizeof(Bytes));
    for (int64_t block = 0; block < blocks;) {
        const int64_t vectors = ceil_div(blocks - block, 2 * PAIRS), left = vectors < most ? vectors : most;
        const int number = left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;
        apart.take(weight + block * words * 16, words, blocks - block, number * PAIRS);
        if (number == 3)
            look.template up<3>(apart.memory, block);
        else if (number == 2)
            look.template up<2>(apart.memory, block);
        else
            look.template up<1>(apart.memory, block);
        block += number * 2 * PAIRS;
    }
}

template <class Emit>
struct LookRows {
    const RowsToCount& rows;
    int64_t blocks;
    const Emit& emit;

    template <int V>
    METHOD void up(const uint8_t* weights, int64_t block) const {
        look_up_rows<V>(DIFFERING_BITS, rows, weights, pairs_for<V * PAIRS>(emit, &emit, block, blocks));
    }
};
