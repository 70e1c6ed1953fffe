// 16 lanes of 32 bits in one AVX-512 register.
#include <immintrin.h>

namespace {

typedef __m512i I16;
typedef __m512 F16;
typedef __mmask16 M16;

#define TILE_ROWS 7
#define TILE_BLOCKS 3

SIMD I16 zero() { return _mm512_setzero_si512(); }
SIMD I16 load(const uint32_t* p) { return _mm512_loadu_si512(p); }
SIMD void store(uint32_t* p, I16 a) { _mm512_storeu_si512(p, a); }
SIMD I16 broadcast(uint32_t a) { return _mm512_set1_epi32((int)a); }
SIMD I16 bit_xor(I16 a, I16 b) { return _mm512_xor_si512(a, b); }
SIMD I16 bit_and(I16 a, I16 b) { return _mm512_and_si512(a, b); }
SIMD I16 add(I16 a, I16 b) { return _mm512_add_epi32(a, b); }
SIMD I16 sub(I16 a, I16 b) { return _mm512_sub_epi32(a, b); }
SIMD M16 at_least(I16 a, I16 b) { return _mm512_cmpge_epu32_mask(a, b); }
SIMD I16 or_where(I16 a, M16 where, I16 bits) { return _mm512_mask_or_epi32(a, where, a, bits); }

SIMD F16 load_f(const float* p) { return _mm512_loadu_ps(p); }
SIMD F16 load_f(const float* p, int n) { return _mm512_maskz_loadu_ps((M16)((1u << n) - 1), p); }
SIMD void store_f(float* p, F16 a) { _mm512_storeu_ps(p, a); }
SIMD void store_f(float* p, F16 a, int n) { _mm512_mask_storeu_ps(p, (M16)((1u << n) - 1), a); }
SIMD void store_i(int32_t* p, I16 a, int n) { _mm512_mask_storeu_epi32(p, (M16)((1u << n) - 1), a); }
SIMD F16 broadcast_f(float a) { return _mm512_set1_ps(a); }
SIMD F16 to_float(I16 a) { return _mm512_cvtepi32_ps(a); }
SIMD F16 mul_add(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
SIMD F16 add_f(F16 a, F16 b) { return _mm512_add_ps(a, b); }
SIMD F16 sub_f(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
SIMD F16 mul_f(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
SIMD F16 div_f(F16 a, F16 b) { return _mm512_div_ps(a, b); }
SIMD F16 max_f(F16 a, F16 b) { return _mm512_max_ps(a, b); }
SIMD F16 min_f(F16 a, F16 b) { return _mm512_min_ps(a, b); }
SIMD float max_lane(F16 a) { return _mm512_reduce_max_ps(a); }
SIMD float sum_lanes(F16 a) { return _mm512_reduce_add_ps(a); }
SIMD M16 at_least_f(F16 a, F16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
SIMD F16 where_f(M16 where, F16 yes, F16 no) { return _mm512_mask_blend_ps(where, no, yes); }
SIMD I16 as_bits(F16 a) { return _mm512_castps_si512(a); }
SIMD F16 as_floats(I16 a) { return _mm512_castsi512_ps(a); }
SIMD I16 to_exponent(I16 a) { return _mm512_slli_epi32(a, 23); }
SIMD uint32_t mask_bits(M16 a) { return a; }
SIMD void store_bits(uint16_t* p, M16 a) { *(M16*)p = a; }
SIMD M16 mask_from_bits(uint32_t a) { return (M16)a; }

#ifdef MMBIVIT_VPOPCNTDQ
// Counts are final at once: VPOPCNTD counts whole lanes.
#define COUNTS_AT_MOST (1 << 20)
#define COUNTS_ARE_WIDE true
#define COUNT_ROWS 7
#define COUNT_BLOCKS 3
SIMD I16 count_bits(I16 a) { return _mm512_popcnt_epi32(a); }
SIMD I16 add_counts(I16 a, I16 b) { return _mm512_add_epi32(a, b); }
SIMD I16 widen_counts(I16 a) { return a; }
#else
// Counts of single bytes, looked up per half byte; a byte holds the sum of 31 of them.
#define COUNTS_AT_MOST 31
#define COUNTS_ARE_WIDE false
#define COUNT_ROWS 4
#define COUNT_BLOCKS 2
SIMD I16 count_bits(I16 a) {
    const I16 table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const I16 low = _mm512_set1_epi8(15);
    const I16 first = _mm512_shuffle_epi8(table, _mm512_and_si512(a, low));
    const I16 second = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(a, 4), low));
    return _mm512_add_epi8(first, second);
}
SIMD I16 add_counts(I16 a, I16 b) { return _mm512_add_epi8(a, b); }
SIMD I16 widen_counts(I16 a) {
    return _mm512_madd_epi16(_mm512_maddubs_epi16(a, _mm512_set1_epi8(1)), _mm512_set1_epi16(1));
}

// Vectors of bytes, for the lookup of counts.
#define LOOKUP
#define PAIRS 2  // of blocks in a vector
typedef __m512i Bytes;
SIMD Bytes all_bytes(char a) { return _mm512_set1_epi8(a); }
SIMD Bytes load_bytes(const uint8_t* p) { return _mm512_load_si512(p); }
SIMD Bytes repeat_16_bytes(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)p)); }
SIMD Bytes pick_bytes(Bytes of, Bytes places) { return _mm512_shuffle_epi8(of, places); }  // of 16, again and again
SIMD Bytes and_bytes(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
SIMD Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
SIMD Bytes subtract_bytes(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
SIMD Bytes add_halves(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
template <int BITS> SIMD Bytes shift_left(Bytes a) { return _mm512_slli_epi16(a, BITS); }
template <int BITS> SIMD Bytes shift_right(Bytes a) { return _mm512_srli_epi16(a, BITS); }
SIMD Bytes low_halves(Bytes a) { return _mm512_unpacklo_epi8(a, all_bytes(0)); }
SIMD Bytes high_halves(Bytes a) { return _mm512_unpackhi_epi8(a, all_bytes(0)); }
SIMD __m256i part_of(Bytes a, int i) { return i ? _mm512_extracti64x4_epi64(a, 1) : _mm512_castsi512_si256(a); }

// The same channels of two blocks as 16 bits, and back: channels 0 to 7 in `low`, 8 to 15 in `high`.
SIMD __m256i narrow_low(I16 first, I16 second) {
    return _mm256_permute2x128_si256(_mm512_cvtepi32_epi16(first), _mm512_cvtepi32_epi16(second), 0x20);
}
SIMD __m256i narrow_high(I16 first, I16 second) {
    return _mm256_permute2x128_si256(_mm512_cvtepi32_epi16(first), _mm512_cvtepi32_epi16(second), 0x31);
}
SIMD I16 widen_first(__m256i low, __m256i high) { return _mm512_cvtepu16_epi32(_mm256_permute2x128_si256(low, high, 0x20)); }
SIMD I16 widen_second(__m256i low, __m256i high) { return _mm512_cvtepu16_epi32(_mm256_permute2x128_si256(low, high, 0x31)); }
#endif

}  // namespace
