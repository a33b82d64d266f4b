// What a step does between the contractions' operands and the integer sum; doors in
// casemate/engine/small.py.
//
// A record is handled by the same instructions on its own memory, whatever its slot; only the sum
// over records has an order. Vectors are those of GCC and Clang.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using i64 = int64_t;
constexpr double U32 = 0x1p-24;
constexpr double LARGEST = 0x1p62;
constexpr int W = 8;      // columns of a tile
constexpr int ROWS = 4;   // rows of a tile, at most
constexpr int COLUMNS = 4;  // vectors of columns of a tile, at most
constexpr i64 BLOCK = 64;  // units whose factors are made side by side

typedef float vf __attribute__((vector_size(W * 4)));
typedef double vd __attribute__((vector_size(W * 8)));
typedef i64 vl __attribute__((vector_size(W * 8)));

inline vd wide(const float *p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vd);
}

inline vd load(const double *p) {
    vd v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

double total(vd v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// Never a part of a loop over records, whose ends a compiler might handle by other instructions.
__attribute__((noinline)) double squares(const float *x, i64 n) {
    if (n < W) {
        double sum = 0;
        for (i64 j = 0; j < n; j++) sum += static_cast<double>(x[j]) * x[j];
        return sum;
    }
    vd sum = {};
    i64 j = 0;
    for (; j + W <= n; j += W) sum += wide(x + j) * wide(x + j);
    if (j < n) {  // the last vector again, without the lanes that were in it
        const vl lane = {0, 1, 2, 3, 4, 5, 6, 7}, first = vl{} + (W - (n - j));
        const vd v = lane < first ? vd{} : wide(x + n - W);
        sum += v * v;
    }
    return total(sum);
}

// As batched.SMALLEST: a smaller factor is zero.
constexpr double SMALLEST = 0x1p-48;

// Of a block of units: what their sites add up to.
struct Sums {
    double squared[BLOCK], rounding[BLOCK], spread[BLOCK];

    void add(i64 count, const double *n2, const double *s2, double gamma, double error,
             bool formed) {
        const double e2 = error * error, apart = formed ? 0.0 : 1.0;
        for (i64 i = 0; i < count; i++) {
            const double upper = n2[i] + gamma * s2[i];
            squared[i] += upper < 0 ? 0.0 : upper;
            rounding[i] += e2 * s2[i];
            spread[i] += apart * s2[i];
        }
    }

    // The largest float32 factors for which the bounds hold; a unit counts where its own is finite.
    void factors(i64 count, double bound, double share, float *c, uint8_t *good) const {
        double largest[BLOCK], root[BLOCK], wanted[BLOCK];
        float near[BLOCK];
        for (i64 i = 0; i < BLOCK; i++) {
            largest[i] = std::sqrt(squared[i]) + U32 * std::sqrt(spread[i]);
            root[i] = std::sqrt(rounding[i]);
        }
        for (i64 i = 0; i < BLOCK; i += W) {  // lanes choose without a branch
            const vd f = bound / load(largest + i), other = share / load(root + i);
            const vd least = other < f ? other : f;
            const vd kept = least < 1.0 ? least : vd{} + 1.0;
            std::memcpy(wanted + i, &kept, sizeof kept);
        }
        for (i64 i = 0; i < BLOCK; i++) near[i] = static_cast<float>(wanted[i]);
        for (i64 i = 0; i < count; i++) {
            uint32_t bits;
            std::memcpy(&bits, near + i, sizeof bits);
            bits -= static_cast<double>(near[i]) > wanted[i];
            const bool counts = largest[i] <= DBL_MAX;  // not so for NaN
            bits = counts && wanted[i] >= SMALLEST ? bits : 0;
            std::memcpy(c + i, &bits, sizeof bits);
            good[i] = counts;
        }
    }
};

// out (R, n) = sum_i c_i g_i x_i^T for N vectors of columns, each from its place `at` on.
template <int R, int N>
void tile(const float *c, const float *g, const float *x, i64 b, i64 m, i64 n, const i64 *at,
          double *out) {
    vd sum[R][N] = {};
    for (i64 i = 0; i < b; i++) {
        if (c[i] == 0) continue;  // what it holds may not be multiplied
        vd v[N];
        for (int k = 0; k < N; k++) v[k] = wide(x + i * n + at[k]);
        for (int r = 0; r < R; r++) {
            const double scaled = static_cast<double>(c[i]) * g[i * m + r];
            for (int k = 0; k < N; k++) sum[r][k] += scaled * v[k];
        }
    }
    for (int r = 0; r < R; r++)
        for (int k = 0; k < N; k++) std::memcpy(out + r * n + at[k], &sum[r][k], sizeof(vd));
}

template <int N>
void rows(const float *c, const float *g, const float *x, i64 b, i64 m, i64 n, const i64 *at,
          double *out) {
    constexpr decltype(&tile<1, N>) TILES[] = {tile<1, N>, tile<2, N>, tile<3, N>, tile<4, N>};
    for (i64 r = 0; r < m; r += ROWS)
        TILES[(m - r < ROWS ? m - r : ROWS) - 1](c, g + r, x, b, m, n, at, out + r * n);
}

void outer(const float *c, const float *g, const float *x, i64 b, i64 m, i64 n, double *out) {
    if (n >= W) {
        for (i64 j = 0; j < n;) {
            i64 at[COLUMNS];
            int k = 0;
            for (; k < COLUMNS && j < n; k++, j += W) at[k] = j + W <= n ? j : n - W;  // overlaps
            (k == 4 ? rows<4> : k == 3 ? rows<3> : k == 2 ? rows<2> : rows<1>)(c, g, x, b, m, n, at,
                                                                               out);
        }
        return;
    }
    for (i64 j = 0; j < m * n; j++) out[j] = 0;
    for (i64 i = 0; i < b; i++) {
        if (c[i] == 0) continue;
        for (i64 r = 0; r < m; r++)
            for (i64 j = 0; j < n; j++)
                out[r * n + j] += (static_cast<double>(c[i]) * g[i * m + r]) * x[i * n + j];
    }
}

template <int R>
void column(const float *c, const float *g, i64 b, i64 m, double *out) {
    double sum[R] = {};
    for (i64 i = 0; i < b; i++) {
        if (c[i] == 0) continue;
        for (int r = 0; r < R; r++) sum[r] += static_cast<double>(c[i]) * g[i * m + r];
    }
    for (int r = 0; r < R; r++) out[r] = sum[r];
}

void bias(const float *c, const float *g, i64 b, i64 m, double *out) {
    constexpr decltype(&column<1>) PARTS[] = {column<1>, column<2>, column<3>, column<4>};
    for (i64 r = 0; r < m; r += ROWS)
        PARTS[(m - r < ROWS ? m - r : ROWS) - 1](c, g + r, b, m, out + r);
}

}  // namespace

extern "C" {

// For each of `sites`: squared norms and (or null) S of units, and the way's constants.
void step_factors(i64 sites, i64 units, const double *const *squared, const double *const *spread,
                  const double *gamma, const double *error, const uint8_t *formed, double bound,
                  double share, float *c, uint8_t *good) {
    for (i64 first = 0; first < units; first += BLOCK) {
        const i64 count = units - first < BLOCK ? units - first : BLOCK;
        Sums sums = {};
        for (i64 s = 0; s < sites; s++) {
            double s2[BLOCK];
            for (i64 i = 0; i < count; i++)
                s2[i] = spread[s] ? spread[s][first + i] * spread[s][first + i]
                                  : squared[s][first + i];
            sums.add(count, squared[s] + first, s2, gamma[s], error[s], formed[s]);
        }
        sums.factors(count, bound, share, c + first, good + first);
    }
}

// Sites of one token: g (b, m), and x (b, n) or null for a bias (n = 1). total (at, m * n) +=
// rint(inverse_step * sum_i c_i g_i x_i^T). scratch: the largest m * n doubles.
void step_sums(i64 sites, i64 b, const float *const *g, const float *const *x, const i64 *m,
               const i64 *n, const double *gamma, const double *error, double bound, double share,
               double inverse_step, float *c, double *scratch, i64 *const *total) {
    for (i64 first = 0; first < b; first += BLOCK) {
        const i64 count = b - first < BLOCK ? b - first : BLOCK;
        Sums sums = {};
        uint8_t good[BLOCK];
        for (i64 s = 0; s < sites; s++) {
            double n2[BLOCK];
            for (i64 i = 0; i < count; i++) n2[i] = squares(g[s] + (first + i) * m[s], m[s]);
            if (x[s])
                for (i64 i = 0; i < count; i++) n2[i] *= squares(x[s] + (first + i) * n[s], n[s]);
            sums.add(count, n2, n2, gamma[s], error[s], !x[s]);
        }
        sums.factors(count, bound, share, c + first, good);
    }
    for (i64 s = 0; s < sites; s++) {
        if (x[s])
            outer(c, g[s], x[s], b, m[s], n[s], scratch);
        else
            bias(c, g[s], b, m[s], scratch);
        for (i64 j = 0; j < m[s] * n[s]; j++) {
            const double steps = std::rint(scratch[j] * inverse_step);
            if (std::fabs(steps) < LARGEST) total[s][j] += static_cast<i64>(steps);
        }
    }
}

}  // extern "C"
