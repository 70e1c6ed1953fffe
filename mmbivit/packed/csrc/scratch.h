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

struct AttentionScratch : WindowScratch {
    int64_t tokens, padded_tokens, token_words, head_blocks, head_words, out_words;
    float** real_rows;
    int32_t *real, *offsets;
    uint32_t *bits, *queries, *keys, *values, *out, *allowed, *selected;

    AttentionScratch(const AttentionArgs* args, uint32_t* memory)
        : WindowScratch(args->layout.window * args->layout.window, memory),
          tokens(args->layout.window * args->layout.window),
          padded_tokens(blocks_of(tokens) * 16),
          token_words(words_of(tokens)),
          head_blocks(blocks_of(args->head_dim)),
          head_words(words_of(head_blocks * 16)),
          out_words(words_of(args->heads * head_blocks * 16)) {
        real_rows = take_array<float*>(tokens);
        real = take_array<int32_t>(tokens);
        offsets = take_array<int32_t>(args->heads * head_blocks);
        bits = take(tokens * words_of(args->channels));
        queries = take(args->heads * head_words * padded_tokens);
        keys = take(args->heads * head_words * padded_tokens);
        values = take(token_words * args->heads * head_blocks * 16);
        out = take(tokens * out_words);
        allowed = take(tokens * token_words);
        selected = take(token_words);
    }
};

// Whether both branches are computed a window at a time.
inline bool mixes_inside(const MlpArgs* args) { return args->si_gain && !args->si_bits; }

struct MixScratch : WindowScratch {
    int64_t tokens, token_words, si_words;
    uint32_t* token_bits;

    MixScratch(const MlpArgs* args, uint32_t* memory)
        : MixScratch(args, args->layout.window * args->layout.window, memory) {}

   protected:
    MixScratch(const MlpArgs* args, int64_t tokens, uint32_t* memory)
        : WindowScratch(tokens, memory), tokens(tokens), token_words(words_of(tokens)), si_words(words_of(args->si_hidden)) {
        token_bits = take(token_words * 16);
    }
};

struct MlpScratch : MixScratch {
    float** real_rows;
    uint32_t *bits, *hidden, *si_hidden;

    MlpScratch(const MlpArgs* args, uint32_t* memory)
        : MixScratch(args, mixes_inside(args) ? args->layout.window * args->layout.window : ROWS_AT_A_TIME, memory) {
        real_rows = take_array<float*>(tokens);
        bits = take(tokens * words_of(args->channels));
        hidden = take(tokens * words_of(args->hidden));
        si_hidden = take(mixes_inside(args) ? blocks_of(args->channels) * si_words * 16 : 0);
    }
};

}  // namespace

#endif
