// Convolutions in 1 to 3 dimensions, a record at a time: its result depends on no other record.
//
// Forward: tiles of output positions by output channels over the padded planes (norms_windows.cpp).
// By the input: where strides are 1, the same with the kernel turned round; else the products of
// output gradients and weights, added where each tap stands.

namespace {

// Of record, channel and three axes of space; axes of one entry continue the next.
void strides_of(const Tensor *t, const i64 *space, i64 *to) {
    const i64 lead = 5 - t->dims;
    to[0] = t->strides[0];
    to[1] = t->strides[1];
    for (i64 d = 2; d >= 0; d--)
        to[2 + d] = space[d] > 1 ? t->strides[2 + d - lead] : d < 2 ? to[3 + d] * space[d + 1] : 1;
}

// A convolution of x (b, C, *in) by w (O, C / groups, *kernel) to y (b, O, *out).
Geometry window(const Tensor *x, const Tensor *w, const Tensor *y, const int64_t *stride,
                const int64_t *padding, const int64_t *dilation, int64_t groups) {
    const i64 dims = x->dims - 2, lead = 3 - dims;
    demand(dims >= 1 && dims <= 3 && w->dims == x->dims && y->dims == x->dims && groups > 0 &&
               x->type == F32 && w->type == F32 && y->type == F32 && w->dense(),
           "convolution: a form that the runtime does not have\n");
    Geometry q;
    q.b = x->sizes[0];
    q.C = x->sizes[1];
    q.O = y->sizes[1];
    q.groups = groups;
    for (i64 d = 0; d < 3; d++) {
        const bool there = d >= lead;
        const i64 i = d - lead;
        q.in[d] = there ? x->sizes[2 + i] : 1;
        q.out[d] = there ? y->sizes[2 + i] : 1;
        q.kernel[d] = there ? w->sizes[2 + i] : 1;
        q.stride[d] = there ? stride[i] : 1;
        q.pad[d] = there ? padding[i] : 0;
        q.dil[d] = there ? dilation[i] : 1;
        demand(q.kernel[d] > 0 && q.stride[d] > 0 && q.pad[d] >= 0 && q.dil[d] > 0 &&
                   q.wide(static_cast<int>(d)) <= q.in[d] + 2 * q.pad[d],
               "convolution: a window beyond its input\n");
    }
    demand(q.b == y->sizes[0] && q.C % groups == 0 && q.O % groups == 0 && w->sizes[0] == q.O &&
               w->sizes[1] == q.C / groups,
           "convolution: operands that do not fit\n");
    strides_of(x, q.in, q.xs);
    strides_of(y, q.out, q.gs);
    flatten(q);
    return q;
}

// w (O, c, K) of a group as (c * K, o): by input entry, output channels in vectors. turned: by
// output channel and turned tap, input channels in vectors, (o * K, c).
void columns_of(const float *w, i64 o, i64 c, i64 K, i64 width, bool turned, float *to) {
    std::memset(to, 0, sizeof(float) * (turned ? o : c) * K * width);
    for (i64 i = 0; i < o; i++)
        for (i64 j = 0; j < c; j++)
            for (i64 k = 0; k < K; k++) {
                const float v = w[(i * c + j) * K + k];
                if (turned) to[(i * K + K - 1 - k) * width + j] = v;
                else to[(j * K + k) * width + i] = v;
            }
}

// One channel by itself: sum over taps of rows of the padded plane.
void depthwise(const Geometry &q, const float *plane, const float *w, float bias, float *out) {
    const i64 h = q.wide(1), wide = q.wide(2), n = q.out[2];
    i64 at = 0;
    for (i64 a = 0; a < q.out[0]; a++)
        for (i64 i = 0; i < q.out[1]; i++, at += n) {
            float *to = out + at;
            for (i64 j = 0; j < n; j++) to[j] = bias;
            const float *tap = w;
            for (i64 ka = 0; ka < q.kernel[0]; ka++)
                for (i64 ki = 0; ki < q.kernel[1]; ki++)
                    for (i64 kj = 0; kj < q.kernel[2]; kj++, tap++) {
                        const float *row = plane + ((a * q.stride[0] + ka * q.dil[0]) * h +
                                                    i * q.stride[1] + ki * q.dil[1]) * wide +
                                           kj * q.dil[2];
                        const float v = *tap;
                        if (q.stride[2] == 1)
                            for (i64 j = 0; j < n; j++) to[j] += row[j] * v;
                        else
                            for (i64 j = 0; j < n; j++) to[j] += row[j * q.stride[2]] * v;
                    }
        }
}

// y (one record, strides q.gs) = the convolution of x (one record, strides q.xs).
// columns: per group (ci * K, width); bias may be null.
void forward(const Geometry &q, const float *x, const float *columns, const float *bias, float *y) {
    const i64 T = q.T(), K = q.K(), ci = q.C / q.groups, o = q.O / q.groups, width = up(o, W);
    const i64 size = q.reached(), terms = ci * K;
    float *px = scratch[0].get<float>(ci * size), *made = scratch[1].get<float>(T * width);
    i64 *table = scratch[2].get<i64>(T + K + 2 * terms);
    demand(px && made && table, "memory: none left\n");
    i64 *at = table, *tap = at + T, *from = tap + K, *across = from + terms;
    positions(q, 1, at, tap);
    for (i64 k = 0; k < terms; k++) {
        from[k] = k / K * size + tap[k % K];
        across[k] = k * width;
    }
    alignas(64) float part[BLOCK];
    const float *rows[ROWS];
    for (i64 group = 0; group < q.groups; group++, columns += terms * width) {
        planes(q, x, group * ci, ci, size, px);
        for (i64 first = 0; first < width;) {
            const int n = vectors_for((width - first) / W);
            for (i64 t = 0; t < T;) {
                const int block = static_cast<int>(block_size(T - t, rows_for(n)));
                for (int j = 0; j < block; j++) rows[j] = px + at[t + j];
                const auto run = choose<float>(block, n);
                for (i64 k = 0; k < terms; k += DEEP) {
                    run(std::min(DEEP, terms - k), rows, from + k, columns + first, across + k, part);
                    add_tile(part, block, n * W, n * W, made + t * width + first, width, k == 0);
                }
                t += block;
            }
            first += n * W;
        }
        if (bias)
            for (i64 t = 0; t < T; t++)
                for (i64 j = 0; j < o; j++) made[t * width + j] += bias[group * o + j];
        float *to = y + group * o * q.gs[1];
        if (q.gs[4] == 1 && q.gs[3] == q.out[2] && q.gs[2] == q.out[1] * q.out[2])
            transpose(made, width, T, o, to, q.gs[1]);
        else
            for (i64 t = 0; t < T; t++) {
                const i64 a = t / (q.out[1] * q.out[2]), i = t / q.out[2] % q.out[1], j = t % q.out[2];
                float *p = to + a * q.gs[2] + i * q.gs[3] + j * q.gs[4];
                for (i64 c = 0; c < o; c++) p[c * q.gs[1]] = made[t * width + c];
            }
    }
}

bool apart(const Geometry &q) { return q.C == q.groups && q.O == q.groups && q.groups > 1; }

void by_output(const Geometry &q, const float *x, const float *w, const float *bias, float *y) {
    const i64 ci = q.C / q.groups, o = q.O / q.groups, width = up(o, W), K = q.K();
    if (apart(q)) {
        float *plane = scratch[0].get<float>(q.reached()), *made = scratch[1].get<float>(q.T());
        demand(plane && made, "memory: none left\n");
        for (i64 i = 0; i < q.b; i++)
            for (i64 c = 0; c < q.C; c++) {
                planes(q, x + i * q.xs[0], c, 1, q.reached(), plane);
                depthwise(q, plane, w + c * K, bias ? bias[c] : 0.0f, made);
                float *to = y + i * q.gs[0] + c * q.gs[1];
                const float *p = made;
                for (i64 a = 0; a < q.out[0]; a++)
                    for (i64 r = 0; r < q.out[1]; r++)
                        for (i64 j = 0; j < q.out[2]; j++)
                            to[a * q.gs[2] + r * q.gs[3] + j * q.gs[4]] = *p++;
            }
        return;
    }
    float *columns = scratch[3].get<float>(q.groups * ci * K * width);
    demand(columns, "memory: none left\n");
    for (i64 g = 0; g < q.groups; g++)
        columns_of(w + g * o * ci * K, o, ci, K, width, false, columns + g * ci * K * width);
    for (i64 i = 0; i < q.b; i++) forward(q, x + i * q.xs[0], columns, bias, y + i * q.gs[0]);
}

// x (strides q.xs) = the gradient by the input, of g (strides q.gs).
void by_input(const Geometry &q, const float *g, const float *w, const float *bias, float *x) {
    const i64 ci = q.C / q.groups, o = q.O / q.groups, K = q.K(), T = q.T(), size = q.reached();
    Geometry back = q;
    std::swap(back.C, back.O);
    std::swap(back.xs, back.gs);
    bool plain = !apart(q);
    for (int d = 0; d < 3; d++) {
        std::swap(back.in[d], back.out[d]);
        back.pad[d] = q.dil[d] * (q.kernel[d] - 1) - q.pad[d];
        plain = plain && q.stride[d] == 1 && back.pad[d] >= 0;
    }
    if (plain) {
        const i64 width = up(ci, W);
        float *columns = scratch[3].get<float>(q.groups * o * K * width);
        demand(columns, "memory: none left\n");
        for (i64 group = 0; group < q.groups; group++)
            columns_of(w + group * o * ci * K, o, ci, K, width, true,
                       columns + group * o * K * width);
        for (i64 i = 0; i < q.b; i++)
            forward(back, g + i * back.xs[0], columns, bias, x + i * back.gs[0]);
        return;
    }
    i64 *at = scratch[2].get<i64>(T + K), *tap = at + T;
    float *made = scratch[0].get<float>(T * K), *plane = scratch[1].get<float>(size);
    float *rows = scratch[3].get<float>(o * T);
    demand(at && made && plane && rows, "memory: none left\n");
    positions(q, 1, at, tap);
    i64 lo[3], hi[3];
    for (int d = 0; d < 3; d++) inside(q, d, lo + d, hi + d);
    for (i64 i = 0; i < q.b; i++)
        for (i64 group = 0; group < q.groups; group++) {
            for (i64 j = 0, n = 0; j < o; j++)
                for (i64 a = 0; a < q.out[0]; a++)
                    for (i64 r = 0; r < q.out[1]; r++)
                        for (i64 c = 0; c < q.out[2]; c++)
                            rows[n++] = g[i * q.gs[0] + (group * o + j) * q.gs[1] + a * q.gs[2] +
                                          r * q.gs[3] + c * q.gs[4]];
            for (i64 c = 0; c < ci; c++) {
                // (K, T) = w (K, o) g (o, T)
                const float *mine = w + (group * o * ci + c) * K;
                multiply(K, T, o, {mine, 1, ci * K}, {rows, T, 1}, made, T, false);
                std::memset(plane, 0, sizeof(float) * size);
                for (i64 k = 0; k < K; k++)
                    for (i64 t = 0; t < T; t++) plane[at[t] + tap[k]] += made[k * T + t];
                float *to = x + i * q.xs[0] + (group * ci + c) * q.xs[1];
                const float add = bias ? bias[group * ci + c] : 0.0f;
                for (i64 a = 0; a < q.in[0]; a++)
                    for (i64 r = 0; r < q.in[1]; r++)
                        for (i64 j = 0; j < q.in[2]; j++) {
                            const i64 pa = a + q.pad[0], pr = r + q.pad[1], pj = j + q.pad[2];
                            const bool seen = pa < hi[0] && pr < hi[1] && pj < hi[2];
                            to[a * q.xs[2] + r * q.xs[3] + j * q.xs[4]] =
                                (seen ? plane[(pa * q.wide(1) + pr) * q.wide(2) + pj] : 0.0f) + add;
                        }
            }
        }
}

const float *bias_of(AtenTensorHandle *bias, i64 channels) {
    if (!bias) return nullptr;
    demand((*bias)->dims == 1 && (*bias)->sizes[0] == channels && (*bias)->dense(),
           "convolution: a bias that does not fit\n");
    return data_of<float>(*bias, F32);
}

// to = the convolution of `from` by w; `back`: the gradient by the input of one that makes `from`.
void run(bool back, Tensor *from, Tensor *w, const float *bias, const int64_t *stride,
         const int64_t *padding, const int64_t *dilation, int64_t groups, Tensor *to) {
    const Geometry q = window(back ? to : from, w, back ? from : to, stride, padding, dilation, groups);
    (back ? by_input : by_output)(q, data_of<float>(from, F32), data_of<float>(w, F32), bias,
                                  data_of<float>(to, F32));
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_convolution(
    AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle *bias, const int64_t *stride, int64_t,
    const int64_t *padding, int64_t, const int64_t *dilation, int64_t, int32_t transposed,
    const int64_t *extra, int64_t, int64_t groups, AtenTensorHandle *made) {
    const i64 dims = x->dims - 2;
    demand(dims >= 1 && dims <= 3 && w->dims == x->dims && groups > 0, "convolution: no such form\n");
    i64 sizes[5] = {x->sizes[0], transposed ? w->sizes[1] * groups : w->sizes[0]};
    for (i64 d = 0; d < dims; d++) {
        const i64 in = x->sizes[2 + d], reach = dilation[d] * (w->sizes[2 + d] - 1) + 1;
        demand(stride[d] > 0, "convolution: no such form\n");
        sizes[2 + d] = transposed ? (in - 1) * stride[d] - 2 * padding[d] + reach + extra[d]
                                  : (in + 2 * padding[d] - reach) / stride[d] + 1;
    }
    Tensor *y = *made = dense(x->dims, sizes, F32);
    run(transposed, x, w, bias_of(bias, sizes[1]), stride, padding, dilation, groups, y);
    return 0;
}

// By the input alone: what a weight's gradient is made of, the step takes apart by record.
AOTITorchError aoti_torch_cpu_convolution_backward(
    AtenTensorHandle g, AtenTensorHandle x, AtenTensorHandle w, const int64_t **, int64_t,
    const int64_t *stride, int64_t, const int64_t *padding, int64_t, const int64_t *dilation, int64_t,
    int32_t transposed, const int64_t *, int64_t, int64_t groups, const int32_t *wanted, int64_t,
    AtenTensorHandle *made, AtenTensorHandle *, AtenTensorHandle *) {
    demand(wanted[0] && !wanted[1] && !wanted[2], "convolution: sums over records\n");
    Tensor *to = *made = dense(x->dims, x->sizes, F32);
    run(!transposed, g, w, nullptr, stride, padding, dilation, groups, to);
    return 0;
}

}  // extern "C"
