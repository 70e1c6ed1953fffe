// Any other CPU.
#include "simd.h"

#if 1
#include "simd_portable.h"

#include "kernels.inl"

extern const CodePath mmbivit_portable = {"portable", ALL_KERNELS};
#endif
