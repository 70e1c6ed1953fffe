// AVX-512 that counts the bits of whole lanes (Ice Lake, Zen 4 and later).
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,fma")
#endif
#define MMBIVIT_VPOPCNTDQ
#include "simd_avx512.h"

#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

extern const CodePath mmbivit_avx512_vpopcntdq = {"avx512_vpopcntdq", ALL_KERNELS};
#endif
