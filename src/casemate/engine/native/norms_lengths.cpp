// Convolutions by positions: S, and Gram matrices. Part of norms.cpp.

namespace {

// to[j] += sum over channels of x[c * ld + j]^2, j < n
void add_squares(const float *x, i64 channels, i64 ld, i64 n, double *to) {
    if (ld == n && (W / 2) % n == 0) {   // several channels to a vector
        vd a = {};
        i64 k = 0;
        for (; k + W / 2 <= channels * n; k += W / 2) {
            const vd v = widen(x + k);
            a += v * v;
        }
        for (int l = 0; l < W / 2; l++) to[l % n] += a[l];
        for (; k < channels * n; k++) to[k % n] += static_cast<double>(x[k]) * x[k];
        return;
    }
    for (i64 c = 0; c < channels; c++)
        for (i64 j = 0; j < n; j++) to[j] += static_cast<double>(x[c * ld + j]) * x[c * ld + j];
}

// From squares by padded position and by output: u is scratch (T), out the three sums of lengths().
void add_lengths(const Geometry &q, const double *box, const double *v, const i64 *tap, double *u,
                 double *out) {
    const i64 T = q.T(), K = q.K(), h = q.wide(1), w = q.wide(2);
    std::memset(u, 0, sizeof(double) * T);
    for (i64 k = 0; k < K; k++) {
        double *to = u;
        for (i64 a = 0; a < q.out[0]; a++)
            for (i64 i = 0; i < q.out[1]; i++) {
                const double *from = box + tap[k] + (a * q.stride[0] * h + i * q.stride[1]) * w;
                for (i64 j = 0; j < q.out[2]; j++) *to++ += from[j * q.stride[2]];
            }
    }
    double s = 0;
    for (i64 t = 0; t < T; t++) {
        const double a = std::sqrt(u[t]), e = std::sqrt(v[t]);
        s += a * e;
        out[1] += a;
        out[2] += e;
    }
    out[0] += s * s;
}

// lengths() for depthwise, channels in vectors; at and tap in steps of W.
int depthwise_lengths(const Geometry &q, const float *x, const float *g, const i64 *at,
                      const i64 *tap, double *out) {
    const i64 T = q.T(), K = q.K(), size = q.reached() * W;
    const Geometry side = gradient_side(q);
    float *p = scratch[0].get<float>(size > T * W ? size : T * W);
    double *box = scratch[1].get<double>(size);
    if (!p || !box) return -1;
    double all = 0, sum_u = 0, sum_v = 0;
    for (i64 first = 0; first < q.C; first += W) {
        const i64 count = q.C - first < W ? q.C - first : W;
        pixels(q, x, first, count, W, p);
        for (i64 j = 0; j < size; j++) box[j] = static_cast<double>(p[j]) * p[j];
        pixels(side, g, first, count, W, p);
        double s[W] = {}, su[W] = {}, sv[W] = {};
        for (i64 t = 0; t < T; t++) {
            vd a = {}, b = {};
            for (i64 k = 0; k < K; k++) {
                a += load<vd>(box + at[t] + tap[k]);
                b += load<vd>(box + at[t] + tap[k] + W / 2);
            }
            double u[W];
            store(u, a);
            store(u + W / 2, b);
            for (int l = 0; l < W; l++) {
                const double e = std::sqrt(u[l]), f = std::fabs(p[t * W + l]);
                s[l] += e * f;
                su[l] += e;
                sv[l] += f;
            }
        }
        for (int l = 0; l < W; l++) {
            all += s[l] * s[l];
            sum_u += su[l];
            sum_v += sv[l];
        }
    }
    out[0] = std::sqrt(all);
    out[1] = sum_u;
    out[2] = sum_v;
    return 0;
}

// S: sum over tokens of |g_t||u_t|, u_t what the kernel sees there; over groups, the root of the
// sum of squares. Also the sums of both lengths, for the floor.
int lengths(const Geometry &q, const float *x, const float *g, const i64 *tap, double *out) {
    const i64 T = q.T(), size = q.reached(), c = q.C / q.groups, o = q.O / q.groups;
    const Geometry side = gradient_side(q);
    constexpr i64 SOME = 64;   // channels at a time
    float *p = scratch[0].get<float>(SOME * (size > T ? size : T));
    double *box = scratch[1].get<double>(size + 2 * T);
    if (!p || !box) return -1;
    double *v = box + size;
    out[0] = out[1] = out[2] = 0;
    for (i64 group = 0; group < q.groups; group++) {
        std::memset(box, 0, sizeof(double) * (size + T));
        for (i64 j = 0; j < c; j += SOME) {
            const i64 some = c - j < SOME ? c - j : SOME;
            planes(q, x, group * c + j, some, size, p);
            add_squares(p, some, size, size, box);
        }
        for (i64 j = 0; j < o; j += SOME) {
            const i64 some = o - j < SOME ? o - j : SOME;
            planes(side, g, group * o + j, some, T, p);
            add_squares(p, some, T, T, v);
        }
        add_lengths(q, box, v, tap, v + T, out);
    }
    out[0] = std::sqrt(out[0]);
    return 0;
}

template <class E>
const E *in(const float *p, i64 count, int which);
template <>
const float *in<float>(const float *p, i64, int) {
    return p;
}
template <>
const double *in<double>(const float *p, i64 count, int which) {
    double *to = scratch[which].get<double>(count + W);
    if (to)
        for (i64 j = 0; j < count; j++) to[j] = p[j];
    return to;
}

// One group, strides of one: the Gram matrix of the padded input summed along its diagonals (the
// taps) times that of the output gradient, both in one padded box, pairs with f >= f(t) only.
// Dots over channels in E, with at most SHORT roundings in float32; all else in float64.
template <class E>
double box_gram(const Geometry &q, const Geometry &side, const float *x, const float *g,
                const i64 *at, const i64 *tap, i64 *where, i64 *inner, i64 *strided, double *s3) {
    constexpr int L = lanes<E>::n;
    const i64 T = q.T(), K = q.K(), size = q.reached(), h = q.wide(1), w = q.wide(2);
    // Below a vector's width rows are packed; lanes beyond `size` then hold what is not used.
    const i64 ld = size < W ? size : up(size, W), row = ld + up(tap[K - 1], W) + WIDE * W;
    i64 lo[3], hi[3], count = 0;
    for (int d = 0; d < 3; d++) inside(q, d, lo + d, hi + d);
    for (i64 f = 0; f < size; f++) {
        const i64 a = f / (h * w), i = f / w % h, j = f % w;
        const bool in = a >= lo[0] && a < hi[0] && i >= lo[1] && i < hi[1] && j >= lo[2] &&
                        j < hi[2];
        where[f] = in ? count : -1;
        if (in) inner[count++] = f;
    }
    float *fx = scratch[0].get<float>(q.C * ld + W), *fg = scratch[1].get<float>(q.O * ld + W);
    double *squared = scratch[4].get<double>(2 * size + 2 * T);
    double *gram = scratch[3].get<double>(count * row + 1);
    if (!fx || !fg || !gram || !squared) return NAN;
    planes(q, x, 0, q.C, ld, fx);
    planes(side, g, 0, q.O, ld, fg);
    const E *px = in<E>(fx, q.C * ld, 5), *pg = in<E>(fg, q.O * ld, 6);
    if (!px || !pg) return NAN;
    double *v = squared + 2 * size;
    std::memset(squared, 0, sizeof(double) * 2 * size);
    add_squares(fx, q.C, ld, size, squared);
    add_squares(fg, q.O, ld, size, squared + size);
    for (i64 t = 0; t < T; t++) v[t] = squared[size + at[t]];
    s3[0] = s3[1] = s3[2] = 0;
    add_lengths(q, squared, v, tap, v + T, s3);
    for (i64 k = 0; k < (q.C > q.O ? q.C : q.O); k++) strided[k] = k * ld;
    for (i64 i = 0; i < count; i++)
        for (i64 f = ld; f < row; f++) gram[i * row + f] = 0;
    alignas(64) double box[BLOCK];
    const E *rows[ROWS];
    for (i64 s = 0; s < ld;) {
        const int n = vectors_for((ld - s + L - 1) / L, NARROW);
        const i64 end = s + n * L;
        i64 below = 0;   // interior positions before the end of these columns
        while (below < count && inner[below] < end) below++;
        for (i64 i = 0; i < below;) {
            const int r = static_cast<int>(block_size(below - i, rows_for(n)));
            for (int j = 0; j < r; j++) rows[j] = px + inner[i + j];
            product<E>(r, n, q.C, rows, strided, px + s, strided, box, RUN, RUNS);
            for (int j = 0; j < r; j++)
                std::memcpy(gram + (i + j) * row + s, box + j * n * L, sizeof(double) * n * L);
            i += r;
        }
        s = end;
    }
    double sum = 0;
    for (i64 s = 0; s < size;) {
        const int n = vectors_for((ld - s + L - 1) / L, NARROW);
        const i64 end = s + n * L;
        i64 below = 0;
        while (below < T && at[below] < end) below++;
        for (i64 t = 0; t < below;) {
            const int r = static_cast<int>(block_size(below - t, rows_for(n)));
            for (int j = 0; j < r; j++) rows[j] = pg + at[t + j];
            product<E>(r, n, q.O, rows, strided, pg + s, strided, box, RUN, RUNS);
            for (int j = 0; j < r; j++) {
                constexpr int H = W / 2;
                vd u[2 * NARROW] = {};
                for (i64 k = 0; k < K; k++) {
                    const i64 i = where[at[t + j] + tap[k]];
                    if (i < 0) continue;
                    const double *p = gram + i * row + s + tap[k];
                    for (int e = 0; e < n * L / H; e++) u[e] += load<vd>(p + e * H);
                }
                double one[2 * NARROW * H];
                for (int e = 0; e < n * L / H; e++) store(one + e * H, u[e]);
                const double *b = box + j * n * L;
                const i64 diagonal = at[t + j] - s;
                if (diagonal < 0) {
                    vd a = {};
                    for (int l = 0; l < n * L; l += H) a += load<vd>(one + l) * load<vd>(b + l);
                    sum += 2 * total(a);
                } else {
                    sum += one[diagonal] * b[diagonal];
                    const i64 last = size - s < n * L ? size - s : n * L;
                    for (i64 l = diagonal + 1; l < last; l++) sum += 2 * (one[l] * b[l]);
                }
            }
            t += r;
        }
        s = end;
    }
    return sum;
}

}  // namespace

extern "C" {

// shape as norms_conv. out: S with the floor in it.
int norms_conv_scale(const float *x, const float *g, const i64 *shape, double *out) {
    const Geometry q = geometry(shape);
    const i64 T = q.T(), K = q.K();
    i64 *table = scratch[2].get<i64>(T + K);
    if (!table) return -1;
    const bool depthwise = q.C == q.groups && q.O == q.groups && q.groups > 1;
    positions(q, depthwise ? W : 1, table, table + T);
    const double n = static_cast<double>(q.C / q.groups * K), m = q.O / q.groups;
    for (i64 i = 0; i < q.b; i++) {
        double s[3];
        const float *xi = x + i * q.xs[0], *gi = g + i * q.gs[0];
        if (depthwise ? depthwise_lengths(q, xi, gi, table, table + T, s)
                      : lengths(q, xi, gi, table + T, s))
            return -1;
        out[i] = with_floor(s[0], s[1], s[2], n, m, static_cast<double>(T) * q.groups);
    }
    return 0;
}

// Strides of one and one group only. Where a value is too large for float32 products: NaN.
int norms_conv_gram(const float *x, const float *g, const i64 *shape, int precise, double *n2,
                    double *scale) {
    const Geometry q = geometry(shape);
    const i64 T = q.T(), K = q.K(), size = q.reached(), most = q.C > q.O ? q.C : q.O;
    i64 *table = scratch[2].get<i64>(T + K + 2 * size + most);
    if (!table) return -1;
    positions(q, 1, table, table + T);
    Geometry side = q;   // the gradient in the input's box
    for (int d = 0; d < 3; d++) {
        side.in[d] = q.out[d];
        side.pad[d] = 0;
    }
    for (int d = 0; d < 5; d++) side.xs[d] = q.gs[d];
    i64 *where = table + T + K;
    for (i64 i = 0; i < q.b; i++) {
        double s[3] = {NAN, NAN, NAN};
        n2[i] = (precise ? box_gram<double> : box_gram<float>)(
            q, side, x + i * q.xs[0], g + i * q.gs[0], table, table + T, where, where + size,
            where + 2 * size, s);
        scale[i] = with_floor(std::sqrt(s[0]), s[1], s[2], static_cast<double>(q.C * K), q.O, T);
    }
    return 0;
}

}
