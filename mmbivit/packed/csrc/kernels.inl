// The kernels, written once for 16 lanes of 32 bits; each path_*.cpp compiles them for its instructions.

#include "scratch.h"

#include "counting.inl"
#include "rows.inl"
#include "attention.inl"
#include "mlp.inl"
#include "residual.inl"
#include "convolution.inl"
#include "roi_align.inl"
#include "detection.inl"
#include "training.inl"
#include "training_attention.inl"

// In the order of `struct CodePath`.
#define ALL_KERNELS                                                                                            \
    pack, matmul, linear, merge, attention, mlp, mix_in, mix_out, embed, map, conv_pack, conv, roi_align,      \
        upsample_add, nms, residual_linear, residual_attention, residual_mlp, residual_mix_in, residual_mix_out, \
        sign_bits, unpack, pass_inside, bits_linear, rprelu_rows, rprelu_gradients, weight_bits, weight_gradients, \
        attention_bits, attention_gradients
