// What a step does between the contractions' operands and the integer sum; doors in
// casemate/engine/small.py.
//
// A record is handled by the same instructions on its own memory, whatever its slot; only the sum
// over records has an order.

#include <cmath>
#include <cstdint>

namespace {

using i64 = int64_t;
constexpr double U32 = 0x1p-24;
constexpr double LARGEST = 0x1p62;

double squares(const float *x, i64 n) {
    double part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    i64 j = 0;
    for (; j + 8 <= n; j += 8)
        for (i64 k = 0; k < 8; k++) part[k] += static_cast<double>(x[j + k]) * x[j + k];
    for (i64 k = 0; j + k < n; k++) part[k] += static_cast<double>(x[j + k]) * x[j + k];
    return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

inline void add(double *__restrict sum, double w, const float *__restrict x, i64 n) {
    for (i64 j = 0; j < n; j++) sum[j] += w * x[j];
}

struct Sum {
    double squared = 0, rounding = 0, spread = 0;

    void add(double n2, double s2, double gamma, double error, bool formed) {
        squared += n2 + gamma * s2;
        rounding += error * error * s2;
        if (!formed) spread += s2;
    }

    // The largest float32 factor for which the bounds hold; `good`: whether the unit counts.
    float factor(double bound, double share, bool &good) const {
        const double largest = std::sqrt(squared > 0 ? squared : 0.0) + U32 * std::sqrt(spread);
        good = std::isfinite(largest) && !std::isnan(squared);
        if (!good) return 0;
        if (!std::isfinite(bound)) return 1;
        double c = bound / largest;
        const double other = share / std::sqrt(rounding);
        if (other < c) c = other;
        if (!(c < 1)) c = 1;
        const float near = static_cast<float>(c);
        return near > c ? std::nextafterf(near, 0.0f) : near;
    }
};

}  // namespace

extern "C" {

// For each of `sites`: squared norms and (or null) S of units, and the way's constants. Returns
// whether all units count.
int step_factors(i64 sites, i64 units, const double *const *squared, const double *const *spread,
                 const double *gamma, const double *error, const uint8_t *formed, double bound,
                 double share, float *c, uint8_t *good) {
    bool all = true;
    for (i64 i = 0; i < units; i++) {
        Sum sum;
        for (i64 s = 0; s < sites; s++) {
            const double n2 = squared[s][i];
            const double s2 = spread[s] ? spread[s][i] * spread[s][i] : n2;
            sum.add(n2, s2, gamma[s], error[s], formed[s]);
        }
        bool counts;
        c[i] = sum.factor(bound, share, counts);
        good[i] = counts;
        all = all && counts;
    }
    return all;
}

// Sites of one token: g (b, m), and x (b, n) or null for a bias (n = 1). total (at, m * n) +=
// rint(inverse_step * sum_i c_i g_i x_i^T). scratch: the largest m * n doubles.
void step_sums(i64 sites, i64 b, const float *const *g, const float *const *x, const i64 *m,
               const i64 *n, const double *gamma, const double *error, double bound, double share,
               double inverse_step, float *c, double *scratch, i64 *const *total) {
    for (i64 i = 0; i < b; i++) {
        Sum sum;
        for (i64 s = 0; s < sites; s++) {
            double n2 = squares(g[s] + i * m[s], m[s]);
            if (x[s]) n2 *= squares(x[s] + i * n[s], n[s]);
            sum.add(n2, n2, gamma[s], error[s], !x[s]);
        }
        bool counts;
        c[i] = sum.factor(bound, share, counts);
    }
    for (i64 s = 0; s < sites; s++) {
        const i64 rows = m[s], width = n[s];
        for (i64 j = 0; j < rows * width; j++) scratch[j] = 0;
        for (i64 i = 0; i < b; i++) {
            if (c[i] == 0) continue;  // what it holds may not be multiplied
            const float *each = g[s] + i * rows;
            const double factor = c[i];
            if (!x[s]) {
                for (i64 r = 0; r < rows; r++) scratch[r] += factor * each[r];
                continue;
            }
            for (i64 r = 0; r < rows; r++)
                add(scratch + r * width, factor * each[r], x[s] + i * width, width);
        }
        for (i64 j = 0; j < rows * width; j++) {
            const double steps = std::rint(scratch[j] * inverse_step);
            if (std::fabs(steps) < LARGEST) total[s][j] += static_cast<i64>(steps);
        }
    }
}

}  // extern "C"
