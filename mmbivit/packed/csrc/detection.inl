// What else detectors do between their layers.

namespace {

// A range counts rows of the maps.
void upsample_add(const UpsampleArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const int64_t channels = args->channels;
    const float down = (float)args->y_height / (float)args->height, across = (float)args->y_width / (float)args->width;
    const auto nearest = [](int64_t at, float ratio, int64_t size) {
        const int64_t found = (int64_t)((float)at * ratio);
        return found < size ? found : size - 1;
    };
    for (int64_t row = begin; row < end; row++) {
        const int64_t image = row / args->height, y = nearest(row % args->height, down, args->y_height);
        const float* source = args->y + (image * args->y_height + y) * args->y_width * channels;
        float* x = args->x + row * args->width * channels;
        for (int64_t column = 0; column < args->width; column++, x += channels) {
            const float* added = source + nearest(column, across, args->y_width) * channels;
            int64_t c = 0;
            for (; c + 16 <= channels; c += 16) store_f(x + c, add_f(load_f(x + c), load_f(added + c)));
            if (c < channels) {
                const int left = (int)(channels - c);
                store_f(x + c, add_f(load_f(x + c, left), load_f(added + c, left)), left);
            }
        }
    }
    timer.lap(PHASE_UPSAMPLE);
}

// The range is always the whole: whether a box is kept hangs on all before it.
void nms(const NmsArgs* args, int64_t, int64_t, Worker* worker) {
    Timer timer(worker);
    const float *x1 = args->boxes, *y1 = x1 + args->padded, *x2 = y1 + args->padded, *y2 = x2 + args->padded;
    for (int64_t i = 0; i < args->padded; i += 16)
        store_f(args->areas + i, mul_f(sub_f(load_f(x2 + i), load_f(x1 + i)), sub_f(load_f(y2 + i), load_f(y1 + i))));
    const F16 limit = broadcast_f(*args->limit);
    for (int64_t i = 0; i < args->number; i++) {
        if (args->suppressed[i / 16] >> i % 16 & 1) continue;
        const F16 left = broadcast_f(x1[i]), top = broadcast_f(y1[i]), right = broadcast_f(x2[i]);
        const F16 bottom = broadcast_f(y2[i]), area = broadcast_f(args->areas[i]);
        for (int64_t j = (i + 1) / 16 * 16; j < args->number; j += 16) {
            if (args->suppressed[j / 16] == 0xffff) continue;
            const F16 wide = max_f(zero_f(), sub_f(min_f(right, load_f(x2 + j)), max_f(left, load_f(x1 + j))));
            const F16 high = max_f(zero_f(), sub_f(min_f(bottom, load_f(y2 + j)), max_f(top, load_f(y1 + j))));
            const F16 both = mul_f(wide, high);
            const F16 either = sub_f(add_f(area, load_f(args->areas + j)), both);
            uint32_t found = mask_bits(at_least_f(div_f(both, either), limit));
            if (j <= i) found &= ~((2u << (i - j)) - 1);  // not those before it, nor itself
            args->suppressed[j / 16] |= (uint16_t)found;
        }
    }
    timer.lap(PHASE_NMS);
}

}  // namespace
