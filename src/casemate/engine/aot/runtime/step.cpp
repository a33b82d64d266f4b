// One microbatch: the generated function over memory that the loop holds.

#include <torch/csrc/inductor/aoti_runtime/interface.h>

namespace {

i64 bytes_of(const Input &in) {
    i64 extent = 1;
    for (i64 d = 0; d < in.dims; d++) extent += (in.sizes[d] - 1) * in.strides[d];
    return extent * width_of(in.type);
}

// INPUTS, SUMS: what the generated step takes and gives (casemate/engine/aot/build.py).
class Step {
   public:
    Step() {
        demand(!AOTInductorModelContainerCreateWithDevice(&container, 1, "cpu", nullptr),
               "step: it cannot be started\n");
    }
    // given: the inputs' memory, in order. sum(i, entries, type) is told of each result.
    template <class Sum>
    void run(void *const *given, const Sum &sum) {
        AtenTensorHandle in[INPUT_COUNT], out[SUM_COUNT];
        for (i64 i = 0; i < INPUT_COUNT; i++) {
            const Input &one = INPUTS[i];
            in[i] = over(given[i], bytes_of(one), one.dims, one.sizes, one.strides, one.type);
        }
        demand(!AOTInductorModelContainerRunSingleThreaded(container, in, INPUT_COUNT, out, SUM_COUNT,
                                                           nullptr, nullptr),
               "step: it failed\n");
        for (i64 i = 0; i < SUM_COUNT; i++) {
            demand(out[i]->dense() && out[i]->count() == SUMS[i].entries &&
                       out[i]->type == SUMS[i].type,
                   "step: a sum of another form\n");
            sum(i, out[i]->data());
            aoti_torch_delete_tensor_object(out[i]);
        }
    }

   private:
    AOTInductorModelContainerHandle container = nullptr;
};

}  // namespace
