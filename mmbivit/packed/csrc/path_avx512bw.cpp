// AVX-512 that looks bit counts up (Skylake-X and later).
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include "simd_avx512.h"

#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

extern const CodePath mmbivit_avx512bw = {"avx512bw", ALL_KERNELS};
#endif
