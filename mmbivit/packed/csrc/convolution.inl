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

// Hand the stretches of words that the taps of a pixel are to `take(place, first, words)`: their place, from the row of the
// first tap on, and the word of the weights that they begin with.
template <class Take>
SIMD void each_stretch(const ConvArgs* args, int64_t pixel, const Take& take) {
    const int64_t words = words_of(args->channels), across = args->kernel_width;
    const int64_t row_words = (args->width + 2 * args->padding_width) * words;
    // Neighbouring taps are one stretch, unless the kernel is dilated.
    const int64_t stretches = args->dilation_width == 1 ? 1 : across, stretch = across / stretches * words;
    int64_t first = 0;
    for (int64_t y = 0; y < args->kernel_height; y++)
        for (int64_t x = 0; x < stretches; x++, first += stretch)
            take(y * args->dilation_height * row_words + (pixel * args->stride_width + x * args->dilation_width) * words, first,
                 stretch);
}

// R pixels of a row from `pixel` on, and B blocks.
template <int R, int B, class Emit>
SIMD void pixels(const ConvArgs* args, const uint32_t* row, const Weights& weights, int64_t pixel, int64_t block,
                 const Emit& emit) {
    const int64_t stride = args->stride_width * words_of(args->channels);
    I16 total[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) total[r][b] = zero();
    each_stretch(args, pixel, [&](int64_t place, int64_t first, int64_t words) {
        add_differing<R, B>(row + place, stride, weights, first, words, total);
    });
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

#ifdef LOOKUP
template <class EachRow>
struct LookPixels {
    const ConvArgs* args;
    int64_t blocks, half_bytes;
    const EachRow& each_row;

    template <int V>
    METHOD void up(const uint8_t* weights, int64_t block) const {
        uint16_t places[LOOKUP_WORDS * 8 + 32];
        const int64_t number = args->out_width, stride = args->stride_width * words_of(args->channels);
        each_row([&](const uint32_t* row, const auto& emit) {
            const auto to = pairs_for<V * PAIRS>(emit, &emit, block, blocks);
            for (int64_t pixel = 0; pixel < number; pixel += 2) {
                int64_t end = 0;
                each_stretch(args, pixel, [&](int64_t place, int64_t first, int64_t words) {
                    const uint32_t* bits = row + place;
                    find_places(bits, pixel + 1 < number ? bits + stride : bits, words, places + first * 8);
                    end = (first + words) * 8;
                });
                for (; end < half_bytes; end++) places[end] = 0;
                look_up_tile<V>(DIFFERING_BITS, places, weights, half_bytes, pixel, number, to);
            }
        });
    }
};
#endif

template <class EachRow>
void convolve(const ConvArgs* args, int64_t blocks, int64_t block_words, const EachRow& each_row) {
#ifdef LOOKUP
    if (block_words <= LOOKUP_WORDS)
        return look_up_groups(args->weight, block_words, blocks,
                              LookPixels<EachRow>{args, blocks, half_bytes_of(block_words), each_row});
#endif
    Weights weights = {args->weight, block_words};
    int64_t block = 0;
    for (; block + COUNT_BLOCKS <= blocks; block += COUNT_BLOCKS, weights.bits += COUNT_BLOCKS * block_words * 16)
        each_row([&](const uint32_t* row, const auto& emit) { row_of_pixels<COUNT_BLOCKS>(args, row, weights, block, emit); });
    for (; block < blocks; block++, weights.bits += block_words * 16)
        each_row([&](const uint32_t* row, const auto& emit) { row_of_pixels<1>(args, row, weights, block, emit); });
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
    convolve(args, blocks, args->kernel_height * args->kernel_width * words_of(args->channels), each_row);
    timer.lap(PHASE_CONV);
    if (!args->predictor) return;
    float_product(s.row, args->out_width, args->n, args->predictor, args->predictor_bias,
                  args->out + begin * args->out_width * args->outputs, args->outputs);
    timer.lap(PHASE_PREDICT);
}

}  // namespace
