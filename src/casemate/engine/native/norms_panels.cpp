// Dense products of packed operands: sums over many tokens, Gram matrices. Part of norms.cpp.

namespace {

// to[r][l] (+)= sum_k a[k * na + r] * b[k * nb + l], R rows, N vectors, `count` terms.
template <class E, int R, int N>
__attribute__((always_inline)) inline void cells(i64 count, const E *a, i64 na, const E *b, i64 nb,
                                                 E *to, i64 ld, bool add) {
    typedef typename lanes<E>::vec V;
    constexpr int L = lanes<E>::n;
    V s[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) s[r][n] = V{};
    for (i64 k = 0; k < count; k++, a += na, b += nb) {
        V v[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) v[n] = load<V>(b + n * L);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const E x = a[r];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) s[r][n] += v[n] * x;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            E *p = to + r * ld + n * L;
            store(p, add ? load<V>(p) + s[r][n] : s[r][n]);
        }
}

// Of packed operands: rows of R and of N vectors, one after the other.
template <int R, int N>
void packed(i64 count, const float *a, const float *b, float *to, i64 ld, bool add) {
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) __builtin_prefetch(to + r * ld + n * W, 1);
    cells<float, R, N>(count, a, R, b, N * W, to, ld, add);
}

struct Packed {
    template <class>
    using door = void (*)(i64, const float *, const float *, float *, i64, bool);
    template <class, int R, int N>
    static constexpr door<float> at = packed<R, N>;
};

// Blocks of vectors of the rows of x (count, n), one after the other; zeros for what is not kept.
// What stands in lanes beyond n is of no account.
void pack_vectors(const float *x, i64 count, i64 n, const uint8_t *kept, float *to) {
    const i64 width = up(n, W);
    for (i64 t = 0; t < count; t++)
        for (i64 first = 0; first < width;) {
            const i64 size = vectors_for((width - first) / W) * W;
            const float *from = x + t * n + first;
            float *p = to + first * count + t * size;
            if (kept[t] && from + size <= x + count * n) {
                for (i64 l = 0; l < size; l += W) store(p + l, load<vf>(from + l));
            } else {
                for (i64 l = 0; l < size; l++) p[l] = kept[t] && first + l < n ? from[l] : 0;
            }
            first += size;
        }
}

// to[t * size + j] = weight[t] * from[t * ld + j], j < size; zeros for what is not kept. Lanes beyond
// `size` are read, up to `limit`, and written: by the next token's again, or behind the block.
template <class V>
void pack_block(const float *from, i64 ld, const float *limit, i64 start, i64 end, i64 size,
                const float *weight, const uint8_t *kept, float *to) {
    constexpr i64 L = sizeof(V) / sizeof(float);
    for (i64 t = start; t < end; t++) {
        const float *p = from + t * ld;
        float *q = to + t * size;
        if (kept[t] && limit - p >= up(size, L)) {
            for (i64 j = 0; j < size; j += L) store(q + j, load<V>(p + j) * weight[t]);
        } else {
            for (i64 j = 0; j < size; j++) q[j] = kept[t] ? weight[t] * p[j] : 0;
        }
    }
}

// Blocks of at most `most` columns of g (count, m), tokens times their weights, a vector's room
// behind each block; zeros for what is not kept.
void pack_scalars(const float *g, i64 count, i64 m, i64 most, const float *weight,
                  const uint8_t *kept, float *to) {
    constexpr i64 SOME = 8;   // tokens at a time, so that lines are read whole
    for (i64 start = 0; start < count; start += SOME) {
        const i64 end = start + SOME < count ? start + SOME : count;
        float *block = to;
        for (i64 r = 0; r < m;) {
            const i64 size = block_size(m - r, most);
            (size <= W / 2 ? pack_block<vh> : pack_block<vf>)(g + r, m, g + count * m, start, end,
                                                              size, weight, kept, block);
            block += count * size + W;
            r += size;
        }
    }
}

// ---- out[r][l] = sum_k a[k * ld + r] * b[k * ld + l], float64 ----
template <class E>
constexpr int PANEL = NARROW * lanes<E>::n;   // tokens side by side

template <class E, int R, int N>
void dots(i64 count, const E *a, const E *b, i64 ld, double *out) {
    constexpr int L = lanes<E>::n;
    constexpr bool LONG = sizeof(E) == 8;
    alignas(64) E sum[R * N * L];
    for (i64 k = 0, from = 0; k < count || k == 0; from = k) {
        const i64 end = LONG || count - k < RUN * RUNS ? count : k + RUN * RUNS;
        do {
            const i64 here = LONG || end - k < RUN ? end - k : RUN;
            cells<E, R, N>(here, a + k * ld, ld, b + k * ld, ld, sum, N * L, k > from);
            k += here;
        } while (k < end);
        if (from == 0)
            for (int j = 0; j < R * N * L; j++) out[j] = sum[j];
        else
            for (int j = 0; j < R * N * L; j++) out[j] += sum[j];
        if (k == 0) break;
    }
}

struct Dots {
    template <class E>
    using door = void (*)(i64, const E *, const E *, i64, double *);
    template <class E, int R, int N>
    static constexpr door<E> at = dots<E, R, N>;
};

// Tokens of x (T, n) in panels: to[T / panel][n][panel], zeros beyond the last token.
void pack_tokens(const float *x, i64 T, i64 n, i64 panel, float *to) {
    for (i64 t = 0; t < T; t += panel, to += n * panel) {
        const i64 rows = T - t < panel ? T - t : panel;
        transpose(x + t * n, n, rows, n, to, panel);
        zero_columns(to, n, panel, rows, panel);
    }
}

// sum of x[j] g[j] w, j < rows * N * L; w = first for the first vector of a row, 2 for the others.
double pair_dot(int rows, int vectors, int lanes, const double *x, const double *g, double first) {
    constexpr int H = W / 2;
    vd one = {}, others = {};
    for (int i = 0; i < rows; i++) {
        int l = 0;
        for (; l < lanes; l += H, x += H, g += H) one += load<vd>(x) * load<vd>(g);
        for (; l < lanes * vectors; l += H, x += H, g += H) others += load<vd>(x) * load<vd>(g);
    }
    return first * total(one) + 2 * total(others);
}

// sum over t, s of (x_t . x_s)(g_t . g_s), from panels: the squares of L tokens on the diagonal, and
// what is above them twice.
template <class E>
double pair_sum(i64 T, i64 P, const E *x, i64 n, const E *g, i64 m) {
    constexpr int L = lanes<E>::n;
    alignas(64) double bx[BLOCK], bg[BLOCK];
    double sum = 0;
    for (i64 s = 0; s < T; s += P) {
        const E *cx = x + s * n, *cg = g + s * m;
        const i64 columns = T - s < P ? T - s : P;
        const int vectors = static_cast<int>((columns + L - 1) / L);
        const auto rows = [&](i64 panel, i64 r, i64 end, int skip, double first) {
            const int across = vectors - skip;
            while (r < end) {
                const int count = static_cast<int>(block_size(end - r, rows_for(across)));
                const auto run = choose<Dots, E>(count, across);
                run(n, x + panel * n + r, cx + skip * L, P, bx);
                run(m, g + panel * m + r, cg + skip * L, P, bg);
                sum += pair_dot(count, across, L, bx, bg, first);
                r += count;
            }
        };
        for (i64 t = 0; t < s; t += P) rows(t, 0, P, 0, 2);
        for (int v = 0; v < vectors; v++)
            rows(s, v * L, columns < (v + 1) * L ? columns : (v + 1) * L, v, 1);
    }
    return sum;
}

template <class E>
double pair_of(const float *x, const float *g, i64 T, i64 n, i64 m) {
    const i64 P = T <= PANEL<E> / NARROW ? PANEL<E> / NARROW : PANEL<E>;
    const i64 size = (n + m) * up(T, P);
    float *px = scratch[0].get<float>(size);
    if (!px) return NAN;
    float *pg = px + n * up(T, P);
    pack_tokens(x, T, n, P, px);
    pack_tokens(g, T, m, P, pg);
    if constexpr (sizeof(E) == 4) {
        return pair_sum<E>(T, P, px, n, pg, m);
    } else {
        E *wide = scratch[1].get<E>(size);
        if (!wide) return NAN;
        for (i64 j = 0; j < size; j++) wide[j] = px[j];
        return pair_sum<E>(T, P, wide, n, wide + (pg - px), m);
    }
}

}  // namespace
