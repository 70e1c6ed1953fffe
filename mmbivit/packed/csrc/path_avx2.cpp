// AVX2 with FMA (Haswell, Zen and later).
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "simd_avx2.h"

#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

extern const CodePath mmbivit_avx2 = {"avx2", ALL_KERNELS};
#endif
