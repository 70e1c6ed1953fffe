// Binary convolution: a map is packed into bits with its padding, and the taps of a pixel are read from there.

namespace {

// RPReLU(scale * accumulator + bias + factor * add) of the pixels of a row.
struct ToPixels {
    const ConvArgs* args;
    int64_t k, padded;  // inputs of a product, padded output channels
    const float* add;   // the row that is added
    float* out;

    METHOD void operator()(int64_t pixel, int64_t block, I16 count) const {
        const int64_t c = block * 16, n = args->n, place = pixel * n + c;
        const int left = n - c < 16 ? (int)(n - c) : 16;
        F16 y = mul_add(to_float(accumulator(count, k)), load_f(args->scale + c), load_f(args->bias + c));
        if (args->add) {
            const F16 added = left < 16 ? load_f(add + place, left) : load_f(add + place);
            y = mul_add(added, load_f(args->factor + c), y);
        }
        if (args->rprelu)
            y = rprelu(y, load_f(args->rprelu + c), load_f(args->rprelu + padded + c), load_f(args->rprelu + 2 * padded + c));
        left < 16 ? store_f(out + place, y, left) : store_f(out + place, y);
    }
};

// A range counts rows of the padded maps.
void conv_pack(const ConvArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const int64_t words = words_of(args->channels), wide = args->width + 2 * args->padding_width;
    const int64_t high = args->height + 2 * args->padding_height;
    uint32_t* padding = worker->memory;
    memset(padding, 0, words * sizeof(uint32_t));
    for (int64_t c = 0; c < args->channels; c++) padding[c / 32] |= (uint32_t)(0.0f >= args->threshold[c]) << c % 32;
    for (int64_t row = begin; row < end; row++) {
        uint32_t* out = worker->shared + row * wide * words;
        const int64_t y = row % high - args->padding_height;
        const bool inside = y >= 0 && y < args->height;
        const float* x = inside ? args->x + (row / high * args->height + y) * args->width * args->channels : nullptr;
        for (int64_t column = 0; column < wide; column++, out += words) {
            const int64_t place = column - args->padding_width;
            if (inside && place >= 0 && place < args->width)
                pack_row_above(x + place * args->channels, args->threshold, args->channels, out);
            else
                memcpy(out, padding, words * sizeof(uint32_t));
        }
    }
    timer.lap(PHASE_PACK);
}

// R pixels of a row from `pixel` on, and B blocks.
template <int R, int B, class Emit>
SIMD void pixels(const ConvArgs* args, const uint32_t* row, const Weights& weights, int64_t pixel, int64_t block,
                 const Emit& emit) {
    const int64_t words = words_of(args->channels), across = args->kernel_width;
    const int64_t row_words = (args->width + 2 * args->padding_width) * words;
    const int64_t stride = args->stride_width * words;
    // Neighbouring taps are one stretch of words, unless the kernel is dilated.
    const int64_t stretches = args->dilation_width == 1 ? 1 : across, stretch = across / stretches * words;
    I16 total[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) total[r][b] = zero();
    int64_t first = 0;
    for (int64_t y = 0; y < args->kernel_height; y++)
        for (int64_t x = 0; x < stretches; x++, first += stretch)
            add_differing<R, B>(
                row + y * args->dilation_height * row_words + pixel * stride + x * args->dilation_width * words, nullptr,
                stride, weights, first, stretch, total);
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) emit(pixel + r, block + b, total[r][b]);
}

template <int B, class Emit>
SIMD void row_of_pixels(const ConvArgs* args, const uint32_t* row, const Weights& weights, int64_t block, const Emit& emit) {
    const int64_t number = args->out_width;
    int64_t pixel = 0;
    for (; pixel + COUNT_ROWS <= number; pixel += COUNT_ROWS) pixels<COUNT_ROWS, B>(args, row, weights, pixel, block, emit);
    if (pixel < number && number >= COUNT_ROWS && args->out != args->add) {  // the last ones, some of them again
        pixels<COUNT_ROWS, B>(args, row, weights, number - COUNT_ROWS, block, emit);
        return;
    }
    for (; pixel < number; pixel++) pixels<1, B>(args, row, weights, pixel, block, emit);
}

// A range counts rows of the output; with a predictor it is one of them, as its values are not kept.
void conv(const ConvArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const ConvScratch s(args, worker->memory);
    const int64_t blocks = blocks_of(args->n), k = args->kernel_height * args->kernel_width * args->channels;
    const int64_t row_values = args->out_width * args->n, high = args->height + 2 * args->padding_height;
    const int64_t row_words = (args->width + 2 * args->padding_width) * words_of(args->channels);
    const auto each_row = [&](const auto& multiply) {
        for (int64_t row = begin; row < end; row++) {
            const int64_t top = row / args->out_height * high + row % args->out_height * args->stride_height;
            const ToPixels emit = {args, k, blocks * 16, args->add ? args->add + row * row_values : nullptr,
                                   args->predictor ? s.row : args->out + row * row_values};
            multiply(worker->shared + top * row_words, emit);
        }
    };
    Halves halves;
    const int64_t block_words = args->kernel_height * args->kernel_width * words_of(args->channels);
    const auto weights_of = [&](int64_t block) { return halves.of(args->weight + block * block_words * 16, block_words); };
    int64_t block = 0;
    for (; block + COUNT_BLOCKS <= blocks; block += COUNT_BLOCKS) {
        const Weights weights = weights_of(block);
        each_row([&](const uint32_t* row, const auto& emit) { row_of_pixels<COUNT_BLOCKS>(args, row, weights, block, emit); });
    }
    for (; block < blocks; block++) {
        const Weights weights = weights_of(block);
        each_row([&](const uint32_t* row, const auto& emit) { row_of_pixels<1>(args, row, weights, block, emit); });
    }
    timer.lap(PHASE_CONV);
    if (!args->predictor) return;
    float_product(s.row, args->out_width, args->n, args->predictor, args->predictor_bias,
                  args->out + begin * args->out_width * args->outputs, args->outputs);
    timer.lap(PHASE_PREDICT);
}

}  // namespace
