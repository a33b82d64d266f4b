// Vectors, scratch, dense products in registers, transposing. Part of norms.cpp.

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
// For Gram matrices, where roundings count S^2 / n^2 times: RUN terms are added up in float32, then
// RUNS such sums, so that a term goes through at most SHORT roundings; the rest in float64.
constexpr i64 SHORT = 32;
constexpr i64 RUN = 24;
constexpr i64 RUNS = SHORT - RUN;
constexpr int ROWS = 12;    // rows of a tile, at most
constexpr int STAGE = 96 + 11;   // 96 rows and not another tile
constexpr int NARROW = 2;   // vectors in a tile of a symmetric matrix: less beyond the diagonal
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

// Functions by rows and vectors: F::at<E, R, N>, of the type F::door<E>.
template <class F, class E, int N, int R = ROWS>
typename F::template door<E> pick(int rows) {
    if constexpr (R * N <= CELLS) {
        if (rows == R) return F::template at<E, R, N>;
    }
    if constexpr (R > 1) return pick<F, E, N, R - 1>(rows);
    return nullptr;
}
template <class F, class E>
typename F::template door<E> choose(int rows, int vectors) {
    if constexpr (WIDE == 4) {
        if (vectors == 4) return pick<F, E, 4>(rows);
    }
    return vectors == 2 ? pick<F, E, 2>(rows) : pick<F, E, 1>(rows);
}

struct Strided {
    template <class E>
    using door = void (*)(i64, const E *const *, const i64 *, const E *, const i64 *, E *);
    template <class E, int R, int N>
    static constexpr door<E> at = tile<E, R, N>;
};
template <class E>
Strided::door<E> choose(int rows, int vectors) {
    return choose<Strided, E>(rows, vectors);
}

inline int vectors_for(i64 left, int widest = WIDE) {
    for (int n = widest; n > 1; n /= 2)
        if (left > n / 2) return n > left ? n / 2 : n;
    return 1;
}
inline i64 rows_for(i64 vectors) { return CELLS / vectors < ROWS ? CELLS / vectors : ROWS; }

constexpr int BLOCK = CELLS * W;   // elements of a tile, at most

// A tile over any number of terms: in float32 `most` of them, and `runs` such sums, then float64.
template <class E>
void product(int rows, int vectors, i64 count, const E *const *s, const i64 *si, const E *v,
             const i64 *vi, double *out, i64 most = CHUNK, i64 runs = 1) {
    alignas(64) E sum[BLOCK], part[BLOCK];
    const auto run = choose<E>(rows, vectors);
    const int size = rows * vectors * lanes<E>::n;
    if (sizeof(E) == 8) most = count;
    for (i64 k = 0, from = 0; k < count || k == 0; from = k) {
        for (i64 r = 0; r < runs && (k < count || r == 0); r++) {
            const i64 here = count - k < most ? count - k : most;
            run(here, s, si + k, v, vi + k, r ? part : sum);
            for (int j = 0; r && j < size; j++) sum[j] += part[j];
            k += here;
        }
        if (from == 0)
            for (int j = 0; j < size; j++) out[j] = sum[j];
        else
            for (int j = 0; j < size; j++) out[j] += sum[j];
        if (k == 0) break;
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

// Asks for the lines of `rows` rows of n floats that are to be written soon.
inline void fetch(const float *to, i64 ld, i64 rows, i64 n) {
    constexpr i64 LINE = 16;
    for (i64 r = 0; r < rows; r++)
        for (i64 l = 0; l < n; l += LINE) __builtin_prefetch(to + r * ld + l, 1);
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

}  // namespace

extern "C" {

void norms_row_squares(const float *x, i64 b, i64 n, double *out) {
    for (i64 i = 0; i < b; i++) out[i] = squares(x + i * n, n);
}

}
