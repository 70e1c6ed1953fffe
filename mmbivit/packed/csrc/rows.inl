// Operators over rows: signs, products, patch merging, and the float ends of the network.

namespace {

void pack(const PackArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    for (int64_t row = begin; row < end; row++)
        pack_row(args->x + row * args->k, args->gain, args->shift, args->k, args->out + row * words_of(args->k));
    timer.lap(PHASE_PACK);
}

void matmul(const MatmulArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const int64_t words = words_of(args->k);
    const ToIntegers emit = {args->out + begin * args->n, args->k, args->n};
    count_differing(args->a + begin * words, end - begin, words, args->weight, blocks_of(args->n), emit);
    timer.lap(PHASE_LINEAR);
}

void linear(const LinearArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const RowScratch scratch(args->k, worker->memory);
    const int64_t words = words_of(args->k), blocks = blocks_of(args->n), rows = end - begin;
    for (int64_t row = 0; row < rows; row++) {
        pack_row(args->x + (begin + row) * args->k, args->gain, args->shift, args->k, scratch.bits + row * words);
        scratch.out[row] = args->out + (begin + row) * args->n;
        if (args->residual) scratch.add[row] = args->residual + (begin + row) * args->n;
    }
    timer.lap(PHASE_PACK);
    const auto multiply = [&](const auto& emit) {
        count_differing(scratch.bits, rows, words, args->weight, blocks, emit);
    };
#define TO_FLOATS(ADD, RPRELU) \
    ToFloats<ADD, RPRELU> { scratch.out, scratch.add, args->scale, args->bias, args->rprelu, args->k, args->n, blocks * 16 }
    if (args->residual)
        args->rprelu ? multiply(TO_FLOATS(true, true)) : multiply(TO_FLOATS(true, false));
    else
        args->rprelu ? multiply(TO_FLOATS(false, true)) : multiply(TO_FLOATS(false, false));
#undef TO_FLOATS
    timer.lap(PHASE_LINEAR);
}

void merge(const MergeArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const MergeScratch scratch(args, worker->memory);
    const int64_t channels = args->channels, k = 4 * channels, words = words_of(k), blocks = blocks_of(args->n);
    const int64_t height = ceil_div(args->height, 2), width = ceil_div(args->width, 2);
    for (int64_t row = 0; row < end - begin; row++) {
        const int64_t token = begin + row, image = token / (height * width);
        const int64_t y = token / width % height, x = token % width;
        for (int64_t part = 0; part < 4; part++) {  // top left, bottom left, top right, bottom right
            const int64_t source_y = 2 * y + part % 2, source_x = 2 * x + part / 2;
            float* target = scratch.row + part * channels;
            if (source_y < args->height && source_x < args->width)
                memcpy(target, args->x + ((image * args->height + source_y) * args->width + source_x) * channels,
                       channels * sizeof(float));
            else
                memset(target, 0, channels * sizeof(float));
        }
        pack_row(scratch.row, args->gain, args->shift, k, scratch.bits + row * words);
        scratch.out[row] = args->out + token * args->n;
    }
    const ToFloats<false, false> emit = {scratch.out, nullptr, args->scale, args->bias, nullptr, k, args->n, 0};
    count_differing(scratch.bits, end - begin, words, args->weight, blocks, emit);
    timer.lap(PHASE_MERGE);
}

// ---------------------------------------------------------------------------------------------------------------
// The float ends of the network

// R rows and B blocks; the last of a single block may be partly padding.
template <int R, int B>
SIMD void float_tile(const float* a, int64_t k, const float* weight, int64_t stride, const float* bias, float* out,
                     int64_t n, int left = 16) {
    F16 y[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) y[r][b] = load_f(bias + b * 16);
    for (int64_t i = 0; i < k; i++) {
        F16 w[B];
        for (int b = 0; b < B; b++) w[b] = load_f(weight + i * stride + b * 16);
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) y[r][b] = mul_add(broadcast_f(a[r * k + i]), w[b], y[r][b]);
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++)
            B == 1 && left < 16 ? store_f(out + r * n, y[r][b], left) : store_f(out + r * n + b * 16, y[r][b]);
}

// Float product of `rows` rows of k values and a weight (k, n padded).
void float_product(const float* a, int64_t rows, int64_t k, const float* weight, const float* bias, float* out, int64_t n) {
    const int64_t stride = blocks_of(n) * 16;
    int64_t c = 0;
    for (; c + TILE_BLOCKS * 16 <= n; c += TILE_BLOCKS * 16) {
        int64_t row = 0;
        for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
            float_tile<TILE_ROWS, TILE_BLOCKS>(a + row * k, k, weight + c, stride, bias + c, out + row * n + c, n);
        for (; row < rows; row++)
            float_tile<1, TILE_BLOCKS>(a + row * k, k, weight + c, stride, bias + c, out + row * n + c, n);
    }
    for (; c < n; c += 16) {
        const int left = n - c < 16 ? (int)(n - c) : 16;
        int64_t row = 0;
        for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
            float_tile<TILE_ROWS, 1>(a + row * k, k, weight + c, stride, bias + c, out + row * n + c, n, left);
        for (; row < rows; row++)
            float_tile<1, 1>(a + row * k, k, weight + c, stride, bias + c, out + row * n + c, n, left);
    }
}

void embed(const EmbedArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const EmbedScratch scratch(args, worker->memory);
    const int64_t size = args->patch, k = args->in_channels * size * size, n = args->channels, rows = end - begin;
    const int64_t height = ceil_div(args->height, size), width = ceil_div(args->width, size);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t token = begin + row, image = token / (height * width);
        const int64_t y = token / width % height * size, x = token % width * size;
        const int64_t across = args->width - x < size ? args->width - x : size;
        float* patch = scratch.patches + row * k;
        for (int64_t channel = 0; channel < args->in_channels; channel++)
            for (int64_t dy = 0; dy < size; dy++, patch += size) {
                const bool inside = y + dy < args->height;
                const int64_t line = (image * args->in_channels + channel) * args->height + y + dy;
                for (int64_t dx = 0; dx < size; dx++)
                    patch[dx] = inside && dx < across ? args->images[line * args->width + x + dx] : 0.0f;
            }
    }
    float_product(scratch.patches, rows, k, args->weight, args->bias, args->out + begin * n, n);
    timer.lap(PHASE_EMBED);
}

void map(const MapArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    for (int64_t row = begin; row < end; row++) {
        const float* x = args->x + row * args->channels;
        float* out = args->out + row * args->channels;
        int64_t c = 0;
        for (; c + 16 <= args->channels; c += 16)
            store_f(out + c, mul_add(load_f(x + c), load_f(args->gain + c), load_f(args->shift + c)));
        if (const int left = (int)(args->channels - c))
            store_f(out + c, mul_add(load_f(x + c, left), load_f(args->gain + c), load_f(args->shift + c)), left);
    }
    timer.lap(PHASE_OUTPUT);
}

}  // namespace
