// What every code path starts from, before it defines its vectors. Only C headers: an inline function of the C++
// library compiled here for a newer CPU could replace the one that all other code uses.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#if defined(__GNUC__)
#define METHOD inline __attribute__((always_inline))
#else
#define METHOD inline
#endif
#define SIMD static METHOD

SIMD int popcount(uint32_t x) {
    x -= x >> 1 & 0x55555555u;
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    return (int)(((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}
