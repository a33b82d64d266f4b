// Per-record gradient norms and per-record gradients; doors in casemate/engine/kernels.
//
// A record is handled by the same instructions on its own memory, in an order that depends on the
// shapes alone: loads are unaligned, nothing is peeled for alignment, there is no reduction that a
// compiler may reorder (no -ffast-math), so bits depend neither on the slot nor on other records.
// Dense products run in float32 for at most CHUNK terms and are added up in float64 beyond that.
// Vectors are those of GCC and Clang; their width is the machine's.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

using i64 = int64_t;

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int WIDE = 4;     // vectors in the widest tile
constexpr int CELLS = 24;   // accumulators of a tile
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int WIDE = 2;
constexpr int CELLS = 12;
#else
constexpr int W = 4;
constexpr int WIDE = 2;
constexpr int CELLS = 12;
#endif
constexpr i64 CHUNK = 256;
constexpr i64 SHORT = 64;   // for Gram matrices, whose rounding counts S^2 / n^2 times
constexpr int ROWS = 12;    // rows of a tile, at most
constexpr int STAGE = 96 + 11;   // 96 rows and not another tile
constexpr int NARROW = 2;    // vectors in a tile of a symmetric matrix: less beyond the diagonal
constexpr double FLOOR = 0x1p-125;   // 2^-149 / 2^-24: underflow in units of gamma

typedef float vf __attribute__((vector_size(W * 4)));
typedef int vi __attribute__((vector_size(W * 4)));
typedef float vh __attribute__((vector_size(W * 2)));
typedef double vd __attribute__((vector_size(W * 4)));

template <class V, class E>
inline V load(const E *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class E>
inline void store(E *p, V v) {
    std::memcpy(p, &v, sizeof v);
}
inline vd widen(const float *p) { return __builtin_convertvector(load<vh>(p), vd); }

template <class E>
struct lanes;
template <>
struct lanes<float> {
    typedef vf vec;
    static constexpr int n = W;
};
template <>
struct lanes<double> {
    typedef vd vec;
    static constexpr int n = W / 2;
};

inline double total(vd v) {
    double s = 0;
    for (int l = 0; l < W / 2; l++) s += v[l];
    return s;
}
inline i64 up(i64 n, i64 k) { return (n + k - 1) / k * k; }

// Scratch of one thread, grown when needed and kept.
struct Scratch {
    void *data = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(data); }
    template <class E>
    E *get(i64 count) {
        size_t bytes = (static_cast<size_t>(count) * sizeof(E) + 127) / 64 * 64;
        if (bytes > size) {
            std::free(data);
            data = std::aligned_alloc(64, bytes);
            size = data ? bytes : 0;
        }
        return static_cast<E *>(data);
    }
};
thread_local Scratch scratch[8];

double squares(const float *x, i64 n) {
    vd a[4] = {};
    i64 j = 0;
    for (; j + 2 * W <= n; j += 2 * W)
        for (int q = 0; q < 4; q++) {
            vd v = widen(x + j + q * (W / 2));
            a[q] += v * v;
        }
    double s = total((a[0] + a[1]) + (a[2] + a[3]));
    for (; j < n; j++) s += static_cast<double>(x[j]) * x[j];
    return s;
}

// ---- the tile: out[r][l] = sum_k s[r][si[k]] * v[vi[k] + l], R rows, N vectors ----

template <class E, int R, int N>
void tile(i64 count, const E *const *s, const i64 *si, const E *v, const i64 *vi, E *out) {
    typedef typename lanes<E>::vec V;
    constexpr int L = lanes<E>::n;
    const E *row[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) row[r] = s[r];
    V a[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) a[r][n] = V{};
    for (i64 k = 0; k < count; k++) {
        const i64 at = si[k];
        const E *p = v + vi[k];
        V b[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) b[n] = load<V>(p + n * L);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const E x = row[r][at];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) a[r][n] += b[n] * x;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) store(out + (r * N + n) * L, a[r][n]);
}

template <class E>
using Tile = void (*)(i64, const E *const *, const i64 *, const E *, const i64 *, E *);

template <class E, int N, int R = ROWS>
struct Table {
    static Tile<E> pick(int rows) {
        if constexpr (R * N <= CELLS) {
            if (rows == R) return tile<E, R, N>;
        }
        if constexpr (R > 1) return Table<E, N, R - 1>::pick(rows);
        return nullptr;
    }
};
template <class E>
Tile<E> choose(int rows, int vectors) {
    if constexpr (WIDE == 4) {
        if (vectors == 4) return Table<E, 4>::pick(rows);
    }
    return vectors == 2 ? Table<E, 2>::pick(rows) : Table<E, 1>::pick(rows);
}

inline int vectors_for(i64 left, int widest = WIDE) {
    for (int n = widest; n > 1; n /= 2)
        if (left > n / 2) return n > left ? n / 2 : n;
    return 1;
}
inline i64 rows_for(i64 vectors) { return CELLS / vectors < ROWS ? CELLS / vectors : ROWS; }

constexpr int BLOCK = CELLS * W;   // elements of a tile, at most

// A tile over any number of terms: float32 over `most` of them, float64 beyond.
template <class E>
void product(int rows, int vectors, i64 count, const E *const *s, const i64 *si, const E *v,
             const i64 *vi, double *out, i64 most = CHUNK) {
    alignas(64) E part[BLOCK];
    const Tile<E> run = choose<E>(rows, vectors);
    const int size = rows * vectors * lanes<E>::n;
    const i64 chunk = sizeof(E) == 4 ? most : count;
    for (i64 k = 0; k < count || k == 0; k += chunk) {
        const i64 here = count - k < chunk ? count - k : chunk;
        run(here, s, si + k, v, vi + k, part);
        if (k == 0)
            for (int j = 0; j < size; j++) out[j] = part[j];
        else
            for (int j = 0; j < size; j++) out[j] += part[j];
        if (chunk == 0) break;
    }
}

// Balanced blocks: `total` rows in blocks of at most `most`.
inline i64 block_size(i64 left, i64 most) {
    const i64 blocks = (left + most - 1) / most;
    return (left + blocks - 1) / blocks;
}

double sum_squares(const double *p, int size) {
    vd a[2] = {};
    for (int j = 0; j < size; j += W) {
        vd u = load<vd>(p + j), v = load<vd>(p + j + W / 2);
        a[0] += u * u;
        a[1] += v * v;
    }
    return total(a[0] + a[1]);
}

// The sum of a tile's squares.
double product_squares(int rows, int vectors, i64 count, const float *const *s, const i64 *si,
                       const float *v, const i64 *vi, double *box) {
    if (count > CHUNK) {
        product<float>(rows, vectors, count, s, si, v, vi, box);
        return sum_squares(box, rows * vectors * W);
    }
    alignas(64) float part[BLOCK];
    choose<float>(rows, vectors)(count, s, si, v, vi, part);
    return squares(part, rows * vectors * W);
}

// The tile itself, rounded to float32.
void product_floats(int rows, int vectors, i64 count, const float *const *s, const i64 *si,
                    const float *v, const i64 *vi, double *box, float *out) {
    if (count <= CHUNK) {
        choose<float>(rows, vectors)(count, s, si, v, vi, out);
        return;
    }
    product<float>(rows, vectors, count, s, si, v, vi, box);
    for (int j = 0; j < rows * vectors * W; j++) out[j] = static_cast<float>(box[j]);
}

// ---- transposing ----

template <int S>
inline void exchange(vf *r) {
    vi lo, hi;
    for (int l = 0; l < W; l++) {
        lo[l] = l & S ? W + (l ^ S) : l;
        hi[l] = l & S ? W + l : l | S;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (!(i & S)) {
            const vf a = r[i], b = r[i | S];
            r[i] = __builtin_shuffle(a, b, lo);
            r[i | S] = __builtin_shuffle(a, b, hi);
        }
}

// to[c * ldt + r] = from[r * ldf + c]; r < rows, c < columns
void transpose(const float *from, i64 ldf, i64 rows, i64 columns, float *to, i64 ldt) {
    const i64 rw = rows / W * W, cw = columns / W * W;
    for (i64 r = 0; r < rw; r += W)
        for (i64 c = 0; c < cw; c += W) {
            vf v[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) v[i] = load<vf>(from + (r + i) * ldf + c);
            if constexpr (W > 8) exchange<8>(v);
            if constexpr (W > 4) exchange<4>(v);
            exchange<2>(v);
            exchange<1>(v);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) store(to + (c + i) * ldt + r, v[i]);
        }
    for (i64 r = 0; r < rw; r++)
        for (i64 c = cw; c < columns; c++) to[c * ldt + r] = from[r * ldf + c];
    for (i64 r = rw; r < rows; r++)
        for (i64 c = 0; c < columns; c++) to[c * ldt + r] = from[r * ldf + c];
}
inline void zero_columns(float *p, i64 rows, i64 ld, i64 from, i64 to) {
    for (i64 r = 0; r < rows; r++)
        for (i64 c = from; c < to; c++) p[r * ld + c] = 0;
}

// ---- pairs of Gram matrices ----

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

// ---- convolutions: everything in three dimensions ----

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
                product_floats(count, n, T, rows, at, pg + first, across, box, stage + held * n * W);
                held += count;
                if (held + ROWS > STAGE || r + count == c * K) {
                    const i64 some = o - first < n * W ? o - first : n * W;
                    float *to = want.formed + (group * o + first) * c * K + r + count - held;
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

// One group, strides of one: the Gram matrix of the padded input summed along its diagonals (the
// taps) times that of the output gradient, both in one padded box, pairs with f >= f(t) only.
double box_gram(const Geometry &q, const Geometry &side, const float *x, const float *g,
                const i64 *at, const i64 *tap, i64 *where, i64 *inner, i64 *strided, double *s3) {
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
    float *px = scratch[0].get<float>(q.C * ld + W), *pg = scratch[1].get<float>(q.O * ld + W);
    double *squared = scratch[4].get<double>(2 * size + 2 * T);
    float *gram = scratch[3].get<float>(count * row + 1);
    if (!px || !pg || !gram || !squared) return NAN;
    planes(q, x, 0, q.C, ld, px);
    planes(side, g, 0, q.O, ld, pg);
    double *v = squared + 2 * size;
    std::memset(squared, 0, sizeof(double) * 2 * size);
    add_squares(px, q.C, ld, size, squared);
    add_squares(pg, q.O, ld, size, squared + size);
    for (i64 t = 0; t < T; t++) v[t] = squared[size + at[t]];
    s3[0] = s3[1] = s3[2] = 0;
    add_lengths(q, squared, v, tap, v + T, s3);
    for (i64 k = 0; k < (q.C > q.O ? q.C : q.O); k++) strided[k] = k * ld;
    for (i64 i = 0; i < count; i++)
        for (i64 f = ld; f < row; f++) gram[i * row + f] = 0;
    alignas(64) double box[BLOCK];
    const float *rows[ROWS];
    for (i64 s = 0; s < ld;) {
        const int n = vectors_for((ld - s + W - 1) / W, NARROW);
        const i64 end = s + n * W;
        i64 below = 0;   // interior positions before the end of these columns
        while (below < count && inner[below] < end) below++;
        for (i64 i = 0; i < below;) {
            const int r = static_cast<int>(block_size(below - i, rows_for(n)));
            for (int j = 0; j < r; j++) rows[j] = px + inner[i + j];
            product<float>(r, n, q.C, rows, strided, px + s, strided, box, SHORT);
            for (int j = 0; j < r; j++)
                for (int l = 0; l < n * W; l++)
                    gram[(i + j) * row + s + l] = static_cast<float>(box[j * n * W + l]);
            i += r;
        }
        s = end;
    }
    double sum = 0;
    for (i64 s = 0; s < size;) {
        const int n = vectors_for((ld - s + W - 1) / W, NARROW);
        const i64 end = s + n * W;
        i64 below = 0;
        while (below < T && at[below] < end) below++;
        for (i64 t = 0; t < below;) {
            const int r = static_cast<int>(block_size(below - t, rows_for(n)));
            for (int j = 0; j < r; j++) rows[j] = pg + at[t + j];
            product<float>(r, n, q.O, rows, strided, pg + s, strided, box, SHORT);
            for (int j = 0; j < r; j++) {
                vf u[WIDE] = {};
                for (i64 k = 0; k < K; k++) {
                    const i64 i = where[at[t + j] + tap[k]];
                    if (i < 0) continue;
                    const float *p = gram + i * row + s + tap[k];
                    for (int e = 0; e < n; e++) u[e] += load<vf>(p + e * W);
                }
                float one[WIDE * W];
                for (int e = 0; e < n; e++) store(one + e * W, u[e]);
                const double *b = box + j * n * W;
                const i64 diagonal = at[t + j] - s;
                if (diagonal < 0) {
                    vd a = {};
                    for (int l = 0; l < n * W; l += W / 2) a += widen(one + l) * load<vd>(b + l);
                    sum += 2 * total(a);
                } else {
                    sum += one[diagonal] * b[diagonal];
                    const i64 last = size - s < n * W ? size - s : n * W;
                    for (i64 l = diagonal + 1; l < last; l++) sum += 2 * (one[l] * b[l]);
                }
            }
            t += r;
        }
        s = end;
    }
    return sum;
}

// ---- sums over records ----

// A tile into the sum, row by row: written the first time, added after that.
inline void add_tile(const float *part, int rows, i64 columns, i64 ld_part, float *to, i64 ld,
                     bool first) {
    for (int j = 0; j < rows; j++) {
        const float *p = part + j * ld_part;
        float *o = to + j * ld;
        if (first)
            std::memcpy(o, p, sizeof(float) * columns);
        else
            for (i64 l = 0; l < columns; l++) o[l] += p[l];
    }
}

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

inline i64 grid_steps(double v) { return static_cast<i64>(std::fabs(v) < 0x1p62 ? v : 0.0); }

}  // namespace

extern "C" {

void norms_row_squares(const float *x, i64 b, i64 n, double *out) {
    for (i64 i = 0; i < b; i++) out[i] = squares(x + i * n, n);
}

int norms_conv(const float *x, const float *g, const i64 *shape, double *norms, float *formed) {
    return convolve(geometry(shape), x, g, norms, formed);
}

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
int norms_conv_gram(const float *x, const float *g, const i64 *shape, double *n2, double *scale) {
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
        n2[i] = box_gram(q, side, x + i * q.xs[0], g + i * q.gs[0], table, table + T, where,
                         where + size, where + 2 * size, s);
        scale[i] = with_floor(std::sqrt(s[0]), s[1], s[2], static_cast<double>(q.C * K), q.O, T);
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

void norms_accumulate(i64 *total, const float *part, i64 d, double inverse_step) {
    for (i64 j = 0; j < d; j++) {
        total[j] += grid_steps(std::rint(part[j] * inverse_step));
    }
}

void norms_finish(const i64 *total, i64 d, double factor, float *out) {
    for (i64 j = 0; j < d; j++)
        out[j] = static_cast<float>(static_cast<double>(total[j]) * factor);
}

// Products of float32 are exact in float64; one rounding at the end.
void norms_weighted_sum(const float *formed, i64 b, i64 n, const float *c, float *out) {
    constexpr i64 PART = 1024;
    double sum[PART];
    for (i64 first = 0; first < n; first += PART) {
        const i64 count = n - first < PART ? n - first : PART;
        for (i64 j = 0; j < count; j++) sum[j] = 0;
        for (i64 i = 0; i < b; i++) {
            const double w = c[i];
            if (w == 0) continue;
            const float *p = formed + i * n + first;
            for (i64 j = 0; j < count; j++) sum[j] += w * p[j];
        }
        for (i64 j = 0; j < count; j++) out[first + j] = static_cast<float>(sum[j]);
    }
}

// out (m, n) = sum_t c[t / per] g_t x_t^T for g (N, m), x (N, n); tokens not kept count as zeros.
// float32 over `chunk` tokens, whose sums are then added in order, in float32.
int norms_contract(const float *g, const float *x, i64 N, i64 m, i64 n, const float *c,
                   const uint8_t *keep, i64 per, i64 chunk, float *out) {
    const i64 width = up(n, W), some = chunk < N ? chunk : N;
    float *px = scratch[0].get<float>(some * width), *pg = scratch[1].get<float>(some * m);
    i64 *table = scratch[2].get<i64>((ROWS + 1 + WIDE) * some);
    if (!px || !pg || !table) return -1;
    for (i64 r = 1; r <= ROWS; r++)
        for (i64 t = 0; t < some; t++) table[(r - 1) * some + t] = t * r;
    i64 *across = table + ROWS * some;
    for (i64 k = 1; k <= WIDE; k++)
        for (i64 t = 0; t < some; t++) across[(k - 1) * some + t] = t * k * W;
    const i64 most = rows_for(vectors_for(width / W));
    alignas(64) float part[BLOCK];
    const float *rows[ROWS];
    for (i64 start = 0; start < N; start += chunk) {
        const i64 here = N - start < chunk ? N - start : chunk;
        // Blocks of columns of x, blocks of rows of g, each as the tile reads it.
        for (i64 first = 0; first < width;) {
            const i64 k = vectors_for((width - first) / W), size = k * W;
            const i64 count = n - first < size ? n - first : size;
            for (i64 t = 0; t < here; t++) {
                float *to = px + first * here + t * size;
                const bool on = keep[(start + t) / per];
                if (on) std::memcpy(to, x + (start + t) * n + first, sizeof(float) * count);
                for (i64 l = on ? count : 0; l < size; l++) to[l] = 0;
            }
            first += size;
        }
        for (i64 r = 0; r < m;) {
            const i64 count = block_size(m - r, most);
            for (i64 t = 0; t < here; t++) {
                const i64 row = (start + t) / per;
                const float w = c[row], *from = g + (start + t) * m + r;
                float *to = pg + r * here + t * count;
                if (keep[row])
                    for (i64 j = 0; j < count; j++) to[j] = w * from[j];
                else
                    for (i64 j = 0; j < count; j++) to[j] = 0;
            }
            r += count;
        }
        for (i64 first = 0; first < width;) {
            const int k = vectors_for((width - first) / W);
            const i64 count = n - first < k * W ? n - first : k * W;
            for (i64 r = 0; r < m;) {
                const int block = static_cast<int>(block_size(m - r, most));
                for (int j = 0; j < block; j++) rows[j] = pg + r * here + j;
                choose<float>(block, k)(here, rows, table + (block - 1) * some, px + first * here,
                                        across + (k - 1) * some, part);
                add_tile(part, block, count, k * W, out + r * n + first, n, start == 0);
                r += block;
            }
            first += k * W;
        }
    }
    return 0;
}

// out (O, C / groups, K): the weight gradients of a convolution summed with weights c, as above;
// tokens are output positions, in the order of records.
int norms_conv_contract(const float *x, const float *g, const i64 *shape, const float *c,
                        const uint8_t *keep, i64 chunk, float *out) {
    const Geometry q = geometry(shape), side = gradient_side(q);
    const i64 T = q.T(), K = q.K(), size = q.reached();
    const i64 ci = q.C / q.groups, o = q.O / q.groups, width = up(o, W);
    const i64 records = T < chunk ? (chunk / T < q.b ? chunk / T : q.b) : 1;
    const i64 tokens = records * T, ld = records * size;
    i64 *table = scratch[2].get<i64>(2 * tokens + K);
    float *px = scratch[0].get<float>(ci * ld), *pg = scratch[1].get<float>(tokens * width);
    float *sum = scratch[3].get<float>(ci * K * width);
    if (!table || !px || !pg || !sum) return -1;
    i64 *tap = table + tokens, *across = tap + K;
    positions(q, 1, table, tap);
    for (i64 t = T; t < tokens; t++) table[t] = table[t - T] + size;
    for (i64 t = 0; t < tokens; t++) across[t] = t * width;
    alignas(64) float part[BLOCK];
    const float *rows[ROWS];
    for (i64 group = 0; group < q.groups; group++) {
        for (i64 start = 0; start < q.b; start += records) {
            const i64 here = q.b - start < records ? q.b - start : records;
            std::memset(px, 0, sizeof(float) * ci * ld);
            for (i64 i = 0; i < here; i++) {
                float *to = pg + i * T * width;
                if (!keep[start + i]) {
                    std::memset(to, 0, sizeof(float) * T * width);
                    continue;
                }
                planes(q, x + (start + i) * q.xs[0], group * ci, ci, ld, px + i * size, true);
                pixels(side, g + (start + i) * q.gs[0], group * o, o, width, to);
                const float w = c[start + i];
                for (i64 j = 0; j < T * width; j++) to[j] *= w;
            }
            for (i64 t = 0; t < here * T; t += chunk) {
                const i64 count = here * T - t < chunk ? here * T - t : chunk;
                for (i64 first = 0; first < width;) {
                    const int n = vectors_for((width - first) / W);
                    for (i64 r = 0; r < ci * K;) {
                        const int block = static_cast<int>(block_size(ci * K - r, rows_for(n)));
                        for (int j = 0; j < block; j++)
                            rows[j] = px + (r + j) / K * ld + tap[(r + j) % K];
                        choose<float>(block, n)(count, rows, table + t, pg + first, across + t,
                                                part);
                        add_tile(part, block, n * W, n * W, sum + r * width + first, width,
                                 start == 0 && t == 0);
                        r += block;
                    }
                    first += n * W;
                }
            }
        }
        transpose(sum, width, ci * K, o, out + group * o * ci * K, ci * K);
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

}
