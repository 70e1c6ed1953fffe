// The memory a thread needs for one range of an operator. Without memory, a layout only counts its words.
#ifndef MMBIVIT_SCRATCH_H
#define MMBIVIT_SCRATCH_H

#include "kernels.h"

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t words_of(int64_t bits) { return ceil_div(bits, 32); }
inline int64_t blocks_of(int64_t channels) { return ceil_div(channels, 16); }

struct Scratch {
    uint32_t* memory;
    int64_t words = 0;

    explicit Scratch(uint32_t* memory) : memory(memory) {}
    uint32_t* take(int64_t count) {
        uint32_t* start = memory ? memory + words : nullptr;
        words += ceil_div(count, 16) * 16;  // whole vectors
        return start;
    }
    template <class T>
    T* take_array(int64_t count) {
        return reinterpret_cast<T*>(take(ceil_div(count * (int64_t)sizeof(T), 4)));
    }
};

struct RowScratch : Scratch {
    float **out;
    const float** add;
    uint32_t* bits;

    RowScratch(int64_t k, uint32_t* memory) : Scratch(memory) {
        out = take_array<float*>(ROWS_AT_A_TIME);
        add = take_array<const float*>(ROWS_AT_A_TIME);
        bits = take(ROWS_AT_A_TIME * words_of(k));
    }
};

struct EmbedScratch : Scratch {
    float* patches;

    EmbedScratch(const EmbedArgs* args, uint32_t* memory) : Scratch(memory) {
        patches = take_array<float>(ROWS_AT_A_TIME * args->in_channels * args->patch * args->patch);
    }
};

struct MergeScratch : RowScratch {
    float* row;

    MergeScratch(const MergeArgs* args, uint32_t* memory) : RowScratch(4 * args->channels, memory) {
        row = take_array<float>(4 * args->channels);
    }
};

struct WindowScratch : Scratch {
    float** rows;      // the tokens in x, null for padding
    int32_t* regions;  // tokens of equal region attend to each other

    WindowScratch(int64_t tokens, uint32_t* memory) : Scratch(memory) {
        rows = take_array<float*>(tokens);
        regions = take_array<int32_t>(tokens);
    }
};

inline int64_t tokens_of(const Layout& layout) { return layout.window_height * layout.window_width; }

// What select_keys needs for itself.
struct SelectScratch : Scratch {
    float* scores;
    uint32_t* selected;

    SelectScratch(const Layout& layout, uint32_t* memory) : Scratch(memory) {
        scores = take_array<float>(blocks_of(tokens_of(layout)) * 16);
        selected = take(words_of(tokens_of(layout)));
    }
};

struct WindowState {
    int64_t queries;  // tokens that are no padding
    int64_t masked;   // some must not attend to others
};

// Bits of queries, keys and values of a window.
struct HeadScratch : WindowScratch {
    int64_t tokens, padded_tokens, token_words, head_blocks, head_words;
    WindowState* window;
    float** real_rows;
    float* no_bias;
    int32_t* real;
    uint32_t *bits, *queries, *keys, *values, *allowed;

    template <class Args>
    HeadScratch(const Args* args, uint32_t* memory)
        : WindowScratch(tokens_of(args->layout), memory),
          tokens(tokens_of(args->layout)),
          padded_tokens(blocks_of(tokens) * 16),
          token_words(words_of(tokens)),
          head_blocks(blocks_of(args->head_dim)),
          head_words(words_of(head_blocks * 16)) {
        window = take_array<WindowState>(1);
        real_rows = take_array<float*>(tokens);
        no_bias = take_array<float>(args->bias ? 0 : padded_tokens);
        real = take_array<int32_t>(tokens);
        bits = take(tokens * words_of(args->channels));
        queries = take(args->heads * head_words * padded_tokens);
        keys = take(args->heads * head_words * padded_tokens);
        values = take(token_words * args->heads * head_blocks * 16);
        allowed = take(tokens * token_words);
    }
};

struct AttentionScratch : HeadScratch {
    int64_t out_words;
    int32_t* offsets;
    uint32_t* out;

    AttentionScratch(const AttentionArgs* args, uint32_t* memory)
        : HeadScratch(args, memory), out_words(words_of(args->heads * head_blocks * 16)) {
        offsets = take_array<int32_t>(args->heads * head_blocks);
        out = take(tokens * out_words);
    }
};

// How many parts a step of a window has that threads may share.
inline int64_t attention_parts(const Layout& layout, int64_t heads, AttentionStep step) {
    const int64_t chunks = ceil_div(tokens_of(layout), TOKENS_AT_A_TIME);
    return step == STEP_BEGIN ? 1 : step == STEP_HEADS ? chunks * heads : chunks;
}

struct ResidualRowScratch : Scratch {
    int64_t stride, out_stride;
    float *normed, *out;
    uint32_t* bits;

    ResidualRowScratch(const ResidualLinearArgs* args, uint32_t* memory)
        : Scratch(memory), stride(blocks_of(args->k) * 16), out_stride(blocks_of(args->n) * 16) {
        normed = take_array<float>(stride);
        out = take_array<float>(ROWS_AT_A_TIME * out_stride);
        bits = take(ROWS_AT_A_TIME * words_of(args->k));
    }
};

struct ResidualAttentionScratch : HeadScratch {
    int64_t stride, qkv_stride;
    float *qkv, *out;

    ResidualAttentionScratch(const ResidualAttentionArgs* args, uint32_t* memory)
        : HeadScratch(args, memory), stride(blocks_of(args->channels) * 16), qkv_stride(blocks_of(3 * args->channels) * 16) {
        qkv = take_array<float>(tokens * qkv_stride + 16);  // values may be read beyond the last row
        out = take_array<float>(tokens * stride);
    }
};

// Whether both branches are computed a window at a time.
inline bool mixes_inside(const MlpArgs* args) { return args->si_gain && !args->si_bits; }
inline bool mixes_inside(const ResidualMlpArgs* args) { return args->si_gain && !args->si_values; }

struct MixScratch : WindowScratch {
    int64_t tokens, blocks, token_words, si_words;
    uint32_t* token_bits;

    MixScratch(const MlpArgs* args, uint32_t* memory)
        : MixScratch(args, tokens_of(args->layout), memory) {}

   protected:
    MixScratch(const MlpArgs* args, int64_t tokens, uint32_t* memory)
        : WindowScratch(tokens, memory),
          tokens(tokens),
          blocks(blocks_of(args->channels)),
          token_words(words_of(tokens)),
          si_words(words_of(args->si_hidden)) {
        token_bits = take((token_words > si_words ? token_words : si_words) * 64 + 16);  // as half bytes, of two blocks
    }
};

struct MlpScratch : MixScratch {
    float** real_rows;
    uint32_t *bits, *hidden, *si_hidden;

    MlpScratch(const MlpArgs* args, uint32_t* memory)
        : MixScratch(args, mixes_inside(args) ? tokens_of(args->layout) : ROWS_AT_A_TIME, memory) {
        real_rows = take_array<float*>(tokens);
        bits = take(tokens * words_of(args->channels));
        hidden = take(tokens * words_of(args->hidden));
        si_hidden = take(mixes_inside(args) ? (blocks + 1) / 2 * 2 * si_words * 16 : 0);
    }
};

struct ResidualMixScratch : WindowScratch {
    int64_t tokens, token_words, si_words;
    float* token_values;
    uint32_t *token_bits, *si_bits;

    ResidualMixScratch(const ResidualMlpArgs* args, uint32_t* memory)
        : ResidualMixScratch(args, tokens_of(args->layout), memory) {}

   protected:
    ResidualMixScratch(const ResidualMlpArgs* args, int64_t tokens, uint32_t* memory)
        : WindowScratch(tokens, memory), tokens(tokens), token_words(words_of(tokens)), si_words(words_of(args->si_hidden)) {
        token_values = take_array<float>(args->si_gain ? tokens * 16 : 0);
        token_bits = take(token_words * 16);
        si_bits = take(si_words * 16);
    }
};

struct ResidualMlpScratch : ResidualMixScratch {
    int64_t stride, hidden_stride;
    float** real_rows;
    float *normed, *hidden, *skip, *si_values;
    uint32_t *bits, *hidden_bits;

    ResidualMlpScratch(const ResidualMlpArgs* args, uint32_t* memory)
        : ResidualMixScratch(args, mixes_inside(args) ? tokens_of(args->layout) : ROWS_AT_A_TIME, memory),
          stride(blocks_of(args->channels) * 16),
          hidden_stride(blocks_of(args->hidden) * 16) {
        real_rows = take_array<float*>(tokens);
        normed = take_array<float>(stride);
        hidden = take_array<float>(tokens * hidden_stride);
        skip = take_array<float>(tokens * stride);
        si_values = take_array<float>(mixes_inside(args) ? blocks_of(args->channels) * args->si_hidden * 16 : 0);
        bits = take(tokens * words_of(args->channels));
        hidden_bits = take(tokens * words_of(args->hidden));
    }
};

// What scores and selects the keys of a head in training.
struct HeadBitsScratch : Scratch {
    int64_t padded_tokens, token_words, head_blocks, head_words;
    float *no_bias, *scores;
    uint32_t *queries, *keys, *values, *allowed, *selected;

    template <class Args>
    HeadBitsScratch(const Args* args, uint32_t* memory)
        : Scratch(memory),
          padded_tokens(blocks_of(args->tokens) * 16),
          token_words(words_of(args->tokens)),
          head_blocks(blocks_of(args->head_dim)),
          head_words(words_of(args->head_dim)) {
        no_bias = take_array<float>(padded_tokens);
        scores = take_array<float>(padded_tokens);
        queries = take(head_words * padded_tokens);
        keys = take(head_words * padded_tokens);
        values = take(token_words * head_blocks * 16);
        allowed = take(args->mask ? args->tokens * token_words : 0);
        selected = take(token_words);
    }
};

// Of ROWS_AT_A_TIME queries, and all keys. What tiles read as rows may be read beyond its end, by less than a tile.
struct HeadGradientsScratch : HeadBitsScratch {
    int64_t stride;
    float *query_signs, *key_signs, *value_signs, *grad, *softmax, *weights, *grad_keys, *grad_values, *sums;

    HeadGradientsScratch(const AttentionGradientsArgs* args, uint32_t* memory)
        : HeadBitsScratch(args, memory), stride(head_blocks * 16) {
        query_signs = take_array<float>(args->tokens * stride);
        key_signs = take_array<float>(args->tokens * stride);
        value_signs = take_array<float>(stride * padded_tokens);
        grad = take_array<float>(ROWS_AT_A_TIME * stride);
        softmax = take_array<float>(ROWS_AT_A_TIME * padded_tokens + 16);
        weights = take_array<float>(ROWS_AT_A_TIME * padded_tokens + 16);
        grad_keys = take_array<float>(args->tokens * stride);
        grad_values = take_array<float>(args->tokens * stride);
        sums = take_array<float>(3 * stride);
    }
};

struct ConvScratch : Scratch {
    float* row;  // of the output, where a predictor follows

    ConvScratch(const ConvArgs* args, uint32_t* memory) : Scratch(memory) {
        row = take_array<float>(args->predictor ? args->out_width * args->n : 0);
    }
};

// What a bin takes of the rows of a map, or of its columns.
struct BinSide {
    int32_t first, number;  // of the weights that are not all 0
};

struct RoiAlignScratch : Scratch {
    BinSide *rows, *columns;
    float *row_weights, *column_weights;  // (bins, longest side of a map)

    RoiAlignScratch(const RoiAlignArgs* args, uint32_t* memory) : Scratch(memory) {
        rows = take_array<BinSide>(args->out_height);
        columns = take_array<BinSide>(args->out_width);
        row_weights = take_array<float>(args->out_height * args->longest_side);
        column_weights = take_array<float>(args->out_width * args->longest_side);
    }
};

}  // namespace

#endif
