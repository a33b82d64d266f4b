// Matrix products: packed panels, tiles in registers (norms_tile.cpp, norms_panels.cpp).
//
// An entry is the sum over k in order, in runs of DEEP, by one chain of multiply-adds: its bits
// depend on its row, its column and the shapes alone, not on which row of the batch it stands in.

namespace {

constexpr i64 DEEP = 256;      // terms in a panel
constexpr i64 ACROSS = 1024;   // columns of B packed at once: with DEEP, 1 MiB
constexpr i64 DOWN = 96;       // rows of A packed at once

// A matrix as it lies: entry (r, c) at data[r * rows + c * columns].
struct Matrix {
    const float *data;
    i64 rows, columns;
};

// count x vectors of B from (k, c), one after the other; zeros beyond n.
void pack_columns(const Matrix &b, i64 k, i64 count, i64 c, i64 columns, i64 width, float *to) {
    const float *from = b.data + k * b.rows + c * b.columns;
    if (b.columns == 1) {
        for (i64 t = 0; t < count; t++, from += b.rows, to += width) {
            std::memcpy(to, from, sizeof(float) * columns);
            std::memset(to + columns, 0, sizeof(float) * (width - columns));
        }
        return;
    }
    if (b.rows == 1) {   // turned: columns lie in a row
        transpose(from, b.columns, columns, count, to, width);
        if (columns < width)
            for (i64 t = 0; t < count; t++)
                std::memset(to + t * width + columns, 0, sizeof(float) * (width - columns));
        return;
    }
    for (i64 t = 0; t < count; t++)
        for (i64 j = 0; j < width; j++)
            to[t * width + j] = j < columns ? from[t * b.rows + j * b.columns] : 0.0f;
}

// `size` rows of A from r, terms k .. k + count, term by term.
void pack_rows(const Matrix &a, i64 r, i64 size, i64 k, i64 count, float *to) {
    const float *from = a.data + r * a.rows + k * a.columns;
    for (i64 t = 0; t < count; t++)
        for (i64 i = 0; i < size; i++) to[t * size + i] = from[i * a.rows + t * a.columns];
}

// out (m, n), rows `ld` apart, += a (m, k) b (k, n); beta 0: it is overwritten.
void multiply(i64 m, i64 n, i64 k, const Matrix &a, const Matrix &b, float *out, i64 ld, bool add) {
    if (!m || !n) return;
    if (!k) {
        for (i64 r = 0; !add && r < m; r++) std::memset(out + r * ld, 0, sizeof(float) * n);
        return;
    }
    float *pb = scratch[4].get<float>(DEEP * ACROSS), *pa = scratch[5].get<float>(DEEP * (DOWN + W));
    demand(pb && pa, "memory: none left\n");
    alignas(64) float part[BLOCK];
    for (i64 first = 0; first < n; first += ACROSS) {
        const i64 columns = std::min(ACROSS, n - first);
        for (i64 start = 0; start < k; start += DEEP) {
            const i64 deep = std::min(DEEP, k - start);
            const bool more = add || start > 0;
            float *panel = pb;
            for (i64 c = 0; c < columns;) {
                const i64 width = vectors_for(up(columns - c, W) / W) * W;
                pack_columns(b, start, deep, first + c, std::min(width, columns - c), width, panel);
                panel += deep * width;
                c += width;
            }
            for (i64 top = 0; top < m; top += DOWN) {
                const i64 high = std::min(DOWN, m - top);
                panel = pb;
                i64 packed_for = 0;
                for (i64 c = 0; c < columns;) {
                    const int vectors = vectors_for(up(columns - c, W) / W);
                    const i64 most = rows_for(vectors), width = vectors * W;
                    if (packed_for != most) {
                        float *to = pa;
                        for (i64 r = 0; r < high;) {
                            const i64 size = block_size(high - r, most);
                            pack_rows(a, top + r, size, start, deep, to);
                            to += size * deep;
                            r += size;
                        }
                        packed_for = most;
                    }
                    const float *rows = pa;
                    for (i64 r = 0; r < high;) {
                        const int size = static_cast<int>(block_size(high - r, most));
                        const auto run = choose<Packed, float>(size, vectors);
                        float *to = out + (top + r) * ld + first + c;
                        if (c + width <= columns) {
                            run(deep, rows, panel, to, ld, more);
                        } else {
                            run(deep, rows, panel, part, width, false);
                            add_tile(part, size, columns - c, width, to, ld, !more);
                        }
                        rows += size * deep;
                        r += size;
                    }
                    panel += deep * width;
                    c += width;
                }
            }
        }
    }
}

Matrix matrix(Tensor *t, i64 rows, i64 columns, i64 d = 0) {
    demand(t->type == F32 && t->dims == d + 2 && t->sizes[d] == rows && t->sizes[d + 1] == columns,
           "product: operands that do not fit\n");
    return {reinterpret_cast<float *>(t->data()), t->strides[d], t->strides[d + 1]};
}

// A result whose rows or columns lie in order; `turned` when it is the columns.
void into(Tensor *out, i64 d, const Matrix &a, const Matrix &b, i64 k, float *to, bool add) {
    const i64 m = out->sizes[d], n = out->sizes[d + 1];
    if (out->strides[d + 1] == 1 || n == 1) {
        multiply(m, n, k, a, b, to, out->strides[d], add);
    } else {
        demand(out->strides[d] == 1 || m == 1, "product: a result of no such strides\n");
        multiply(n, m, k, {b.data, b.columns, b.rows}, {a.data, a.columns, a.rows}, to,
                 out->strides[d + 1], add);
    }
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {
    demand(out->dims == 2 && a->dims == 2, "product: operands that do not fit\n");
    const i64 m = out->sizes[0], n = out->sizes[1], k = a->sizes[1];
    into(out, 0, matrix(a, m, k), matrix(b, k, n), k, data_of<float>(out, F32), false);
    return 0;
}

// out = beta * self + alpha * a b; self (n,) or (m, n), beta and alpha 1 (0: without self).
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                        AtenTensorHandle a, AtenTensorHandle b, double beta,
                                        double alpha) {
    demand(out->dims == 2 && a->dims == 2 && alpha == 1 && (beta == 1 || beta == 0),
           "product: a form that the runtime does not have\n");
    const i64 m = out->sizes[0], n = out->sizes[1], k = a->sizes[1];
    float *to = data_of<float>(out, F32);
    if (beta != 0) {
        const float *from = data_of<float>(self, F32);
        const i64 d = self->dims;
        demand((d == 1 || d == 2) && (self->sizes[d - 1] == n || self->sizes[d - 1] == 1) &&
                   (d == 1 || self->sizes[0] == m || self->sizes[0] == 1),
               "product: operands that do not fit\n");
        const i64 down = d == 1 || self->sizes[0] == 1 ? 0 : self->strides[0];
        const i64 along = self->sizes[d - 1] == 1 ? 0 : self->strides[d - 1];
        for (i64 r = 0; r < m; r++)
            for (i64 c = 0; c < n; c++)
                to[r * out->strides[0] + c * out->strides[1]] = from[r * down + c * along];
    }
    into(out, 0, matrix(a, m, k), matrix(b, k, n), k, to, beta != 0);
    return 0;
}

AOTITorchError aoti_torch_cpu_bmm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {
    demand(out->dims == 3 && a->dims == 3 && b->dims == 3 && a->sizes[0] == out->sizes[0] &&
               b->sizes[0] == out->sizes[0],
           "product: operands that do not fit\n");
    const i64 m = out->sizes[1], n = out->sizes[2], k = a->sizes[2];
    Matrix left = matrix(a, m, k, 1), right = matrix(b, k, n, 1);
    float *to = data_of<float>(out, F32);
    for (i64 i = 0; i < out->sizes[0]; i++) {
        into(out, 1, left, right, k, to, false);
        left.data += a->strides[0];
        right.data += b->strides[0];
        to += out->strides[0];
    }
    return 0;
}

}  // extern "C"
