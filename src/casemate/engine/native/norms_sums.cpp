// Sums over records, and the grid. Part of norms.cpp.

namespace {

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

// sum[j] += w[0] rows[0][j] + ..., in this order
template <int R>
void add_rows(const float *const *rows, const double *w, i64 count, double *sum) {
    constexpr i64 LINE = 16, AHEAD = 64, H = W / 2;
    i64 j = 0;
    for (; j + LINE <= count; j += LINE) {
        for (int r = 0; r < R; r++) __builtin_prefetch(rows[r] + j + AHEAD);
        for (i64 l = j; l < j + LINE; l += H) {
            vd s = load<vd>(sum + l);
            for (int r = 0; r < R; r++) s += w[r] * widen(rows[r] + l);
            store(sum + l, s);
        }
    }
    for (; j < count; j++)
        for (int r = 0; r < R; r++) sum[j] += w[r] * rows[r][j];
}

inline i64 grid_steps(double v) { return static_cast<i64>(std::fabs(v) < 0x1p62 ? v : 0.0); }

}  // namespace

extern "C" {

void norms_accumulate(i64 *total, const float *part, i64 d, double inverse_step) {
    for (i64 j = 0; j < d; j++) {
        total[j] += grid_steps(std::rint(part[j] * inverse_step));
    }
}

void norms_finish(const i64 *total, i64 d, double factor, float *out) {
    for (i64 j = 0; j < d; j++)
        out[j] = static_cast<float>(static_cast<double>(total[j]) * factor);
}

// Products of float32 are exact in float64; one rounding at the end. Runs of rows that are long and
// few keep up with memory.
void norms_weighted_sum(const float *formed, i64 b, i64 n, const float *c, float *out) {
    constexpr i64 PART = 8192;
    double sum[PART];
    for (i64 first = 0; first < n; first += PART) {
        const i64 count = n - first < PART ? n - first : PART;
        for (i64 j = 0; j < count; j++) sum[j] = 0;
        for (i64 i = 0; i < b;) {
            const float *rows[4];
            double w[4];
            int k = 0;
            for (; i < b && k < 4; i++) {
                if (c[i] == 0) continue;
                rows[k] = formed + i * n + first;
                w[k++] = c[i];
            }
            (k == 4 ? add_rows<4> : k == 3 ? add_rows<3> : k == 2 ? add_rows<2> : add_rows<1>)(
                rows, w, k ? count : 0, sum);
        }
        for (i64 j = 0; j < count; j++) out[first + j] = static_cast<float>(sum[j]);
    }
}

// out (m, n) = sum_t c[t / per] g_t x_t^T for g (N, m), x (N, n); tokens not kept count as zeros.
// float32 over `chunk` tokens, whose sums are then added in order, in float32.
int norms_contract(const float *g, const float *x, i64 N, i64 m, i64 n, const float *c,
                   const uint8_t *keep, i64 per, i64 chunk, float *out) {
    const i64 width = up(n, W), some = chunk < N ? chunk : N;
    const i64 most = rows_for(vectors_for(width / W));
    float *px = scratch[0].get<float>(some * width);
    float *pg = scratch[1].get<float>(some * m + (m / most + 1) * W);
    float *weight = scratch[2].get<float>(some);
    uint8_t *kept = scratch[3].get<uint8_t>(some);
    if (!px || !pg || !weight || !kept) return -1;
    alignas(64) float part[BLOCK];
    for (i64 start = 0; start < N; start += chunk) {
        const i64 here = N - start < chunk ? N - start : chunk;
        for (i64 t = 0; t < here; t++) {
            const i64 unit = (start + t) / per;
            weight[t] = c[unit];
            kept[t] = keep[unit];
        }
        pack_vectors(x + start * n, here, n, kept, px);
        pack_scalars(g + start * m, here, m, most, weight, kept, pg);
        for (i64 first = 0; first < width;) {
            const int k = vectors_for((width - first) / W);
            const float *block = pg;
            for (i64 r = 0; r < m;) {
                const int rows = static_cast<int>(block_size(m - r, most));
                const auto run = choose<Packed, float>(rows, k);
                float *to = out + r * n + first;
                if (first + k * W <= n) {
                    run(here, block, px + first * here, to, n, start > 0);
                } else {
                    run(here, block, px + first * here, part, k * W, false);
                    add_tile(part, rows, n - first, k * W, to, n, start == 0);
                }
                block += here * rows + W;
                r += rows;
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
                        float *to = sum + r * width + first;
                        fetch(to, width, block, n * W);
                        choose<float>(block, n)(count, rows, table + t, pg + first, across + t,
                                                part);
                        add_tile(part, block, n * W, n * W, to, width, start == 0 && t == 0);
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

}
