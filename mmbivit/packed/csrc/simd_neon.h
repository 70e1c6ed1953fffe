// 16 lanes of 32 bits in four NEON registers (64-bit Arm).
#include <arm_neon.h>
#include <string.h>

namespace {

struct I16 { uint32x4_t v[4]; };
struct F16 { float32x4_t v[4]; };
struct M16 { uint32x4_t v[4]; };  // all bits of a lane set, or none

#define TILE_ROWS 4
#define TILE_BLOCKS 1
#define COUNT_ROWS 4
#define COUNT_BLOCKS 1
#define QUADS for (int i = 0; i < 4; i++)

SIMD I16 zero() { I16 r; QUADS r.v[i] = vdupq_n_u32(0); return r; }
SIMD I16 load(const uint32_t* p) { I16 r; QUADS r.v[i] = vld1q_u32(p + 4 * i); return r; }
SIMD void store(uint32_t* p, I16 a) { QUADS vst1q_u32(p + 4 * i, a.v[i]); }
SIMD I16 broadcast(uint32_t a) { I16 r; QUADS r.v[i] = vdupq_n_u32(a); return r; }
SIMD I16 bit_xor(I16 a, I16 b) { QUADS a.v[i] = veorq_u32(a.v[i], b.v[i]); return a; }
SIMD I16 bit_and(I16 a, I16 b) { QUADS a.v[i] = vandq_u32(a.v[i], b.v[i]); return a; }
SIMD I16 add(I16 a, I16 b) { QUADS a.v[i] = vaddq_u32(a.v[i], b.v[i]); return a; }
SIMD I16 sub(I16 a, I16 b) { QUADS a.v[i] = vsubq_u32(a.v[i], b.v[i]); return a; }
SIMD M16 at_least(I16 a, I16 b) { M16 r; QUADS r.v[i] = vcgeq_u32(a.v[i], b.v[i]); return r; }
SIMD I16 or_where(I16 a, M16 where, I16 bits) {
    QUADS a.v[i] = vorrq_u32(a.v[i], vandq_u32(where.v[i], bits.v[i]));
    return a;
}

SIMD F16 load_f(const float* p) { F16 r; QUADS r.v[i] = vld1q_f32(p + 4 * i); return r; }
SIMD void store_f(float* p, F16 a) { QUADS vst1q_f32(p + 4 * i, a.v[i]); }
SIMD F16 load_f(const float* p, int n) {
    float lanes[16] = {0};
    memcpy(lanes, p, n * sizeof(float));
    return load_f(lanes);
}
SIMD void store_f(float* p, F16 a, int n) {
    float lanes[16];
    store_f(lanes, a);
    memcpy(p, lanes, n * sizeof(float));
}
SIMD void store_i(int32_t* p, I16 a, int n) {
    uint32_t lanes[16];
    store(lanes, a);
    memcpy(p, lanes, n * sizeof(int32_t));
}
SIMD F16 broadcast_f(float a) { F16 r; QUADS r.v[i] = vdupq_n_f32(a); return r; }
SIMD F16 to_float(I16 a) { F16 r; QUADS r.v[i] = vcvtq_f32_s32(vreinterpretq_s32_u32(a.v[i])); return r; }
SIMD F16 mul_add(F16 a, F16 b, F16 c) { QUADS a.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]); return a; }
SIMD F16 add_f(F16 a, F16 b) { QUADS a.v[i] = vaddq_f32(a.v[i], b.v[i]); return a; }
SIMD F16 sub_f(F16 a, F16 b) { QUADS a.v[i] = vsubq_f32(a.v[i], b.v[i]); return a; }
SIMD F16 mul_f(F16 a, F16 b) { QUADS a.v[i] = vmulq_f32(a.v[i], b.v[i]); return a; }
SIMD F16 div_f(F16 a, F16 b) { QUADS a.v[i] = vdivq_f32(a.v[i], b.v[i]); return a; }
SIMD F16 max_f(F16 a, F16 b) { QUADS a.v[i] = vmaxq_f32(a.v[i], b.v[i]); return a; }
SIMD F16 min_f(F16 a, F16 b) { QUADS a.v[i] = vminq_f32(a.v[i], b.v[i]); return a; }
SIMD float max_lane(F16 a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]))); }
SIMD float sum_lanes(F16 a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3]))); }
SIMD M16 at_least_f(F16 a, F16 b) { M16 r; QUADS r.v[i] = vcgeq_f32(a.v[i], b.v[i]); return r; }
SIMD F16 where_f(M16 where, F16 yes, F16 no) {
    QUADS no.v[i] = vbslq_f32(where.v[i], yes.v[i], no.v[i]);
    return no;
}
SIMD I16 as_bits(F16 a) { I16 r; QUADS r.v[i] = vreinterpretq_u32_f32(a.v[i]); return r; }
SIMD F16 as_floats(I16 a) { F16 r; QUADS r.v[i] = vreinterpretq_f32_u32(a.v[i]); return r; }
SIMD I16 to_exponent(I16 a) { QUADS a.v[i] = vshlq_n_u32(a.v[i], 23); return a; }
SIMD uint32_t mask_bits(M16 a) {
    const uint32_t weights[4] = {1, 2, 4, 8};
    const uint32x4_t bits = vld1q_u32(weights);
    uint32_t r = 0;
    QUADS r |= vaddvq_u32(vandq_u32(a.v[i], bits)) << (4 * i);
    return r;
}
SIMD void store_bits(uint16_t* p, M16 x) { *p = (uint16_t)mask_bits(x); }
SIMD M16 mask_from_bits(uint32_t a) {
    const uint32_t weights[4] = {1, 2, 4, 8};
    const uint32x4_t bits = vld1q_u32(weights);
    M16 r;
    QUADS r.v[i] = vtstq_u32(vdupq_n_u32(a >> (4 * i)), bits);
    return r;
}

// Counts of single bytes; a byte holds the sum of 31 of them.
#define COUNTS_AT_MOST 31
#define COUNTS_ARE_WIDE false
SIMD I16 count_bits(I16 a) {
    QUADS a.v[i] = vreinterpretq_u32_u8(vcntq_u8(vreinterpretq_u8_u32(a.v[i])));
    return a;
}
SIMD I16 add_counts(I16 a, I16 b) { return add(a, b); }
SIMD I16 widen_counts(I16 a) {
    QUADS a.v[i] = vpaddlq_u16(vpaddlq_u8(vreinterpretq_u8_u32(a.v[i])));
    return a;
}

}  // namespace
