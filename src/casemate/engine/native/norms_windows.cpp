// Convolutions, everything in three dimensions: gradients formed, or their squares. Part of norms.cpp.

namespace {

struct Geometry {
    i64 b, C, O, groups;
    i64 in[3], out[3], kernel[3], stride[3], pad[3], dil[3];
    i64 xs[5], gs[5];   // strides: record, channel, three of space
    i64 T() const { return out[0] * out[1] * out[2]; }
    i64 K() const { return kernel[0] * kernel[1] * kernel[2]; }
    i64 wide(int d) const {   // padded extent that is reached
        return (out[d] - 1) * stride[d] + (kernel[d] - 1) * dil[d] + 1;
    }
    i64 reached() const { return wide(0) * wide(1) * wide(2); }
};

// Positions in the padded box, in elements, for the outputs and for the taps.
void positions(const Geometry &q, i64 step, i64 *at, i64 *tap) {
    const i64 h = q.wide(1), w = q.wide(2);
    for (i64 a = 0; a < q.out[0]; a++)
        for (i64 i = 0; i < q.out[1]; i++)
            for (i64 j = 0; j < q.out[2]; j++)
                *at++ = step * ((a * q.stride[0] * h + i * q.stride[1]) * w + j * q.stride[2]);
    for (i64 a = 0; a < q.kernel[0]; a++)
        for (i64 i = 0; i < q.kernel[1]; i++)
            for (i64 j = 0; j < q.kernel[2]; j++)
                *tap++ = step * ((a * q.dil[0] * h + i * q.dil[1]) * w + j * q.dil[2]);
}

// The part [lo, hi) of a padded axis that holds input.
inline void inside(const Geometry &q, int d, i64 *lo, i64 *hi) {
    const i64 w = q.wide(d);
    *lo = q.pad[d] < w ? q.pad[d] : w;
    *hi = q.pad[d] + q.in[d] < w ? q.pad[d] + q.in[d] : w;
}

// to[r * ldt + j] = from[r * ldf + j * step]
template <int N>
void copy_short(const float *from, i64 ldf, i64 rows, float *to, i64 ldt) {
    for (i64 r = 0; r < rows; r++) std::memcpy(to + r * ldt, from + r * ldf, sizeof(float) * N);
}
void copy_rows(const float *from, i64 ldf, i64 step, i64 rows, i64 n, float *to, i64 ldt) {
    if (step == 1) {
        if (n == 2) return copy_short<2>(from, ldf, rows, to, ldt);
        if (n == 4) return copy_short<4>(from, ldf, rows, to, ldt);
        if (n == 8) return copy_short<8>(from, ldf, rows, to, ldt);
        if (n == 16) return copy_short<16>(from, ldf, rows, to, ldt);
        for (i64 r = 0; r < rows; r++)
            for (i64 j = 0; j < n; j++) to[r * ldt + j] = from[r * ldf + j];
        return;
    }
    for (i64 r = 0; r < rows; r++)
        for (i64 j = 0; j < n; j++) to[r * ldt + j] = from[r * ldf + j * step];
}

// Channels [first, first + count) of one record, padded, as planes: to[c * ld + position].
void planes(const Geometry &q, const float *x, i64 first, i64 count, i64 ld, float *to,
            bool cleared = false) {
    const i64 h = q.wide(1), w = q.wide(2);
    i64 lo[3], hi[3];
    for (int d = 0; d < 3; d++) inside(q, d, lo + d, hi + d);
    if (!cleared && ld != (hi[0] - lo[0]) * (hi[1] - lo[1]) * (hi[2] - lo[2]))
        std::memset(to, 0, sizeof(float) * ld * count);
    if (q.xs[1] == 1 && count >= 4) {
        for (i64 a = lo[0]; a < hi[0]; a++)
            for (i64 i = lo[1]; i < hi[1]; i++) {
                const float *from = x + first + (a - q.pad[0]) * q.xs[2] +
                                    (i - q.pad[1]) * q.xs[3] + (lo[2] - q.pad[2]) * q.xs[4];
                transpose(from, q.xs[4], hi[2] - lo[2], count, to + (a * h + i) * w + lo[2], ld);
            }
        return;
    }
    const i64 n = hi[2] - lo[2], rows = (hi[0] - lo[0]) * (hi[1] - lo[1]);
    const float *base = x + first * q.xs[1] + (lo[2] - q.pad[2]) * q.xs[4];
    if (q.xs[4] == 1 && rows * n == ld && q.xs[1] == ld && rows == 1) {
        std::memcpy(to, base + (lo[0] - q.pad[0]) * q.xs[2] + (lo[1] - q.pad[1]) * q.xs[3],
                    sizeof(float) * ld * count);
        return;
    }
    for (i64 a = lo[0]; a < hi[0]; a++)
        for (i64 i = lo[1]; i < hi[1]; i++)
            copy_rows(base + (a - q.pad[0]) * q.xs[2] + (i - q.pad[1]) * q.xs[3], q.xs[1],
                      q.xs[4], count, n, to + (a * h + i) * w + lo[2], ld);
}

// The same, channels last: to[position][width], zeros beyond `count`.
void pixels(const Geometry &q, const float *x, i64 first, i64 count, i64 width, float *to) {
    const i64 h = q.wide(1), w = q.wide(2);
    i64 lo[3], hi[3];
    for (int d = 0; d < 3; d++) inside(q, d, lo + d, hi + d);
    std::memset(to, 0, sizeof(float) * q.reached() * width);
    for (i64 a = lo[0]; a < hi[0]; a++)
        for (i64 i = lo[1]; i < hi[1]; i++) {
            const float *from = x + first * q.xs[1] + (a - q.pad[0]) * q.xs[2] +
                                (i - q.pad[1]) * q.xs[3] + (lo[2] - q.pad[2]) * q.xs[4];
            float *p = to + ((a * h + i) * w + lo[2]) * width;
            const i64 n = hi[2] - lo[2];
            if (q.xs[4] == 1 && q.xs[1] != 1)
                transpose(from, q.xs[1], count, n, p, width);
            else if (q.xs[1] == 1 && count == W)
                for (i64 j = 0; j < n; j++)
                    store(p + j * width, load<vf>(from + j * q.xs[4]));
            else if (q.xs[1] == 1)
                for (i64 j = 0; j < n; j++)
                    std::memcpy(p + j * width, from + j * q.xs[4], sizeof(float) * count);
            else
                for (i64 j = 0; j < n; j++)
                    for (i64 c = 0; c < count; c++)
                        p[j * width + c] = from[j * q.xs[4] + c * q.xs[1]];
        }
}

// Whether the axes of space lie in memory as one.
inline bool one_row(const i64 *strides, const i64 *size) {
    return strides[4] * size[2] == strides[3] && strides[3] * size[1] == strides[2];
}

// The output gradient as an input of a 1x1x1 convolution: planes() and pixels() then copy it.
Geometry gradient_side(const Geometry &q) {
    Geometry p = q;
    for (int d = 0; d < 3; d++) {
        p.in[d] = q.out[d];
        p.kernel[d] = p.stride[d] = p.dil[d] = 1;
        p.pad[d] = 0;
    }
    for (int d = 0; d < 5; d++) p.xs[d] = q.gs[d];
    if (one_row(q.gs, q.out)) {   // one long axis
        p.in[0] = p.in[1] = p.out[0] = p.out[1] = 1;
        p.in[2] = p.out[2] = q.T();
    }
    return p;
}

// A pointwise convolution over one long axis, where memory allows it.
void flatten(Geometry &q) {
    for (int d = 0; d < 3; d++)
        if (q.kernel[d] != 1 || q.stride[d] != 1 || q.pad[d] != 0 || q.in[d] != q.out[d]) return;
    if (!one_row(q.xs, q.in) || !one_row(q.gs, q.out)) return;
    const i64 T = q.T();
    for (int d = 0; d < 2; d++) q.in[d] = q.out[d] = 1;
    q.in[2] = q.out[2] = T;
}
Geometry geometry(const i64 *shape) {
    Geometry q;
    static_assert(sizeof q == 32 * sizeof(i64), "the layout of the shape array");
    std::memcpy(&q, shape, sizeof q);
    flatten(q);
    return q;
}

struct Want {
    double *norm;    // adds the squares, or
    float *formed;   // writes (O, C / groups, K)
};

// Vectors over output channels, scalars from the input's planes.
int outputs_in_vectors(const Geometry &q, const Geometry &side, const float *x, const float *g,
                       i64 group, const i64 *table, Want want) {
    const i64 T = q.T(), K = q.K(), size = q.reached();
    const i64 c = q.C / q.groups, o = q.O / q.groups, width = up(o, W);
    const i64 *at = table, *tap = at + T, *across = tap + K;
    float *px = scratch[0].get<float>(c * size), *pg = scratch[1].get<float>(T * width);
    if (!px || !pg) return -1;
    planes(q, x, group * c, c, size, px);
    pixels(side, g, group * o, o, width, pg);
    alignas(64) double box[BLOCK];
    alignas(64) float stage[STAGE * WIDE * W];   // rows to be written out together, transposed
    i64 held = 0;
    const float *rows[ROWS];
    for (i64 first = 0; first < width;) {
        const int n = vectors_for((width - first) / W);
        for (i64 r = 0; r < c * K;) {
            const int count = static_cast<int>(block_size(c * K - r, rows_for(n)));
            for (int j = 0; j < count; j++) rows[j] = px + (r + j) / K * size + tap[(r + j) % K];
            if (want.formed) {
                const i64 some = o - first < n * W ? o - first : n * W;
                float *to = want.formed + (group * o + first) * c * K + r - held;
                // A share of the rows to be written for each tile.
                const i64 left = c * K - r + held < STAGE ? c * K - r + held : STAGE;
                const i64 l = held * some / left, end = (held + count) * some / left;
                fetch(to + l * c * K, c * K, end - l, left);
                product_floats(count, n, T, rows, at, pg + first, across, box, stage + held * n * W);
                held += count;
                if (held + ROWS > STAGE || r + count == c * K) {
                    transpose(stage, n * W, held, some, to, c * K);
                    held = 0;
                }
            } else {
                *want.norm += product_squares(count, n, T, rows, at, pg + first, across, box);
            }
            r += count;
        }
        first += n * W;
    }
    return 0;
}

// Vectors over input channels, scalars from the output gradient's planes.
int inputs_in_vectors(const Geometry &q, const Geometry &side, const float *x, const float *g,
                      i64 group, const i64 *table, Want want) {
    const i64 T = q.T(), K = q.K();
    const i64 c = q.C / q.groups, o = q.O / q.groups, width = up(c, W);
    const i64 *at = table, *tap = at + T, *across = tap + K;
    float *px = scratch[0].get<float>(q.reached() * width), *pg = scratch[1].get<float>(o * T);
    if (!px || !pg) return -1;
    pixels(q, x, group * c, c, width, px);
    planes(side, g, group * o, o, T, pg);
    alignas(64) double box[BLOCK];
    alignas(64) float part[BLOCK];
    const float *rows[ROWS];
    for (i64 k = 0; k < K; k++)
        for (i64 first = 0; first < width;) {
            const int n = vectors_for((width - first) / W);
            for (i64 r = 0; r < o;) {
                const int count = static_cast<int>(block_size(o - r, rows_for(n)));
                for (int j = 0; j < count; j++) rows[j] = pg + (r + j) * T;
                const float *v = px + tap[k] + first;
                if (want.formed) {
                    product_floats(count, n, T, rows, across, v, at, box, part);
                    const i64 some = c - first < n * W ? c - first : n * W;
                    for (int j = 0; j < count; j++) {
                        float *to = want.formed + ((group * o + r + j) * c + first) * K + k;
                        const float *from = part + j * n * W;
                        if (K == 1)
                            for (i64 l = 0; l < some; l++) to[l] = from[l];
                        else
                            for (i64 l = 0; l < some; l++) to[l * K] = from[l];
                    }
                } else {
                    *want.norm += product_squares(count, n, T, rows, across, v, at, box);
                }
                r += count;
            }
            first += n * W;
        }
    return 0;
}

// Depthwise, channels in vectors: taps R at a time.
template <int R>
void taps(i64 T, const float *x, const i64 *at, const i64 *tap, const float *g, i64 width,
          float *out) {
    vf a[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) a[r] = vf{};
    for (i64 t = 0; t < T; t++) {
        const vf v = load<vf>(g + t * width);
        const float *p = x + at[t];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) a[r] += v * load<vf>(p + tap[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) store(out + r * W, a[r]);
}
typedef void (*Taps)(i64, const float *, const i64 *, const i64 *, const float *, i64, float *);
template <int R = ROWS>
Taps choose_taps(int rows) {
    if (rows == R) return taps<R>;
    if constexpr (R > 1) return choose_taps<R - 1>(rows);
    return nullptr;
}

int depthwise_pixels(const Geometry &q, const Geometry &side, const float *x, const float *g,
                     const i64 *table, Want want) {
    const i64 T = q.T(), K = q.K(), size = q.reached();
    const i64 *at = table, *tap = at + T;   // in steps of W
    float *px = scratch[0].get<float>(size * W), *pg = scratch[1].get<float>(T * W);
    if (!px || !pg) return -1;
    float part[ROWS * W];
    double box[ROWS * W];
    for (i64 first = 0; first < q.C; first += W) {
        const i64 count = q.C - first < W ? q.C - first : W;
        pixels(q, x, first, count, W, px);
        pixels(side, g, first, count, W, pg);
        for (i64 k = 0; k < K;) {
            const int r = static_cast<int>(block_size(K - k, ROWS));
            const Taps run = choose_taps(r);
            for (i64 t = 0; t < T; t += CHUNK) {
                run(T - t < CHUNK ? T - t : CHUNK, px, at + t, tap + k, pg + t * W, W, part);
                for (int j = 0; j < r * W; j++) box[j] = (t ? box[j] : 0.0) + part[j];
            }
            if (want.formed) {
                for (i64 l = 0; l < count; l++)
                    for (int j = 0; j < r; j++)
                        want.formed[(first + l) * K + k + j] = static_cast<float>(box[j * W + l]);
            } else {
                *want.norm += sum_squares(box, r * W);
            }
            k += r;
        }
    }
    return 0;
}

int one_record(const Geometry &q, const Geometry &side, const float *x, const float *g,
               const i64 *by_plane, const i64 *by_pixel, bool outputs, Want want) {
    if (q.C == q.groups && q.O == q.groups && q.groups > 1)
        return depthwise_pixels(q, side, x, g, by_pixel, want);
    for (i64 group = 0; group < q.groups; group++) {
        const int bad = outputs ? outputs_in_vectors(q, side, x, g, group, by_plane, want)
                                : inputs_in_vectors(q, side, x, g, group, by_pixel, want);
        if (bad) return bad;
    }
    return 0;
}

int convolve(const Geometry &q, const float *x, const float *g, double *norms, float *formed) {
    const i64 T = q.T(), K = q.K(), c = q.C / q.groups, o = q.O / q.groups;
    const bool depthwise = c == 1 && o == 1 && q.groups > 1;
    // Vectors where fewer lanes are idle, but along rows of what is written out.
    const bool along = formed && K == 1 && 9 * up(c, W) * o <= 10 * up(o, W) * c;
    const bool outputs = !depthwise && !along && up(o, W) * c <= up(c, W) * o;
    const i64 step = depthwise ? W : (outputs ? 1 : up(c, W));
    i64 *table = scratch[2].get<i64>(2 * T + K);
    if (!table) return -1;
    positions(q, step, table, table + T);
    for (i64 t = 0; t < T; t++) table[T + K + t] = outputs ? t * up(o, W) : t;
    const Geometry side = gradient_side(q);
    for (i64 i = 0; i < q.b; i++) {
        double norm = 0;
        Want want = {&norm, formed ? formed + i * q.O * c * K : nullptr};
        const int bad =
            one_record(q, side, x + i * q.xs[0], g + i * q.gs[0], table, table, outputs, want);
        if (bad) return bad;
        if (norms) norms[i] = norm;
    }
    return 0;
}

}  // namespace

extern "C" {

int norms_conv(const float *x, const float *g, const i64 *shape, double *norms, float *formed) {
    return convolve(geometry(shape), x, g, norms, formed);
}

}
