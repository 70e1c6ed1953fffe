// 16 lanes of 32 bits in two AVX2 registers.
#include <immintrin.h>
#include <string.h>

namespace {

struct I16 { __m256i a, b; };
struct F16 { __m256 a, b; };
struct M16 { __m256i a, b; };  // all bits of a lane set, or none

#define TILE_ROWS 4
#define TILE_BLOCKS 1
#define COUNT_ROWS 4
#define COUNT_BLOCKS 1

SIMD I16 zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
SIMD I16 load(const uint32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
SIMD void store(uint32_t* p, I16 x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)(p + 8), x.b);
}
SIMD I16 broadcast(uint32_t x) { return {_mm256_set1_epi32((int)x), _mm256_set1_epi32((int)x)}; }
SIMD I16 bit_xor(I16 x, I16 y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
SIMD I16 bit_and(I16 x, I16 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
SIMD I16 add(I16 x, I16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
SIMD I16 sub(I16 x, I16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
SIMD __m256i at_least_8(__m256i x, __m256i y) { return _mm256_cmpeq_epi32(_mm256_max_epu32(x, y), x); }
SIMD M16 at_least(I16 x, I16 y) { return {at_least_8(x.a, y.a), at_least_8(x.b, y.b)}; }
SIMD I16 or_where(I16 x, M16 where, I16 bits) {
    return {_mm256_or_si256(x.a, _mm256_and_si256(where.a, bits.a)),
            _mm256_or_si256(x.b, _mm256_and_si256(where.b, bits.b))};
}

SIMD F16 load_f(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SIMD void store_f(float* p, F16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
SIMD F16 load_f(const float* p, int n) {
    float lanes[16] = {0};
    memcpy(lanes, p, n * sizeof(float));
    return load_f(lanes);
}
SIMD void store_f(float* p, F16 x, int n) {
    float lanes[16];
    store_f(lanes, x);
    memcpy(p, lanes, n * sizeof(float));
}
SIMD void store_i(int32_t* p, I16 x, int n) {
    uint32_t lanes[16];
    store(lanes, x);
    memcpy(p, lanes, n * sizeof(int32_t));
}
SIMD F16 broadcast_f(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
SIMD F16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
SIMD F16 mul_add(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
SIMD F16 add_f(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
SIMD F16 sub_f(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
SIMD F16 mul_f(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
SIMD F16 div_f(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
SIMD F16 max_f(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
SIMD F16 min_f(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
SIMD float max_lane(F16 x) {
    const __m256 half = _mm256_max_ps(x.a, x.b);
    __m128 best = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    best = _mm_max_ps(best, _mm_movehl_ps(best, best));
    return _mm_cvtss_f32(_mm_max_ss(best, _mm_movehdup_ps(best)));
}
SIMD float sum_lanes(F16 x) {
    const __m256 half = _mm256_add_ps(x.a, x.b);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
SIMD __m256i at_least_f8(__m256 x, __m256 y) { return _mm256_castps_si256(_mm256_cmp_ps(x, y, _CMP_GE_OQ)); }
SIMD M16 at_least_f(F16 x, F16 y) { return {at_least_f8(x.a, y.a), at_least_f8(x.b, y.b)}; }
SIMD F16 where_f(M16 where, F16 yes, F16 no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_castsi256_ps(where.a)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_castsi256_ps(where.b))};
}
SIMD I16 as_bits(F16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
SIMD F16 as_floats(I16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
SIMD I16 to_exponent(I16 x) { return {_mm256_slli_epi32(x.a, 23), _mm256_slli_epi32(x.b, 23)}; }
SIMD uint32_t mask_bits(M16 x) {
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(x.a)) |
           (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(x.b)) << 8;
}
SIMD void store_bits(uint16_t* p, M16 x) { *p = (uint16_t)mask_bits(x); }
SIMD M16 mask_from_bits(uint32_t x) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i low = _mm256_and_si256(_mm256_set1_epi32((int)x), bits);
    const __m256i high = _mm256_and_si256(_mm256_set1_epi32((int)(x >> 8)), bits);
    return {_mm256_cmpeq_epi32(low, bits), _mm256_cmpeq_epi32(high, bits)};
}

// Counts of single bytes, looked up per half byte; a byte holds the sum of 31 of them.
#define COUNTS_AT_MOST 31
#define COUNTS_ARE_WIDE false
SIMD __m256i count_bits_8(__m256i x) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(x, low));
    const __m256i second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low));
    return _mm256_add_epi8(first, second);
}
SIMD __m256i widen_counts_8(__m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(x, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}
// Vectors of bytes, for the lookup of counts.
#define LOOKUP
#define LOOKUP_PAIRS  // also where there is a single pair of blocks
#define PAIRS 1       // of blocks in a vector
typedef __m256i Bytes;
SIMD Bytes all_bytes(char x) { return _mm256_set1_epi8(x); }
SIMD Bytes load_bytes(const uint8_t* p) { return _mm256_load_si256((const __m256i*)p); }
SIMD Bytes repeat_16_bytes(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)p)); }
SIMD Bytes pick_bytes(Bytes of, Bytes places) { return _mm256_shuffle_epi8(of, places); }  // of 16, again and again
SIMD Bytes and_bytes(Bytes x, Bytes y) { return _mm256_and_si256(x, y); }
SIMD Bytes add_bytes(Bytes x, Bytes y) { return _mm256_add_epi8(x, y); }
SIMD Bytes subtract_bytes(Bytes x, Bytes y) { return _mm256_sub_epi8(x, y); }
SIMD Bytes add_halves(Bytes x, Bytes y) { return _mm256_add_epi16(x, y); }
template <int BITS> SIMD Bytes shift_left(Bytes x) { return _mm256_slli_epi16(x, BITS); }
template <int BITS> SIMD Bytes shift_right(Bytes x) { return _mm256_srli_epi16(x, BITS); }
SIMD Bytes low_halves(Bytes x) { return _mm256_unpacklo_epi8(x, all_bytes(0)); }
SIMD Bytes high_halves(Bytes x) { return _mm256_unpackhi_epi8(x, all_bytes(0)); }
SIMD __m256i part_of(Bytes x, int) { return x; }

// The same channels of two blocks as 16 bits, and back: channels 0 to 7 in `low`, 8 to 15 in `high`.
SIMD __m256i narrow_8(__m256i x, __m256i y) {
    const __m256i half = _mm256_set1_epi32(0xffff);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(x, half), _mm256_and_si256(y, half)), 0xd8);
}
SIMD __m256i narrow_low(I16 first, I16 second) { return narrow_8(first.a, second.a); }
SIMD __m256i narrow_high(I16 first, I16 second) { return narrow_8(first.b, second.b); }
SIMD I16 widen_first(__m256i low, __m256i high) {
    return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(low)), _mm256_cvtepu16_epi32(_mm256_castsi256_si128(high))};
}
SIMD I16 widen_second(__m256i low, __m256i high) {
    return {_mm256_cvtepu16_epi32(_mm256_extracti128_si256(low, 1)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(high, 1))};
}

SIMD I16 count_bits(I16 x) { return {count_bits_8(x.a), count_bits_8(x.b)}; }
SIMD I16 add_counts(I16 x, I16 y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
SIMD I16 widen_counts(I16 x) { return {widen_counts_8(x.a), widen_counts_8(x.b)}; }

}  // namespace
