// What the Python side (kernels.py) and the code paths share. Plain C types: no torch and no Python headers.
//
// Bits are uint32 words. Activations are rows: bit c % 32 of word c / 32 is channel c. Weights lie in blocks of 16
// output channels: [block][word][16 channels], so that one vector holds the same word of 16 channels. See packing.py.
#ifndef MMBIVIT_KERNELS_H
#define MMBIVIT_KERNELS_H

#include <stdint.h>

// Where time goes: one entry per phase, in seconds summed over threads. kernels.py has the same order.
enum Phase {
    PHASE_EMBED,      // patch embedding, in float
    PHASE_PACK,       // norm and sign of activations, window partition and shift included
    PHASE_QKV,        // queries, keys and values as bits
    PHASE_ATTENTION,  // scores, selection, selected values
    PHASE_PROJ,       // output projection and shortcut
    PHASE_FC1,        // MLP: hidden layer as bits
    PHASE_FC2,        // MLP: output and shortcut
    PHASE_SI,         // spatial interaction, its signs included
    PHASE_MERGE,      // patch merging
    PHASE_OUTPUT,     // output norms
    PHASE_LINEAR,     // single linear layers
    PHASE_CONV,       // convolutions
    PHASE_PREDICT,    // float products behind convolutions
    PHASE_ROI_ALIGN,  // features of regions
    PHASE_UPSAMPLE,   // top-down path of a feature pyramid
    PHASE_NMS,        // non-maximum suppression
    PHASES
};

// Sign of gain * x + shift, then a binary linear layer.
typedef struct {
    const float* x;              // (rows, k)
    const float* gain;           // (k, padded to 16)
    const float* shift;          // (k, padded to 16)
    const uint32_t* weight;      // (blocks, words, 16)
    const float* scale;          // (blocks * 16)
    const float* bias;           // (blocks * 16)
    const float* rprelu;         // (3, blocks * 16): gamma, slope, zeta; or null
    const float* residual;       // (rows, n), or null
    float* out;                  // (rows, n)
    int64_t rows, k, n;
} LinearArgs;

// Integer accumulators of bit rows: k - 2 * popcount(a xor w).
typedef struct {
    const uint32_t* a;           // (rows, words)
    const uint32_t* weight;      // (blocks, words, 16)
    int32_t* out;                // (rows, n)
    int64_t rows, k, n;
} MatmulArgs;

// Signs of gain * x + shift as bit rows.
typedef struct {
    const float* x;              // (rows, k)
    const float* gain;           // (k, padded to 16)
    const float* shift;          // (k, padded to 16)
    uint32_t* out;               // (rows, words)
    int64_t rows, k;
} PackArgs;

// How the tokens of a batch of feature maps lie in (shifted) windows.
typedef struct {
    int64_t batch, height, width, window_height, window_width, shift;
    int64_t mask_padding;        // real tokens do not attend to padding
} Layout;

// Which keys a query selects: those whose score reaches the limit of their head.
enum SelectionKind {
    SELECT_BELOW_BEST,  // the best score of the query plus the limit, which is negative
    SELECT_ABOVE,       // the limit itself
    SELECT_SHARE,       // where the softmax is e^limit
};

typedef struct {
    const float* step;           // (heads): what one differing bit takes from a score, 2 * scale
    const float* limit;          // (heads)
    int64_t kind;
} Selection;

// x += proj(attention(qkv(sign(norm(x))))), window by window. Gain and shift are of the norm and the signs; where it is
// a LayerNorm, they are of what it makes of x before its own, which is `normed`.
typedef struct {
    float* x;                    // (batch, height * width, channels), changed in place
    const float* normed;         // like x, or x itself
    const float* gain;           // (channels, padded to 16)
    const float* shift;          // (channels, padded to 16)
    const uint32_t* padding;     // (words): the bits of a padding token
    const uint32_t* qkv_weight;  // (3 * heads * head_blocks, words, 16)
    const uint32_t* qkv_low;     // thresholds on counts, (3 * heads * head_blocks * 16)
    const uint32_t* qkv_width;
    const float* bias;           // relative positions, (heads, tokens, tokens padded to 16); -inf on padding; or null
    const float* value_ratio;    // an output is +1 if the selected keys with a set bit are as many as this share of all
    const float* value_offset;   // that are selected, plus this; or null for 0
    const uint32_t* proj_weight; // (blocks, words of heads * head_blocks * 16, 16)
    const float* proj_scale;     // (blocks * 16)
    const float* proj_bias;      // (blocks * 16)
    Selection selection;
    Layout layout;
    int64_t channels, heads, head_dim;
} AttentionArgs;

// Attention of groups of tokens (windows) in training: signs of queries, keys and values, the keys that each query
// selects, and the sum or mean of their values. A unit is a head of a group. See training_attention.inl.
typedef struct {
    const float* qkv;            // (groups, tokens, 3, heads, head_dim)
    const float* gamma;          // (3, heads, head_dim): the thresholds of signs; or null
    const float* bias;           // (heads, tokens, tokens padded to 16); -inf on padding; or null
    const uint8_t* mask;         // (masks, tokens, tokens): 1 where a key is masked, of each group in turn; or null
    float* out;                  // (groups, tokens, heads, head_dim)
    uint32_t* bits;              // (groups, heads, tokens, 3, head words): what the backward pass needs; or null
    uint32_t* inside;            // like bits: whether the gradient passes the sign
    Selection selection;
    int64_t groups, tokens, heads, head_dim, masks, divide;
    int64_t share;               // units of one range
} AttentionBitsArgs;

// Its gradients. What is summed over groups is a sum for each range of units.
typedef struct {
    const float* grad;           // like out
    const uint32_t* bits;        // as above
    const uint32_t* inside;
    const float* bias;
    const uint8_t* mask;
    float* grad_qkv;             // like qkv
    float* grad_bias;            // (ranges, heads, tokens, tokens padded to 16), or null
    float* grad_signed;          // (ranges, 3, heads, head_dim): sums of grad_qkv over all tokens, or null
    Selection selection;
    int64_t groups, tokens, heads, head_dim, masks, divide;
    int64_t share;
} AttentionGradientsArgs;

// x += MLP(sign(norm(x))) + alpha * SI(norm(x)^T)^T; gain and shift as above.
typedef struct {
    float* x;                    // (batch, height * width, channels), changed in place
    const float* normed;         // like x, or x itself
    const float* gain;           // (channels, padded to 16)
    const float* shift;
    const uint32_t* fc1_weight;  // (hidden blocks, words, 16)
    const uint32_t* fc1_low;     // thresholds on counts, (hidden blocks * 16)
    const uint32_t* fc1_width;
    const uint32_t* fc2_weight;  // (blocks, hidden words, 16)
    const float* fc2_scale;      // (blocks * 16)
    const float* fc2_bias;
    const float* si_gain;        // (channels, padded to 16); null without spatial interaction
    const float* si_shift;
    const float* si_gamma;       // (tokens)
    const uint32_t* si1_weight;  // (si_hidden, token words)
    const uint32_t* si1_low;     // (si_hidden)
    const uint32_t* si1_width;
    const uint32_t* si2_weight;  // (tokens, si_hidden words)
    const float* si2_scale;      // (tokens)
    const float* si2_bias;
    const float* si_alpha;       // (channels, padded to 16)
    uint32_t* si_bits;           // (windows, blocks, si_hidden words, 16) of large windows, or null
    Layout layout;
    int64_t channels, hidden, si_hidden;
} MlpArgs;

// A binary linear layer with a shortcut: RPReLU(scale * (sign(x - threshold) . w) + bias + R(x)), where R brings x to
// the width of the output (see residual.inl).
typedef struct {
    const float* threshold;      // (k, padded to 16)
    const uint32_t* weight;      // as in the other structs
    const float* out;            // (5, n padded to 16): scale, bias, and of RPReLU gamma, slope, zeta
} ResidualLayer;

// One such layer, of gain * x + shift.
typedef struct {
    const float* x;              // (rows, k)
    const float* gain;           // (k, padded to 16)
    const float* shift;
    ResidualLayer layer;
    float* out;                  // (rows, n)
    int64_t rows, k, n;
} ResidualLinearArgs;

// x += proj(heads(attention(sign(qkv(norm(x)))))) with floats in between; otherwise like AttentionArgs.
typedef struct {
    float* x;                    // (batch, height * width, channels), changed in place
    const float* normed;         // like x, or x itself
    const float* gain;           // (channels, padded to 16)
    const float* shift;
    ResidualLayer qkv;           // channels -> 3 * channels
    const float* head_threshold; // of queries, keys and values, (3 * channels, padded to 16)
    const float* bias;           // relative positions, (heads, tokens, tokens padded to 16); -inf on padding; or null
    const float* head_out;       // (5, channels padded to 16): what becomes of the heads' output, like `out` of a layer
    ResidualLayer proj;          // channels -> channels
    Selection selection;
    Layout layout;
    int64_t channels, heads, head_dim;
    int64_t head_shortcut;       // queries, keys and values are added before the RPReLU of head_out
    int64_t divide;              // by the number of selected keys
} ResidualAttentionArgs;

// x += fc2(fc1(norm(x))) + alpha * si2(si1(norm(x)^T))^T with floats in between; otherwise like MlpArgs.
typedef struct {
    float* x;                    // (batch, height * width, channels), changed in place
    const float* normed;         // like x, or x itself
    const float* gain;           // (channels, padded to 16)
    const float* shift;
    ResidualLayer fc1, fc2;
    const float* si_gain;        // (channels, padded to 16); null without spatial interaction
    const float* si_shift;
    ResidualLayer si1, si2;      // over tokens: neither thresholds nor `out` are padded, weights are rows of words
    const float* si_alpha;       // (channels, padded to 16)
    float* si_values;            // (windows, blocks, si_hidden, 16) of large windows, or null
    Layout layout;
    int64_t channels, hidden, si_hidden;
} ResidualMlpArgs;

// Sign of the normalised 2 x 2 neighbours, then a binary linear layer.
typedef struct {
    const float* x;              // (batch, height * width, channels)
    const float* gain;           // (4 * channels, padded to 16)
    const float* shift;
    const uint32_t* weight;      // (blocks, words, 16)
    const float* scale;          // (blocks * 16)
    const float* bias;
    float* out;                  // (batch, ceil(height / 2) * ceil(width / 2), n)
    int64_t batch, height, width, channels, n;
} MergeArgs;

// Binary convolution of maps whose channels come last: RPReLU(scale * conv(sign(x - threshold)) + bias + factor * add).
// What lies beyond the border is 0 before the sign.
typedef struct {
    const float* x;              // (batch, height, width, channels)
    const float* threshold;      // (channels, padded to 16)
    const uint32_t* weight;      // (blocks, kernel_height * kernel_width * words, 16)
    const float* scale;          // (blocks * 16)
    const float* bias;
    const float* rprelu;         // (3, blocks * 16): gamma, slope, zeta; or null
    const float* add;            // like out, or null
    const float* factor;         // (blocks * 16); null without add
    const float* predictor;      // (n, outputs padded to 16): a float product follows; or null
    const float* predictor_bias; // (outputs, padded to 16)
    float* out;                  // (batch, out_height, out_width, n), or with a predictor (..., outputs); may be `add`
    int64_t batch, height, width, channels, n, outputs;
    int64_t kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
    int64_t dilation_height, dilation_width, out_height, out_width;
} ConvArgs;

// Average of bilinear samples in each bin of each region (RoIAlign), on maps whose channels come last.
typedef struct {
    const float* const* maps;    // (levels) addresses of (batch, height, width, channels)
    const int64_t* sides;        // (levels, 2): height, width
    const float* scales;         // (levels): map pixels per image pixel
    const float* rois;           // (regions, 5): image of the batch, x1, y1, x2, y2
    const int64_t* levels;       // (regions)
    float* out;                  // (regions, out_height, out_width, channels)
    int64_t regions, channels, out_height, out_width, longest_side;
    int64_t samples;             // along a side of a bin; 0 for as many as the bin has pixels
    int64_t aligned;             // half a pixel further up and left
} RoiAlignArgs;

// x += y, which is enlarged by taking the nearest.
typedef struct {
    float* x;                    // (batch, height, width, channels), changed in place
    const float* y;              // (batch, y_height, y_width, channels)
    int64_t batch, height, width, y_height, y_width, channels;
} UpsampleArgs;

// Greedy non-maximum suppression of boxes in the order of their scores.
typedef struct {
    const float* boxes;          // (4, padded): x1, y1, x2, y2; padded to 16
    const float* limit;          // (1): intersection over union from which on a box is suppressed
    float* areas;                // (padded)
    uint16_t* suppressed;        // (padded / 16), a bit for each box; starts as 0
    int64_t number, padded;
} NmsArgs;

// Float projection of the patches of images; what lies beyond the border is 0.
typedef struct {
    const float* images;         // (batch, in_channels, height, width)
    const float* weight;         // (in_channels * patch * patch, channels padded to 16)
    const float* bias;           // (channels padded to 16)
    float* out;                  // (batch, ceil(height / patch) * ceil(width / patch), channels)
    int64_t batch, in_channels, height, width, patch, channels;
} EmbedArgs;

// gain * x + shift.
typedef struct {
    const float* x;              // (rows, channels)
    const float* gain;           // (channels, padded to 16)
    const float* shift;
    float* out;                  // (rows, channels)
    int64_t rows, channels;
} MapArgs;

// Training: signs of x - gamma, and where |x - gamma| <= 1, as bit rows.
typedef struct {
    const float* x;              // (rows, k)
    const float* gamma;          // (k), or null for 0
    uint32_t* bits;              // (rows, words)
    uint32_t* inside;            // (rows, words)
    float* signs;                // (rows, k): -1 and +1, or null
    int64_t rows, k;
} SignBitsArgs;

// Bit rows as floats: -scale and +scale.
typedef struct {
    const uint32_t* bits;        // (rows, words)
    const float* scale;          // (rows), or null for 1
    float* out;                  // (rows, k)
    int64_t rows, k;
} UnpackArgs;

// grad = 0 where a bit of `inside` is 0; sums of columns.
typedef struct {
    const uint32_t* inside;      // (rows, words)
    float* grad;                 // (rows, k), changed in place
    float* sums;                 // (steps, k padded to 16), starts as 0; or null
    int64_t rows, k, step;
} PassInsideArgs;

// RPReLU(scale * (bits . weight) + bias).
typedef struct {
    const uint32_t* bits;        // (rows, words)
    const uint32_t* weight;      // (blocks, words, 16)
    const float* scale;          // (blocks * 16)
    const float* bias;           // (blocks * 16)
    const float* rprelu;         // (3, blocks * 16): gamma, slope, zeta; or null
    float* out;                  // (rows, n)
    int64_t rows, k, n;
} BitsLinearArgs;

typedef struct {
    float* y;                    // (rows, n), changed in place
    const float* rprelu;         // (3, n padded to 16): gamma, slope, zeta
    int64_t rows, n;
} RPReLUArgs;

// Gradients of RPReLU(y), where y is given, or scale * (bits . weight) + bias.
typedef struct {
    const float* y;              // (rows, n), or null
    const uint32_t* bits;        // (rows, words), or null
    const uint32_t* weight;      // (blocks, words, 16)
    const float* scale;          // (blocks * 16)
    const float* bias;           // (blocks * 16)
    const float* rprelu;         // (3, blocks * 16): gamma, slope, zeta
    const float* grad;           // (rows, n)
    float* out;                  // (rows, n), may be `grad`
    float* sums;                 // (steps, 3, blocks * 16): of gamma, slope, zeta; starts as 0
    int64_t rows, k, n, step;
} RPReLUGradientsArgs;

// scale * Sign(w - mean) of each row: mean and mean magnitude, and bit rows.
typedef struct {
    const float* weight;         // (rows, k)
    float* mean;                 // (rows), starts as 0
    float* scale;                // (rows)
    uint32_t* bits;              // (rows, words)
    int64_t rows, k, centered;   // centered: the mean is found and subtracted
} WeightBitsArgs;

// The gradient of the weights: factor * grad where |w - mean| <= 1, less its mean if `centered`.
typedef struct {
    const float* weight;         // (rows, k)
    const float* mean;           // (rows)
    const float* factor;         // (rows), or null for 1
    float* grad;                 // (rows, k), changed in place
    int64_t rows, k, centered;
} WeightGradientsArgs;

// The steps of attention where threads share windows.
enum AttentionStep { STEP_BEGIN, STEP_QKV, STEP_HEADS, STEP_PROJECT, ATTENTION_STEPS };

// What one thread works on: its memory, where it adds its time (null: not measured), and the memory of all windows with
// the step that is taken, where threads share windows.
typedef struct {
    uint32_t* memory;
    double* seconds;
    uint32_t* shared;
    enum AttentionStep step;
} Worker;

// One code path. Ranges are rows, or windows; scratch is in words, for any range up to ROWS_AT_A_TIME.
typedef struct {
    const char* name;
    void (*pack)(const PackArgs*, int64_t begin, int64_t end, Worker*);
    void (*matmul)(const MatmulArgs*, int64_t begin, int64_t end, Worker*);
    void (*linear)(const LinearArgs*, int64_t begin, int64_t end, Worker*);
    void (*merge)(const MergeArgs*, int64_t begin, int64_t end, Worker*);
    void (*attention)(const AttentionArgs*, int64_t begin, int64_t end, Worker*);
    void (*mlp)(const MlpArgs*, int64_t begin, int64_t end, Worker*);
    void (*mix_in)(const MlpArgs*, int64_t begin, int64_t end, Worker*);
    void (*mix_out)(const MlpArgs*, int64_t begin, int64_t end, Worker*);
    void (*embed)(const EmbedArgs*, int64_t begin, int64_t end, Worker*);
    void (*map)(const MapArgs*, int64_t begin, int64_t end, Worker*);
    void (*conv_pack)(const ConvArgs*, int64_t begin, int64_t end, Worker*);
    void (*conv)(const ConvArgs*, int64_t begin, int64_t end, Worker*);
    void (*roi_align)(const RoiAlignArgs*, int64_t begin, int64_t end, Worker*);
    void (*upsample_add)(const UpsampleArgs*, int64_t begin, int64_t end, Worker*);
    void (*nms)(const NmsArgs*, int64_t begin, int64_t end, Worker*);
    void (*residual_linear)(const ResidualLinearArgs*, int64_t begin, int64_t end, Worker*);
    void (*residual_attention)(const ResidualAttentionArgs*, int64_t begin, int64_t end, Worker*);
    void (*residual_mlp)(const ResidualMlpArgs*, int64_t begin, int64_t end, Worker*);
    void (*residual_mix_in)(const ResidualMlpArgs*, int64_t begin, int64_t end, Worker*);
    void (*residual_mix_out)(const ResidualMlpArgs*, int64_t begin, int64_t end, Worker*);
    void (*sign_bits)(const SignBitsArgs*, int64_t begin, int64_t end, Worker*);
    void (*unpack)(const UnpackArgs*, int64_t begin, int64_t end, Worker*);
    void (*pass_inside)(const PassInsideArgs*, int64_t begin, int64_t end, Worker*);
    void (*bits_linear)(const BitsLinearArgs*, int64_t begin, int64_t end, Worker*);
    void (*rprelu)(const RPReLUArgs*, int64_t begin, int64_t end, Worker*);
    void (*rprelu_gradients)(const RPReLUGradientsArgs*, int64_t begin, int64_t end, Worker*);
    void (*weight_bits)(const WeightBitsArgs*, int64_t begin, int64_t end, Worker*);
    void (*weight_gradients)(const WeightGradientsArgs*, int64_t begin, int64_t end, Worker*);
    void (*attention_bits)(const AttentionBitsArgs*, int64_t begin, int64_t end, Worker*);
    void (*attention_gradients)(const AttentionGradientsArgs*, int64_t begin, int64_t end, Worker*);
} CodePath;

#define ROWS_AT_A_TIME 56    // a multiple of all TILE_ROWS
#define TOKENS_AT_A_TIME 32  // a word of them

#ifdef __cplusplus
extern "C" {
#endif
double mmbivit_now(void);
#ifdef __cplusplus
}
#endif

#endif
