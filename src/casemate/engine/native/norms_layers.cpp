// Embeddings, and the scale and shift of norms. Part of norms.cpp.

namespace {

// to[l] = sum over rows of one axis: dw = sum g (x - mean) rstd, db = sum g, both over P entries.
inline void affine_row(const float *g, const float *x, float mean, float rstd, i64 P, float *dw,
                       float *db) {
    double sums = 0, products = 0;
    for (i64 first = 0; first < P; first += 16 * CHUNK) {
        const i64 count = P - first < 16 * CHUNK ? P - first : 16 * CHUNK;
        const float *p = g + first, *q = x ? x + first : nullptr;
        vf a[4] = {}, b[4] = {};
        i64 j = 0;
        for (; j + 4 * W <= count; j += 4 * W)
            for (int k = 0; k < 4; k++) {
                const vf v = load<vf>(p + j + k * W);
                b[k] += v;
                if (q) a[k] += v * (load<vf>(q + j + k * W) - mean);
            }
        const vf am = (a[0] + a[1]) + (a[2] + a[3]), bm = (b[0] + b[1]) + (b[2] + b[3]);
        float one = 0, two = 0;
        for (; j < count; j++) {
            two += p[j];
            if (q) one += p[j] * (q[j] - mean);
        }
        double s = one, t = two;
        for (int l = 0; l < W; l++) {
            s += am[l];
            t += bm[l];
        }
        products += s;
        sums += t;
    }
    if (db) *db = static_cast<float>(sums);
    if (dw) *dw = static_cast<float>(products * rstd);
}

// The same down columns: N vectors of them over T rows of m. By token where `tokens` is set, else
// mean and rstd are those of column j / size.
template <int N>
void affine_columns(const float *g, const float *x, const float *mean, const float *rstd, bool tokens,
                    i64 size, i64 column, i64 T, i64 m, i64 keep, float *dw, float *db) {
    double sums[N * W] = {}, products[N * W] = {};
    float centre[N * W] = {}, scale[N * W];
    for (i64 l = 0; l < N * W; l++) {
        const i64 at = tokens || l >= keep ? 0 : (column + l) / size;
        centre[l] = tokens ? 0 : mean[at];
        scale[l] = tokens ? 1 : rstd[at];
    }
    for (i64 first = 0; first < T; first += CHUNK) {
        const i64 end = first + CHUNK < T ? first + CHUNK : T;
        vf a[N], b[N];
        for (int k = 0; k < N; k++) a[k] = b[k] = vf{};
        for (i64 t = first; t < end; t++) {
            const float *p = g + t * m + column, *q = x + t * m + column;
            float gs[N * W], xs[N * W];
            if (keep < N * W) {
                for (i64 l = 0; l < N * W; l++) {
                    gs[l] = l < keep ? p[l] : 0;
                    xs[l] = l < keep ? q[l] : 0;
                }
                p = gs;
                q = xs;
            }
            for (int k = 0; k < N; k++) {
                const vf v = load<vf>(p + k * W), y = load<vf>(q + k * W);
                b[k] += v;
                if (tokens)
                    a[k] += v * ((y - mean[t]) * rstd[t]);
                else
                    a[k] += v * (y - load<vf>(centre + k * W));
            }
        }
        for (int k = 0; k < N; k++)
            for (int l = 0; l < W; l++) {
                products[k * W + l] += a[k][l];
                sums[k * W + l] += b[k][l];
            }
    }
    for (i64 l = 0; l < keep; l++) {
        if (dw) dw[column + l] = static_cast<float>(products[l] * scale[l]);
        if (db) db[column + l] = static_cast<float>(sums[l]);
    }
}

// Tokens of one record in the order of their index, those of `padding` left out.
i64 by_index(const i64 *at, i64 T, i64 padding, i64 *order) {
    i64 count = 0;
    for (i64 t = 0; t < T; t++)
        if (at[t] != padding) order[count++] = t;
    std::sort(order, order + count,
              [at](i64 a, i64 c) { return at[a] < at[c] || (at[a] == at[c] && a < c); });
    return count;
}

// From `from` on, the tokens of one index added up in float64; the first of the next index.
i64 merged(const i64 *at, const i64 *order, i64 from, i64 count, const float *g, i64 m,
           double *sum) {
    const i64 row = at[order[from]];
    i64 k = from;
    for (; k < count && at[order[k]] == row; k++) {
        const float *p = g + order[k] * m;
        if (k == from)
            for (i64 j = 0; j < m; j++) sum[j] = p[j];
        else
            for (i64 j = 0; j < m; j++) sum[j] += p[j];
    }
    return k;
}

}  // namespace

extern "C" {

// Rows of one index are added up in float64, in the order of tokens.
int norms_embedding(const i64 *index, const float *g, i64 b, i64 T, i64 m, i64 padding, double *n2,
                    double *scale) {
    i64 *order = scratch[2].get<i64>(T);
    double *sum = scratch[1].get<double>(m);
    if (!order || !sum) return -1;
    for (i64 i = 0; i < b; i++) {
        const i64 *at = index + i * T;
        const i64 count = by_index(at, T, padding, order);
        double norm = 0, s = 0;
        for (i64 k = 0; k < count;) {
            const i64 from = k;
            k = merged(at, order, from, count, g + i * T * m, m, sum);
            for (i64 l = from; l < k; l++) s += std::sqrt(squares(g + (i * T + order[l]) * m, m));
            vd a[2] = {};
            i64 j = 0;
            for (; j + W <= m; j += W) {
                const vd u = load<vd>(sum + j), v = load<vd>(sum + j + W / 2);
                a[0] += u * u;
                a[1] += v * v;
            }
            double part = total(a[0] + a[1]);
            for (; j < m; j++) part += sum[j] * sum[j];
            norm += part;
        }
        n2[i] = norm;
        scale[i] = s;
    }
    return 0;
}

// total (rows, m) += rint(c_i inverse_step sum of the tokens of one index), record by record.
int norms_embedding_add(const i64 *index, const float *g, i64 b, i64 T, i64 m, i64 padding,
                        const float *c, const uint8_t *keep, double inverse_step, i64 *total) {
    i64 *order = scratch[2].get<i64>(T);
    double *sum = scratch[1].get<double>(m);
    if (!order || !sum) return -1;
    for (i64 i = 0; i < b; i++) {
        if (!keep[i]) continue;
        const i64 *at = index + i * T;
        const i64 count = by_index(at, T, padding, order);
        const double w = c[i] * inverse_step;
        for (i64 k = 0; k < count;) {
            i64 *to = total + at[order[k]] * m;
            k = merged(at, order, k, count, g + i * T * m, m, sum);
            for (i64 j = 0; j < m; j++) to[j] += grid_steps(std::rint(sum[j] * w));
        }
    }
    return 0;
}

// g, x (b, C, P), mean, rstd (b, G): dw, db (b, C). Without x: db alone.
void norms_channel_affine(const float *g, const float *x, const float *mean, const float *rstd, i64 b,
                          i64 C, i64 P, i64 G, float *dw, float *db) {
    for (i64 i = 0; i < b * C; i++) {
        const i64 at = i / C * G + i % C / (C / G);
        affine_row(g + i * P, x ? x + i * P : nullptr, x ? mean[at] : 0, x ? rstd[at] : 0, P,
                   dw ? dw + i : nullptr, db ? db + i : nullptr);
    }
}

// g, x (b, T, m); mean, rstd (b, T), or (b, G) of columns where G > 0: dw, db (b, m).
void norms_token_affine(const float *g, const float *x, const float *mean, const float *rstd, i64 b,
                        i64 T, i64 m, i64 G, float *dw, float *db) {
    const i64 own = G > 0 ? G : T, size = G > 0 ? m / G : 1;
    for (i64 i = 0; i < b; i++) {
        const float *gi = g + i * T * m, *xi = x + i * T * m, *mi = mean + i * own, *ri = rstd + i * own;
        float *w = dw ? dw + i * m : nullptr, *v = db ? db + i * m : nullptr;
        for (i64 j = 0; j < m;) {
            if (m - j >= 4 * W) {
                affine_columns<4>(gi, xi, mi, ri, G == 0, size, j, T, m, 4 * W, w, v);
                j += 4 * W;
            } else {
                const i64 left = m - j < W ? m - j : W;
                affine_columns<1>(gi, xi, mi, ri, G == 0, size, j, T, m, left, w, v);
                j += left;
            }
        }
    }
}

}
