// Binary convolution: bands of output rows, whose input is packed into bits with its padding and read in place.

namespace {

// RPReLU(scale * accumulator + bias + factor * add) of the pixels of a row.
struct ToPixels {
    const ConvArgs* args;
    int64_t k, padded, first;  // inputs of a product, padded output channels, number of the first pixel

    METHOD void operator()(int64_t pixel, int64_t block, I16 count) const {
        const int64_t c = block * 16, n = args->n, place = (first + pixel) * n + c;
        const int left = n - c < 16 ? (int)(n - c) : 16;
        F16 y = mul_add(to_float(accumulator(count, k)), load_f(args->scale + c), load_f(args->bias + c));
        if (args->add) {
            const F16 added = left < 16 ? load_f(args->add + place, left) : load_f(args->add + place);
            y = mul_add(added, load_f(args->factor + c), y);
        }
        if (args->rprelu)
            y = rprelu(y, load_f(args->rprelu + c), load_f(args->rprelu + padded + c), load_f(args->rprelu + 2 * padded + c));
        left < 16 ? store_f(args->out + place, y, left) : store_f(args->out + place, y);
    }
};

// Pack the rows of a map that a band takes, from row `top` on, which may lie above the map.
SIMD void pack_band(const ConvArgs* args, const ConvScratch& s, int64_t image, int64_t top, int64_t rows) {
    const int64_t words = words_of(args->channels), wide = args->width + 2 * args->padding_width;
    for (int64_t row = 0; row < rows; row++) {
        uint32_t* out = s.bits + row * s.row_words;
        const int64_t y = top + row;
        const bool inside = y >= 0 && y < args->height;
        const float* x = inside ? args->x + (image * args->height + y) * args->width * args->channels : nullptr;
        for (int64_t column = 0; column < wide; column++, out += words) {
            const int64_t place = column - args->padding_width;
            if (inside && place >= 0 && place < args->width)
                pack_row_above(x + place * args->channels, args->threshold, args->channels, out);
            else
                memcpy(out, s.padding, words * sizeof(uint32_t));
        }
    }
}

// R pixels of a row from `pixel` on, and B blocks.
template <int R, int B, class Emit>
SIMD void pixels(const ConvArgs* args, const ConvScratch& s, const uint32_t* row, int64_t pixel, int64_t block,
                 const Emit& emit) {
    const int64_t words = words_of(args->channels), across = args->kernel_width;
    const int64_t stride = args->stride_width * words, block_words = args->kernel_height * across * words;
    const uint32_t* weight = args->weight + block * block_words * 16;
    // Neighbouring taps are one stretch of words, unless the kernel is dilated.
    const int64_t stretches = args->dilation_width == 1 ? 1 : across, stretch = across / stretches * words;
    I16 total[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) total[r][b] = zero();
    for (int64_t y = 0; y < args->kernel_height; y++)
        for (int64_t x = 0; x < stretches; x++, weight += stretch * 16)
            add_differing<R, B>(
                row + y * args->dilation_height * s.row_words + pixel * stride + x * args->dilation_width * words, stride,
                weight, block_words, stretch, total);
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) emit(pixel + r, block + b, total[r][b]);
}

template <int B, class Emit>
SIMD void row_of_pixels(const ConvArgs* args, const ConvScratch& s, const uint32_t* row, int64_t block, const Emit& emit) {
    const int64_t number = args->out_width;
    int64_t pixel = 0;
    for (; pixel + TILE_ROWS <= number; pixel += TILE_ROWS) pixels<TILE_ROWS, B>(args, s, row, pixel, block, emit);
    if (pixel < number && number >= TILE_ROWS) {  // the last ones, some of them again
        pixels<TILE_ROWS, B>(args, s, row, number - TILE_ROWS, block, emit);
        return;
    }
    for (; pixel < number; pixel++) pixels<1, B>(args, s, row, pixel, block, emit);
}

void convolve(const ConvArgs* args, const ConvScratch& s, int64_t first_row, int64_t rows) {
    const int64_t blocks = blocks_of(args->n), k = args->kernel_height * args->kernel_width * args->channels;
    const auto each_row = [&](const auto& multiply) {
        for (int64_t row = 0; row < rows; row++)
            multiply(s.bits + row * args->stride_height * s.row_words,
                     ToPixels{args, k, blocks * 16, (first_row + row) * args->out_width});
    };
    int64_t block = 0;
    for (; block + TILE_BLOCKS <= blocks; block += TILE_BLOCKS)
        each_row([&](const uint32_t* row, const auto& emit) { row_of_pixels<TILE_BLOCKS>(args, s, row, block, emit); });
    for (; block < blocks; block++)
        each_row([&](const uint32_t* row, const auto& emit) { row_of_pixels<1>(args, s, row, block, emit); });
}

// A range counts bands; each image has its own.
void conv(const ConvArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const ConvScratch s(args, worker->memory);
    for (int64_t c = 0; c < args->channels; c += 32) {
        uint32_t word = 0;
        for (int64_t i = c; i < args->channels && i < c + 32; i++) word |= (uint32_t)(0.0f >= args->threshold[i]) << (i - c);
        s.padding[c / 32] = word;
    }
    const int64_t bands = ceil_div(args->out_height, args->band);
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t image = unit / bands, first = unit % bands * args->band, left = args->out_height - first;
        const int64_t rows = left < args->band ? left : args->band;
        pack_band(args, s, image, first * args->stride_height - args->padding_height,
                  conv_input_rows(args) - (args->band - rows) * args->stride_height);
        timer.lap(PHASE_PACK);
        convolve(args, s, image * args->out_height + first, rows);
        timer.lap(PHASE_CONV);
    }
}

}  // namespace
