// RoIAlign on maps whose channels come last. Samples are bilinear, so that a bin is a weighted sum of rows by columns.

namespace {

// Where a sample falls: between `low` and the next position, by `part`. False outside the map.
SIMD bool find_sample(float at, int64_t size, int64_t* low, float* part) {
    if (!(at >= -1.0f && at <= (float)size)) return false;
    if (at < 0.0f) at = 0.0f;
    *low = (int64_t)at;
    *part = at - (float)*low;
    if (*low >= size - 1) {
        *low = size - 1;
        *part = 0.0f;
    }
    return true;
}

// Weights of the positions along one side of a map, for each bin of a region.
void find_bins(float start, float length, int64_t bins, int64_t samples, int64_t size, int64_t stride, BinSide* sides,
               float* weights) {
    const float bin = length / (float)bins;
    const float wanted = samples > 0 ? (float)samples : ceilf(bin);
    for (int64_t b = 0; b < bins; b++, weights += stride) {
        int64_t first = size, last = -1;
        // Samples that are certainly outside are not visited: there is no limit to the size of a region.
        const float origin = start + (float)b * bin, step = bin / wanted;
        float from = step > 0.0f ? floorf((-1.0f - origin) / step) - 1.0f : 0.0f;
        float to = step > 0.0f ? ceilf(((float)size - origin) / step) + 1.0f : wanted;
        if (!(from > 0.0f)) from = 0.0f;
        if (!(to < wanted)) to = wanted;
        for (float i = from; i < to; i += 1.0f) {
            int64_t low;
            float part;
            if (!find_sample(origin + (i + 0.5f) * bin / wanted, size, &low, &part)) continue;
            const int64_t high = low < size - 1 ? low + 1 : low;
            if (last < 0) first = low, last = low - 1;
            while (last < high) weights[++last] = 0.0f;
            weights[low] += (1.0f - part) / wanted;
            weights[high] += part / wanted;
        }
        sides[b].first = (int32_t)first;
        sides[b].number = (int32_t)(last < first ? 0 : last - first + 1);
    }
}

template <int N>
struct Number {
    static constexpr int value = N;
};

template <int VECTORS>
SIMD void pool_bin(const float* map, int64_t row_stride, int64_t channels, int left, BinSide rows, const float* row_weights,
                   BinSide columns, const float* column_weights, float* out) {
    F16 sum[VECTORS];
    for (int v = 0; v < VECTORS; v++) sum[v] = zero_f();
    for (int64_t y = 0; y < rows.number; y++) {
        const float* pixel = map + (rows.first + y) * row_stride + columns.first * channels;
        for (int64_t x = 0; x < columns.number; x++, pixel += channels) {
            const F16 weight = broadcast_f(row_weights[rows.first + y] * column_weights[columns.first + x]);
            for (int v = 0; v < VECTORS; v++)
                sum[v] = mul_add(weight, left < 16 ? load_f(pixel + v * 16, left) : load_f(pixel + v * 16), sum[v]);
        }
    }
    for (int v = 0; v < VECTORS; v++) left < 16 ? store_f(out + v * 16, sum[v], left) : store_f(out + v * 16, sum[v]);
}

void roi_align(const RoiAlignArgs* args, int64_t begin, int64_t end, Worker* worker) {
    Timer timer(worker);
    const RoiAlignScratch s(args, worker->memory);
    const int64_t channels = args->channels, longest = args->longest_side;
    for (int64_t region = begin; region < end; region++) {
        const int64_t level = args->levels[region], height = args->sides[2 * level], width = args->sides[2 * level + 1];
        const float *roi = args->rois + region * 5, scale = args->scales[level];
        const float half = args->aligned ? 0.5f : 0.0f, least = args->aligned ? 0.0f : 1.0f;
        const float left = roi[1] * scale - half, top = roi[2] * scale - half;
        float wide = roi[3] * scale - half - left, high = roi[4] * scale - half - top;
        wide = wide > least ? wide : least;
        high = high > least ? high : least;
        find_bins(top, high, args->out_height, args->samples, height, longest, s.rows, s.row_weights);
        find_bins(left, wide, args->out_width, args->samples, width, longest, s.columns, s.column_weights);
        const float* map = args->maps[level] + (int64_t)roi[0] * height * width * channels;
        float* out = args->out + region * args->out_height * args->out_width * channels;
        for (int64_t y = 0; y < args->out_height; y++)
            for (int64_t x = 0; x < args->out_width; x++, out += channels) {
                const auto pool = [&](auto vectors, int64_t c, int left_over) {
                    pool_bin<decltype(vectors)::value>(map + c, width * channels, channels, left_over, s.rows[y],
                                                       s.row_weights + y * longest, s.columns[x],
                                                       s.column_weights + x * longest, out + c);
                };
                int64_t c = 0;
                for (; c + 64 <= channels; c += 64) pool(Number<4>(), c, 16);
                for (; c < channels; c += 16) pool(Number<1>(), c, channels - c < 16 ? (int)(channels - c) : 16);
            }
    }
    timer.lap(PHASE_ROI_ALIGN);
}

}  // namespace
