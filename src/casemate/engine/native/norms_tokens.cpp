// Sums over the tokens of dense operands: Gram matrices, and gradients formed. Part of norms.cpp.

namespace {

// S of the doors, with what underflow can do to float32 products: see kernels/bounds.py.
double with_floor(double s, double sum_x, double sum_g, double n, double m, double tokens) {
    return std::sqrt(s * s + FLOOR * (n * sum_g * sum_g + m * sum_x * sum_x) +
                     FLOOR * FLOOR * tokens * tokens * n * m);
}

}  // namespace

extern "C" {

int norms_gram_pair(const float *g, const float *x, i64 b, i64 T, i64 m, i64 n, int precise,
                    double *n2, double *scale) {
    for (i64 i = 0; i < b; i++) {
        const float *xi = x + i * T * n, *gi = g + i * T * m;
        double s = 0, sx = 0, sg = 0, top = 0;
        for (i64 t = 0; t < T; t++) {
            const double a = std::sqrt(squares(xi + t * n, n)), c = std::sqrt(squares(gi + t * m, m));
            s += a * c;
            sx += a;
            sg += c;
            top = a > top ? a : top;
            top = c > top ? c : top;
        }
        const bool exact = precise || !(top <= 0x1p60);
        if (!std::isfinite(sx) || !std::isfinite(sg)) {
            n2[i] = scale[i] = sx + sg;
            continue;
        }
        n2[i] = (exact ? pair_of<double> : pair_of<float>)(xi, gi, T, n, m);
        scale[i] = with_floor(s, sx, sg, n, m, T);
    }
    return 0;
}

// x (b, T, n), g (b, T, m) -> out (b, m, n)
int norms_formed_outer(const float *g, const float *x, i64 b, i64 T, i64 m, i64 n, float *out) {
    const i64 width = up(n, W);
    i64 *table = scratch[2].get<i64>(2 * T);
    float *panel = width == n ? nullptr : scratch[0].get<float>(T * width);
    if (!table || (width != n && !panel)) return -1;
    for (i64 t = 0; t < T; t++) {
        table[t] = t * m;
        table[T + t] = t * width;
    }
    alignas(64) double box[BLOCK];
    alignas(64) float part[BLOCK];
    const float *rows[ROWS];
    for (i64 i = 0; i < b; i++) {
        const float *v = x + i * T * n;
        if (panel) {
            for (i64 t = 0; t < T; t++) {
                std::memcpy(panel + t * width, v + t * n, sizeof(float) * n);
                for (i64 l = n; l < width; l++) panel[t * width + l] = 0;
            }
            v = panel;
        }
        for (i64 first = 0; first < n;) {
            const int k = vectors_for((width - first) / W);
            const i64 keep = first + k * W < n ? k * W : n - first;
            for (i64 r = 0; r < m;) {
                const int count = static_cast<int>(block_size(m - r, rows_for(k)));
                for (int j = 0; j < count; j++) rows[j] = g + i * T * m + r + j;
                product_floats(count, k, T, rows, table, v + first, table + T, box, part);
                for (int j = 0; j < count; j++)
                    std::memcpy(out + (i * m + r + j) * n + first, part + j * k * W,
                                sizeof(float) * keep);
                r += count;
            }
            first += k * W;
        }
    }
    return 0;
}

// g (b, T, m) -> out (b, m), added up in float64
int norms_formed_sum(const float *g, i64 b, i64 T, i64 m, float *out) {
    double *sum = scratch[1].get<double>(m);
    if (!sum) return -1;
    for (i64 i = 0; i < b; i++) {
        for (i64 j = 0; j < m; j++) sum[j] = 0;
        for (i64 t = 0; t < T; t++) {
            const float *p = g + (i * T + t) * m;
            for (i64 j = 0; j < m; j++) sum[j] += p[j];
        }
        for (i64 j = 0; j < m; j++) out[i * m + j] = static_cast<float>(sum[j]);
    }
    return 0;
}

}
