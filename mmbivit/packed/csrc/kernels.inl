// The kernels, written once for 16 lanes of 32 bits; each path_*.cpp compiles them for its instructions.

#include "scratch.h"

#include "counting.inl"
#include "rows.inl"
#include "attention.inl"
#include "mlp.inl"
