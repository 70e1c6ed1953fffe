// NEON of 64-bit Arm.
#include "simd.h"

#if defined(__aarch64__)
#include "simd_neon.h"

#include "kernels.inl"

extern const CodePath mmbivit_neon = {"neon", ALL_KERNELS};
#endif
