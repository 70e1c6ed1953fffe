// What kernels.py calls: chooses the code path and shares ranges of rows or windows out to threads.
#include <chrono>
#include <cstdlib>

#include "kernels.h"
#include "scratch.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bits are packed for little-endian machines"
#endif

extern const CodePath mmbivit_portable;
#if defined(__x86_64__) && defined(__GNUC__)
extern const CodePath mmbivit_avx512_vpopcntdq, mmbivit_avx512bw, mmbivit_avx2;
#elif defined(__aarch64__)
extern const CodePath mmbivit_neon;
#endif

namespace {

// Fastest first.
const CodePath* const PATHS[] = {
#if defined(__x86_64__) && defined(__GNUC__)
    &mmbivit_avx512_vpopcntdq, &mmbivit_avx512bw, &mmbivit_avx2,
#elif defined(__aarch64__)
    &mmbivit_neon,
#endif
    &mmbivit_portable,
};

// Run a kernel over `units` in steps of `step`; returns 0, or 1 where there is no memory.
template <class Args, class Kernel>
int run(const Args* args, Kernel kernel, int64_t units, int64_t step, int64_t words, int threads, double* seconds,
        uint32_t* shared = nullptr, AttentionStep attention_step = STEP_BEGIN) {
    const int64_t steps = ceil_div(units, step);
    int failed = 0;
    // Neighbouring steps to each thread; but parts of windows in turn, as the last of a window is smaller.
    if (threads > steps) threads = steps > 1 ? (int)steps : 1;
    const int64_t neighbours = shared || steps < threads ? 1 : ceil_div(steps, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        // whole vectors, on their own cache lines
        void* raw = std::malloc(words * sizeof(uint32_t) + 64);
        uint32_t* memory = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(raw) + 63) / 64 * 64);
        double own[PHASES] = {0};
        Worker worker = {memory, seconds ? own : nullptr, shared, attention_step};
#pragma omp for schedule(static, neighbours)
        for (int64_t i = 0; i < steps; i++) {
            const int64_t begin = i * step, end = begin + step < units ? begin + step : units;
            if (raw)
                kernel(args, begin, end, &worker);
            else
#pragma omp atomic
                failed |= 1;
        }
        if (seconds) {
#pragma omp critical
            for (int phase = 0; phase < PHASES; phase++) seconds[phase] += own[phase];
        }
        std::free(raw);
    }
    return failed;
}

int64_t windows_of(const Layout& layout) {
    return layout.batch * ceil_div(layout.height, layout.window_height) *
           ceil_div(layout.width, layout.window_width);
}

// Rows of a step, so that threads have equally many of them; whole tiles of most paths.
int64_t rows_of_step(int64_t rows, int threads) {
    const int64_t steps = threads * ceil_div(rows, (int64_t)threads * ROWS_AT_A_TIME);
    return steps ? ceil_div(ceil_div(rows, steps), 7) * 7 : ROWS_AT_A_TIME;
}

template <class Args, class Kernel>
int run_rows(const Args* args, Kernel kernel, int64_t rows, int64_t words, int threads, double* seconds) {
    return run(args, kernel, rows, rows_of_step(rows, threads), words, threads, seconds);
}

// Whole windows to each thread, or where those are fewer than threads, step by step parts of them.
template <class Memory, class Args, class Kernel>
int run_attention(const Args* args, Kernel kernel, int threads, double* seconds) {
    const int64_t windows = windows_of(args->layout), words = Memory(args, nullptr).words;
    const int64_t own_words = SelectScratch(args->layout, nullptr).words;
    if (windows >= threads) return run(args, kernel, windows, 1, words + own_words, threads, seconds);
    void* raw = std::malloc(windows * words * sizeof(uint32_t) + 64);
    if (!raw) return 1;
    uint32_t* shared = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(raw) + 63) / 64 * 64);
    int failed = 0;
    for (int step = 0; step < ATTENTION_STEPS && !failed; step++) {
        const int64_t parts = attention_parts(args->layout, args->heads, (AttentionStep)step);
        failed = run(args, kernel, windows * parts, 1, own_words, threads, seconds, shared, (AttentionStep)step);
    }
    std::free(raw);
    return failed;
}

// The MLP over channels, window by window or in rows; where windows are large or few, the branch over tokens apart from it.
template <class MlpMemory, class MixMemory, class Args, class Kernel>
int run_mlp(const Args* args, Kernel mix_in, Kernel mlp, Kernel mix_out, const void* apart, int threads,
            double* seconds) {
    const int64_t rows = args->layout.batch * args->layout.height * args->layout.width;
    const int64_t words = MlpMemory(args, nullptr).words;
    if (mixes_inside(args)) return run(args, mlp, windows_of(args->layout), 1, words, threads, seconds);
    if (!apart) return run_rows(args, mlp, rows, words, threads, seconds);
    // The branch reads the tokens before the MLP changes them, and adds to them afterwards. Each step looks for the
    // tokens of its window, so that few steps are better.
    const int64_t pairs = ceil_div(blocks_of(args->channels), 2), mixes = windows_of(args->layout) * pairs;
    const int64_t share = ceil_div(mixes, threads), step = share < pairs ? share : pairs;
    const int64_t mix_words = MixMemory(args, nullptr).words;
    return run(args, mix_in, mixes, step, mix_words, threads, seconds) ||
           run_rows(args, mlp, rows, words, threads, seconds) ||
           run(args, mix_out, mixes, step, mix_words, threads, seconds);
}

}  // namespace

double mmbivit_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Sizes of the arguments, in the order of the functions below: kernels.py compares its own structs with them.
EXPORT int64_t mmbivit_args_size(int function) {
    const size_t sizes[] = {sizeof(PackArgs),      sizeof(MatmulArgs), sizeof(LinearArgs), sizeof(MergeArgs),
                            sizeof(AttentionArgs), sizeof(MlpArgs),    sizeof(EmbedArgs),  sizeof(MapArgs),
                            sizeof(ResidualLinearArgs), sizeof(ResidualAttentionArgs), sizeof(ResidualMlpArgs),
                            sizeof(ConvArgs), sizeof(RoiAlignArgs), sizeof(UpsampleArgs), sizeof(NmsArgs),
                            sizeof(SignBitsArgs), sizeof(UnpackArgs), sizeof(PassInsideArgs), sizeof(BitsLinearArgs),
                            sizeof(RPReLUArgs), sizeof(RPReLUGradientsArgs), sizeof(WeightBitsArgs),
                            sizeof(WeightGradientsArgs), sizeof(AttentionBitsArgs), sizeof(AttentionGradientsArgs)};
    return (int64_t)sizes[function];
}

EXPORT int mmbivit_path_count() { return (int)(sizeof PATHS / sizeof *PATHS); }
EXPORT const char* mmbivit_path_name(int path) { return PATHS[path]->name; }

// Whether this CPU (and its operating system) can run a path.
EXPORT int mmbivit_path_runs(int path) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (PATHS[path] == &mmbivit_avx2) return avx2;
    if (PATHS[path] == &mmbivit_avx512bw) return avx512;
    if (PATHS[path] == &mmbivit_avx512_vpopcntdq) return avx512 && __builtin_cpu_supports("avx512vpopcntdq");
#endif
    return path < mmbivit_path_count();
}

EXPORT int mmbivit_pack(const PackArgs* args, int path, int threads, double* seconds) {
    return run_rows(args, PATHS[path]->pack, args->rows, 0, threads, seconds);
}

EXPORT int mmbivit_matmul(const MatmulArgs* args, int path, int threads, double* seconds) {
    return run_rows(args, PATHS[path]->matmul, args->rows, 0, threads, seconds);
}

EXPORT int mmbivit_linear(const LinearArgs* args, int path, int threads, double* seconds) {
    const int64_t words = RowScratch(args->k, nullptr).words;
    return run_rows(args, PATHS[path]->linear, args->rows, words, threads, seconds);
}

EXPORT int mmbivit_merge(const MergeArgs* args, int path, int threads, double* seconds) {
    const int64_t rows = args->batch * ceil_div(args->height, 2) * ceil_div(args->width, 2);
    return run_rows(args, PATHS[path]->merge, rows, MergeScratch(args, nullptr).words, threads, seconds);
}

EXPORT int mmbivit_attention(const AttentionArgs* args, int path, int threads, double* seconds) {
    return run_attention<AttentionScratch>(args, PATHS[path]->attention, threads, seconds);
}

EXPORT int mmbivit_mlp(const MlpArgs* args, int path, int threads, double* seconds) {
    const CodePath* kernels = PATHS[path];
    return run_mlp<MlpScratch, MixScratch>(args, kernels->mix_in, kernels->mlp, kernels->mix_out, args->si_bits, threads,
                                           seconds);
}

EXPORT int mmbivit_residual_linear(const ResidualLinearArgs* args, int path, int threads, double* seconds) {
    const int64_t words = ResidualRowScratch(args, nullptr).words;
    return run_rows(args, PATHS[path]->residual_linear, args->rows, words, threads, seconds);
}

EXPORT int mmbivit_residual_attention(const ResidualAttentionArgs* args, int path, int threads, double* seconds) {
    return run_attention<ResidualAttentionScratch>(args, PATHS[path]->residual_attention, threads, seconds);
}

EXPORT int mmbivit_residual_mlp(const ResidualMlpArgs* args, int path, int threads, double* seconds) {
    const CodePath* kernels = PATHS[path];
    return run_mlp<ResidualMlpScratch, ResidualMixScratch>(args, kernels->residual_mix_in, kernels->residual_mlp,
                                                           kernels->residual_mix_out, args->si_values, threads, seconds);
}

EXPORT int mmbivit_embed(const EmbedArgs* args, int path, int threads, double* seconds) {
    const int64_t rows = args->batch * ceil_div(args->height, args->patch) * ceil_div(args->width, args->patch);
    return run_rows(args, PATHS[path]->embed, rows, EmbedScratch(args, nullptr).words, threads, seconds);
}

EXPORT int mmbivit_map(const MapArgs* args, int path, int threads, double* seconds) {
    return run_rows(args, PATHS[path]->map, args->rows, 0, threads, seconds);
}

EXPORT int mmbivit_conv(const ConvArgs* args, int path, int threads, double* seconds) {
    const int64_t words = words_of(args->channels), rows = args->batch * (args->height + 2 * args->padding_height);
    void* raw = std::malloc(rows * (args->width + 2 * args->padding_width) * words * sizeof(uint32_t) + 64);
    if (!raw) return 1;
    uint32_t* bits = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(raw) + 63) / 64 * 64);
    const int64_t out_rows = args->batch * args->out_height, share = ceil_div(out_rows, 4 * (int64_t)threads);
    const int64_t step = args->predictor || share < 1 ? 1 : share < 16 ? share : 16;
    const int failed = run(args, PATHS[path]->conv_pack, rows, 4, words, threads, seconds, bits) ||
                       run(args, PATHS[path]->conv, out_rows, step, ConvScratch(args, nullptr).words, threads, seconds, bits);
    std::free(raw);
    return failed;
}

EXPORT int mmbivit_roi_align(const RoiAlignArgs* args, int path, int threads, double* seconds) {
    const int64_t words = RoiAlignScratch(args, nullptr).words;
    return run(args, PATHS[path]->roi_align, args->regions, 8, words, threads, seconds);
}

EXPORT int mmbivit_upsample_add(const UpsampleArgs* args, int path, int threads, double* seconds) {
    return run(args, PATHS[path]->upsample_add, args->batch * args->height, 4, 0, threads, seconds);
}

EXPORT int mmbivit_nms(const NmsArgs* args, int path, int, double* seconds) {
    return run(args, PATHS[path]->nms, 1, 1, 0, 1, seconds);
}

EXPORT int mmbivit_sign_bits(const SignBitsArgs* args, int path, int threads, double* seconds) {
    return run_rows(args, PATHS[path]->sign_bits, args->rows, 0, threads, seconds);
}

EXPORT int mmbivit_unpack(const UnpackArgs* args, int path, int threads, double* seconds) {
    return run_rows(args, PATHS[path]->unpack, args->rows, 0, threads, seconds);
}

EXPORT int mmbivit_pass_inside(const PassInsideArgs* args, int path, int threads, double* seconds) {
    return run(args, PATHS[path]->pass_inside, args->rows, args->step, 0, threads, seconds);
}

EXPORT int mmbivit_bits_linear(const BitsLinearArgs* args, int path, int threads, double* seconds) {
    return run_rows(args, PATHS[path]->bits_linear, args->rows, 0, threads, seconds);
}

EXPORT int mmbivit_rprelu(const RPReLUArgs* args, int path, int threads, double* seconds) {
    return run_rows(args, PATHS[path]->rprelu, args->rows, 0, threads, seconds);
}

EXPORT int mmbivit_rprelu_gradients(const RPReLUGradientsArgs* args, int path, int threads, double* seconds) {
    return run(args, PATHS[path]->rprelu_gradients, args->rows, args->step, 0, threads, seconds);
}

EXPORT int mmbivit_weight_bits(const WeightBitsArgs* args, int path, int threads, double* seconds) {
    return run_rows(args, PATHS[path]->weight_bits, args->rows, 0, threads, seconds);
}

EXPORT int mmbivit_weight_gradients(const WeightGradientsArgs* args, int path, int threads, double* seconds) {
    return run_rows(args, PATHS[path]->weight_gradients, args->rows, 0, threads, seconds);
}

EXPORT int mmbivit_attention_bits(const AttentionBitsArgs* args, int path, int threads, double* seconds) {
    const int64_t words = HeadBitsScratch(args, nullptr).words;
    return run(args, PATHS[path]->attention_bits, args->groups * args->heads, args->share, words, threads, seconds);
}

EXPORT int mmbivit_attention_gradients(const AttentionGradientsArgs* args, int path, int threads, double* seconds) {
    const int64_t words = HeadGradientsScratch(args, nullptr).words;
    return run(args, PATHS[path]->attention_gradients, args->groups * args->heads, args->share, words, threads, seconds);
}

// Run calls one after another: the numbers of the functions, in the order of mmbivit_args_size, and where the arguments of
// each begin, in words of 8 bytes. Returns the number of calls that were made.
EXPORT int64_t mmbivit_run(const int64_t* functions, const int64_t* starts, const uint64_t* args, int64_t calls, int path,
                           int threads, double* seconds) {
    for (int64_t i = 0; i < calls; i++) {
        const void* own = args + starts[i];
        int failed = 1;
        switch (functions[i]) {
#define RUN(NUMBER, NAME, ARGS) \
    case NUMBER: failed = mmbivit_##NAME((const ARGS*)own, path, threads, seconds); break;
            RUN(0, pack, PackArgs) RUN(1, matmul, MatmulArgs) RUN(2, linear, LinearArgs) RUN(3, merge, MergeArgs)
            RUN(4, attention, AttentionArgs) RUN(5, mlp, MlpArgs) RUN(6, embed, EmbedArgs) RUN(7, map, MapArgs)
            RUN(8, residual_linear, ResidualLinearArgs) RUN(9, residual_attention, ResidualAttentionArgs)
            RUN(10, residual_mlp, ResidualMlpArgs)
#undef RUN
        }
        if (failed) return i;
    }
    return calls;
}
