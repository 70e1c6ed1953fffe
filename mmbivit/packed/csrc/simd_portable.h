// 16 lanes of 32 bits in plain C; compilers turn these loops into whatever vectors the target has.
#include <math.h>
#include <string.h>

namespace {

struct I16 { uint32_t v[16]; };
struct F16 { float v[16]; };
typedef uint32_t M16;

#define TILE_ROWS 2
#define TILE_BLOCKS 1
#define COUNT_ROWS 2
#define COUNT_BLOCKS 1
#define LANES for (int i = 0; i < 16; i++)

SIMD I16 zero() { I16 r; LANES r.v[i] = 0; return r; }
SIMD I16 load(const uint32_t* p) { I16 r; memcpy(r.v, p, sizeof r.v); return r; }
SIMD void store(uint32_t* p, I16 a) { memcpy(p, a.v, sizeof a.v); }
SIMD I16 broadcast(uint32_t a) { I16 r; LANES r.v[i] = a; return r; }
SIMD I16 bit_xor(I16 a, I16 b) { LANES a.v[i] ^= b.v[i]; return a; }
SIMD I16 bit_and(I16 a, I16 b) { LANES a.v[i] &= b.v[i]; return a; }
SIMD I16 add(I16 a, I16 b) { LANES a.v[i] += b.v[i]; return a; }
SIMD I16 sub(I16 a, I16 b) { LANES a.v[i] -= b.v[i]; return a; }
SIMD M16 at_least(I16 a, I16 b) { M16 r = 0; LANES r |= (uint32_t)(a.v[i] >= b.v[i]) << i; return r; }
SIMD I16 or_where(I16 a, M16 where, I16 bits) { LANES a.v[i] |= bits.v[i] & (0u - (where >> i & 1)); return a; }

SIMD F16 load_f(const float* p) { F16 r; memcpy(r.v, p, sizeof r.v); return r; }
SIMD F16 load_f(const float* p, int n) { F16 r; LANES r.v[i] = i < n ? p[i] : 0.0f; return r; }
SIMD void store_f(float* p, F16 a) { memcpy(p, a.v, sizeof a.v); }
SIMD void store_f(float* p, F16 a, int n) { memcpy(p, a.v, n * sizeof(float)); }
SIMD void store_i(int32_t* p, I16 a, int n) { memcpy(p, a.v, n * sizeof(int32_t)); }
SIMD F16 broadcast_f(float a) { F16 r; LANES r.v[i] = a; return r; }
SIMD F16 to_float(I16 a) { F16 r; LANES r.v[i] = (float)(int32_t)a.v[i]; return r; }
SIMD F16 mul_add(F16 a, F16 b, F16 c) { LANES a.v[i] = a.v[i] * b.v[i] + c.v[i]; return a; }
SIMD F16 add_f(F16 a, F16 b) { LANES a.v[i] += b.v[i]; return a; }
SIMD F16 sub_f(F16 a, F16 b) { LANES a.v[i] -= b.v[i]; return a; }
SIMD F16 mul_f(F16 a, F16 b) { LANES a.v[i] *= b.v[i]; return a; }
SIMD F16 div_f(F16 a, F16 b) { LANES a.v[i] /= b.v[i]; return a; }
SIMD F16 max_f(F16 a, F16 b) { LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
SIMD F16 min_f(F16 a, F16 b) { LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
SIMD float max_lane(F16 a) { float r = a.v[0]; LANES r = a.v[i] > r ? a.v[i] : r; return r; }
SIMD float sum_lanes(F16 a) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
    return a.v[0];
}
SIMD M16 at_least_f(F16 a, F16 b) { M16 r = 0; LANES r |= (uint32_t)(a.v[i] >= b.v[i]) << i; return r; }
SIMD F16 where_f(M16 where, F16 yes, F16 no) { LANES no.v[i] = where >> i & 1 ? yes.v[i] : no.v[i]; return no; }
SIMD I16 as_bits(F16 a) { I16 r; memcpy(r.v, a.v, sizeof r.v); return r; }
SIMD F16 as_floats(I16 a) { F16 r; memcpy(r.v, a.v, sizeof r.v); return r; }
SIMD I16 to_exponent(I16 a) { LANES a.v[i] <<= 23; return a; }
SIMD uint32_t mask_bits(M16 a) { return a; }
SIMD void store_bits(uint16_t* p, M16 x) { *p = (uint16_t)mask_bits(x); }
SIMD M16 mask_from_bits(uint32_t a) { return a; }

// Counts of single bytes by adding neighbouring bits, pairs and half bytes; a byte holds the sum of 31 of them.
#define COUNTS_AT_MOST 31
#define COUNTS_ARE_WIDE false
SIMD I16 count_bits(I16 a) {
    LANES {
        uint32_t x = a.v[i];
        x -= x >> 1 & 0x55555555u;
        x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
        a.v[i] = (x + (x >> 4)) & 0x0f0f0f0fu;
    }
    return a;
}
SIMD I16 add_counts(I16 a, I16 b) { return add(a, b); }
SIMD I16 widen_counts(I16 a) {
    LANES {
        uint32_t x = (a.v[i] & 0x00ff00ffu) + (a.v[i] >> 8 & 0x00ff00ffu);
        a.v[i] = (x + (x >> 16)) & 0xffffu;
    }
    return a;
}

}  // namespace
