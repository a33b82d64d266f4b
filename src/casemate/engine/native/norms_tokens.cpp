// Sums over the tokens of dense operands: Gram matrices, and gradients formed. Part of norms.cpp.

namespace {

// One operand of a Gram matrix: tokens as rows for the scalars, as columns for the vectors.
template <class E>
struct Operand {
    const E *rows;
    i64 ld;
    const E *panel;
    i64 width, features;
};

// sum over t <= s of w (x_t . x_s)(g_t . g_s), w = 1 on the diagonal and 2 above it.
template <class E>
double pair_sum(i64 tokens, const Operand<E> &x, const Operand<E> &g, const i64 *plain,
                const i64 *xs, const i64 *gs) {
    constexpr int L = lanes<E>::n;
    alignas(64) double bx[BLOCK], bg[BLOCK];
    const E *sx[ROWS], *sg[ROWS];
    double sum = 0;
    for (i64 s = 0; s < tokens;) {
        const int n = vectors_for((tokens - s + L - 1) / L, NARROW);
        const i64 end = s + n * L;
        const i64 rows = end < tokens ? end : tokens;
        for (i64 t = 0; t < rows;) {
            const int r = static_cast<int>(block_size(rows - t, rows_for(n)));
            for (int i = 0; i < r; i++) {
                sx[i] = x.rows + (t + i) * x.ld;
                sg[i] = g.rows + (t + i) * g.ld;
            }
            product<E>(r, n, x.features, sx, plain, x.panel + s, xs, bx, SHORT);
            product<E>(r, n, g.features, sg, plain, g.panel + s, gs, bg, SHORT);
            double part = 0;
            if (t + r <= s) {
                vd a[2] = {};
                for (int j = 0; j < r * n * L; j += W / 2) {
                    a[0] += load<vd>(bx + j) * load<vd>(bg + j);
                }
                part = 2 * total(a[0] + a[1]);
            } else {
                for (int i = 0; i < r; i++)
                    for (int l = 0; l < n * L; l++) {
                        const double w = s + l > t + i ? 2 : (s + l == t + i ? 1 : 0);
                        if (w != 0) part += w * (bx[i * n * L + l] * bg[i * n * L + l]);
                    }
            }
            sum += part;
            t += r;
        }
        s = end;
    }
    return sum;
}

template <class E>
double pair_of(const float *x, const float *g, i64 T, i64 n, i64 m, i64 width, const i64 *plain,
               const i64 *table);

template <>
double pair_of<float>(const float *x, const float *g, i64 T, i64 n, i64 m, i64 width,
                      const i64 *plain, const i64 *table) {
    float *px = scratch[0].get<float>((n + m) * width + 64);
    if (!px) return NAN;
    float *pg = px + n * width;
    transpose(x, n, T, n, px, width);
    transpose(g, m, T, m, pg, width);
    zero_columns(px, n + m, width, T, width);
    return pair_sum<float>(T, {x, n, px, width, n}, {g, m, pg, width, m}, plain, table, table);
}
template <>
double pair_of<double>(const float *x, const float *g, i64 T, i64 n, i64 m, i64 width,
                       const i64 *plain, const i64 *table) {
    double *px = scratch[1].get<double>((n + m) * (width + T) + 64);
    if (!px) return NAN;
    double *pg = px + n * width, *rx = pg + m * width, *rg = rx + n * T;
    std::memset(px, 0, sizeof(double) * (n + m) * width);
    for (i64 t = 0; t < T; t++) {
        for (i64 j = 0; j < n; j++) px[j * width + t] = rx[t * n + j] = x[t * n + j];
        for (i64 j = 0; j < m; j++) pg[j * width + t] = rg[t * m + j] = g[t * m + j];
    }
    return pair_sum<double>(T, {rx, n, px, width, n}, {rg, m, pg, width, m}, plain, table, table);
}

// S of the doors, with what underflow can do to float32 products: see kernels/bounds.py.
double with_floor(double s, double sum_x, double sum_g, double n, double m, double tokens) {
    return std::sqrt(s * s + FLOOR * (n * sum_g * sum_g + m * sum_x * sum_x) +
                     FLOOR * FLOOR * tokens * tokens * n * m);
}

}  // namespace

extern "C" {

int norms_gram_pair(const float *g, const float *x, i64 b, i64 T, i64 m, i64 n, int precise,
                    double *n2, double *scale) {
    const i64 width = up(T, W), most = n > m ? n : m;
    i64 *table = scratch[2].get<i64>(2 * most);
    if (!table) return -1;
    for (i64 k = 0; k < most; k++) {
        table[k] = k;
        table[most + k] = k * width;
    }
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
        n2[i] = exact ? pair_of<double>(xi, gi, T, n, m, width, table, table + most)
                      : pair_of<float>(xi, gi, T, n, m, width, table, table + most);
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
