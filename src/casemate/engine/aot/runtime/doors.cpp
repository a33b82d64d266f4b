// What the step's norms and sums are called by (casemate/engine/aot/doors.py writes the doors
// themselves): operands are checked against what the kernels of native/norms.cpp read.

namespace {

// A dense operand, as the type that a kernel takes; null where there is none.
struct Operand {
    Tensor *t;
    template <class E>
    operator const E *() const {
        if (!t) return nullptr;
        constexpr int32_t type = std::is_same_v<E, float> ? F32 : std::is_same_v<E, i64> ? I64 : BOOL;
        return data_of<E>(t, type);
    }
};

Operand operand(AtenTensorHandle *handle, __int128 entries) {
    Tensor *t = handle ? *handle : nullptr;
    demand(!t || (t->dense() && t->count() >= entries && entries >= 0),
           "kernel: an operand smaller than its shape\n");
    return {t};
}

// A convolution's shape (kernels/compiled.py, _shape) against its operands' memory.
struct Window {
    Geometry q;
    const Tensor *x, *g;
    Operand operand(AtenTensorHandle *handle) const {
        Tensor *t = *handle;
        if (t == x) covers(t, q.C, q.in, q.xs);
        if (t == g) covers(t, q.O, q.out, q.gs);
        return t == x || t == g ? Operand{t} : ::operand(handle, q.b);   // else by record
    }
    void covers(const Tensor *t, i64 channels, const i64 *space, const i64 *steps) const {
        __int128 last = t->offset;
        const i64 sizes[5] = {q.b, channels, space[0], space[1], space[2]};
        for (int d = 0; d < 5; d++) {
            demand(sizes[d] > 0 && steps[d] >= 0, "kernel: a window of no such form\n");
            last += static_cast<__int128>(sizes[d] - 1) * steps[d];
        }
        demand(t->type == F32 && (last + 1) * 4 <= t->storage->bytes,
               "kernel: an operand smaller than its shape\n");
    }
    i64 result(char kind) const {
        return kind == 'e' ? q.b : q.b * weights();
    }
    i64 weights() const { return q.O * (q.C / q.groups) * q.K(); }
};

Window window_of(const int64_t *shape, int64_t count, AtenTensorHandle *x, AtenTensorHandle *g) {
    demand(count == 32, "kernel: a window of no such form\n");
    Window w{{}, *x, *g};
    std::memcpy(&w.q, shape, sizeof w.q);
    const Geometry &q = w.q;
    demand(q.C > 0 && q.O > 0 && q.groups > 0 && q.C % q.groups == 0 && q.O % q.groups == 0,
           "kernel: a window of no such form\n");
    for (int d = 0; d < 3; d++)
        demand(q.kernel[d] > 0 && q.stride[d] > 0 && q.dil[d] > 0 && q.pad[d] >= 0 && q.out[d] > 0 &&
                   q.wide(d) <= q.in[d] + 2 * q.pad[d],
               "kernel: a window of no such form\n");
    return w;
}

// A dense result of these sizes, zeros; null where none is wanted.
template <class E>
E *result(const int64_t **sizes, int64_t dims, __int128 entries, AtenTensorHandle *made) {
    constexpr int32_t type = std::is_same_v<E, float> ? F32 : std::is_same_v<E, double> ? F64 : I64;
    const int64_t none[1] = {0};
    Tensor *t = *made = dense(sizes ? dims : 1, sizes ? *sizes : none, type);
    if (!sizes) return nullptr;
    demand(t->count() >= entries, "kernel: a result smaller than its shape\n");
    std::memset(t->data(), 0, static_cast<size_t>(t->count()) * sizeof(E));
    return reinterpret_cast<E *>(t->data());
}

// Rows that an index names lie in a table of so many entries.
void inside_table(const i64 *index, i64 count, i64 padding, i64 width, i64 entries) {
    demand(width > 0, "kernel: a table of no such form\n");
    for (i64 i = 0; i < count; i++)
        demand(index[i] == padding || (index[i] >= 0 && index[i] < entries / width),
               "kernel: an index beyond its table\n");
}

}  // namespace
