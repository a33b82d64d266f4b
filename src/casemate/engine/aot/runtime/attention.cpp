// Scaled dot-product attention and its gradients, a record and a head at a time, in the form of
// ATen's _scaled_dot_product_flash_attention_for_cpu: out = softmax(scale q k^T + mask) v.

namespace {

struct Heads {
    i64 b, h, t, s, d, e;   // records, heads, queries, keys, their width, that of values
    float scale;
};

Heads heads(Tensor *q, Tensor *k, Tensor *v, double *scale) {
    demand(q->dims == 4 && k->dims == 4 && v->dims == 4, "attention: no such form\n");
    const Heads a{q->sizes[0], q->sizes[1], q->sizes[2], k->sizes[2], q->sizes[3], v->sizes[3],
                  static_cast<float>(scale ? *scale : 1.0 / std::sqrt(double(q->sizes[3])))};
    for (const Tensor *t : {k, v})
        demand(t->sizes[0] == a.b && t->sizes[1] == a.h && t->sizes[2] == a.s,
               "attention: operands that do not fit\n");
    demand(k->sizes[3] == a.d, "attention: operands that do not fit\n");
    return a;
}

Matrix head(Tensor *t, i64 b, i64 h) {
    return {data_of<float>(t, F32) + b * t->strides[0] + h * t->strides[1], t->strides[2],
            t->strides[3]};
}
Matrix turned(Matrix m) { return {m.data, m.columns, m.rows}; }

// p (t, s) = scale q k^T + mask; what comes after its own place left out where `causal`.
void scores(const Heads &a, Tensor *q, Tensor *k, AtenTensorHandle *mask, bool causal, i64 b, i64 h,
            float *p) {
    multiply(a.t, a.s, a.d, head(q, b, h), turned(head(k, b, h)), p, a.s, false);
    const Tensor *m = mask ? *mask : nullptr;
    const i64 sizes[4] = {a.b, a.h, a.t, a.s}, lead = m ? 4 - m->dims : 0;
    i64 steps[4] = {};   // none along an axis for all of which the mask is the same
    demand(!m || (m->type == F32 && (lead == 0 || lead == 2)), "attention: no such mask\n");
    for (i64 d = lead; m && d < 4; d++) {
        const i64 n = m->sizes[d - lead];
        demand(n == sizes[d] || n == 1, "attention: a mask that does not fit\n");
        steps[d] = n > 1 ? m->strides[d - lead] : 0;
    }
    const float *from =
        m ? reinterpret_cast<float *>(m->data()) + b * steps[0] + h * steps[1] : nullptr;
    for (i64 i = 0; i < a.t; i++)
        for (i64 j = 0; j < a.s; j++) {
            float &x = p[i * a.s + j];
            x *= a.scale;
            if (from) x += from[i * steps[2] + j * steps[3]];
            if (causal && j > i) x = -INFINITY;
        }
}

void write_head(const float *from, i64 rows, i64 width, Tensor *to, i64 b, i64 h) {
    float *p = data_of<float>(to, F32) + b * to->strides[0] + h * to->strides[1];
    for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < width; j++) p[i * to->strides[2] + j * to->strides[3]] = from[i * width + j];
}

Tensor *tokens_first(const Tensor *like) {   // (b, h, t, d) that lies as (b, t, h, d)
    const i64 h = like->sizes[1], t = like->sizes[2], d = like->sizes[3];
    const i64 strides[4] = {h * t * d, d, h * d, 1};
    return fresh(4, like->sizes, strides, F32);
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, double dropout, int32_t causal,
    AtenTensorHandle *mask, double *scale, AtenTensorHandle *made, AtenTensorHandle *logs) {
    const Heads a = heads(q, k, v, scale);
    demand(dropout == 0, "attention: dropout is an input of the step\n");
    Tensor *out = *made = fresh(4, q->sizes, q->strides, F32);
    const i64 sizes[3] = {a.b, a.h, a.t}, strides[3] = {a.t * a.h, 1, a.h};
    Tensor *log = *logs = fresh(3, sizes, strides, F32);
    demand(a.e == a.d, "attention: no such form\n");
    float *p = scratch[6].get<float>(a.t * a.s), *one = scratch[7].get<float>(a.t * a.e);
    demand(p && one, "memory: none left\n");
    for (i64 b = 0; b < a.b; b++)
        for (i64 h = 0; h < a.h; h++) {
            scores(a, q, k, mask, causal, b, h, p);
            for (i64 i = 0; i < a.t; i++) {
                float *row = p + i * a.s, top = -INFINITY, sum = 0;
                for (i64 j = 0; j < a.s; j++) top = std::max(top, row[j]);
                // What is masked is nothing, all of a row too; a NaN stays one.
                for (i64 j = 0; j < a.s; j++)
                    row[j] = row[j] == -INFINITY ? 0.0f : std::exp(row[j] - top);
                for (i64 j = 0; j < a.s; j++) sum += row[j];
                const float inverse = sum > 0 ? 1.0f / sum : sum == 0 ? 0.0f : NAN;
                for (i64 j = 0; j < a.s; j++) row[j] *= inverse;
                data_of<float>(log, F32)[b * strides[0] + h + i * a.h] = top + std::log(sum);
            }
            multiply(a.t, a.e, a.s, {p, a.s, 1}, head(v, b, h), one, a.e, false);
            write_head(one, a.t, a.e, out, b, h);
        }
    return 0;
}

AOTITorchError aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward(
    AtenTensorHandle g, AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v,
    AtenTensorHandle out, AtenTensorHandle logs, double dropout, int32_t causal,
    AtenTensorHandle *mask, double *scale, AtenTensorHandle *by_q, AtenTensorHandle *by_k,
    AtenTensorHandle *by_v) {
    const Heads a = heads(q, k, v, scale);
    demand(dropout == 0 && g->dims == 4 && out->dims == 4 && logs->dims == 3 && a.e == a.d,
           "attention: no such form\n");
    for (i64 d = 0; d < 4; d++)
        demand(g->sizes[d] == q->sizes[d] && out->sizes[d] == q->sizes[d] &&
                   (d == 3 || logs->sizes[d] == q->sizes[d]),
               "attention: operands that do not fit\n");
    *by_q = tokens_first(q);
    *by_k = tokens_first(k);
    *by_v = tokens_first(v);
    float *p = scratch[6].get<float>(2 * a.t * a.s);
    float *one = scratch[7].get<float>(std::max(a.t, a.s) * a.d);
    demand(p && one, "memory: none left\n");
    float *dp = p + a.t * a.s;
    for (i64 b = 0; b < a.b; b++)
        for (i64 h = 0; h < a.h; h++) {
            scores(a, q, k, mask, causal, b, h, p);
            const Matrix of_out = head(out, b, h), of_g = head(g, b, h);
            multiply(a.t, a.s, a.e, of_g, turned(head(v, b, h)), dp, a.s, false);
            for (i64 i = 0; i < a.t; i++) {
                const float log = data_of<float>(logs, F32)[b * logs->strides[0] +
                                                            h * logs->strides[1] + i * logs->strides[2]];
                float dot = 0;
                for (i64 j = 0; j < a.e; j++)
                    dot += of_g.data[i * of_g.rows + j * of_g.columns] *
                           of_out.data[i * of_out.rows + j * of_out.columns];
                for (i64 j = 0; j < a.s; j++) {
                    float &x = p[i * a.s + j], &y = dp[i * a.s + j];
                    x = log == -INFINITY ? 0.0f : std::exp(x - log);
                    y = x * (y - dot) * a.scale;
                }
            }
            multiply(a.s, a.e, a.t, {p, 1, a.s}, of_g, one, a.e, false);
            write_head(one, a.s, a.e, *by_v, b, h);
            multiply(a.t, a.d, a.s, {dp, a.s, 1}, head(k, b, h), one, a.d, false);
            write_head(one, a.t, a.d, *by_q, b, h);
            multiply(a.s, a.d, a.t, {dp, 1, a.s}, head(q, b, h), one, a.d, false);
            write_head(one, a.s, a.d, *by_k, b, h);
        }
    return 0;
}

}  // extern "C"
