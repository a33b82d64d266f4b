// Tensors behind the handles of AOTInductor's C interface (torch/csrc/inductor/aoti_torch/c/shim.h):
// what the generated code asks of libtorch, and no more. One thread, the CPU, dense storage.
//
// Every view is checked against its storage when it is made; kernels of ours check shapes before
// they touch memory. A failed check ends the process: there is nobody to answer to (stop()).

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

[[noreturn]] void stop(const char *why) {
    const ssize_t written = write(2, why, std::strlen(why));
    (void)written;
    _exit(70);
}
inline void demand(bool holds, const char *why) {
    if (!holds) stop(why);
}

// Types of tensors, numbered as c10::ScalarType.
enum Type : int32_t { U8 = 0, I8 = 1, I32 = 3, I64 = 4, F32 = 6, F64 = 7, BOOL = 11 };

inline int64_t width_of(int32_t type) {
    switch (type) {
        case U8: case I8: case BOOL: return 1;
        case I32: case F32: return 4;
        case I64: case F64: return 8;
    }
    stop("tensor: a type that the runtime does not have\n");
}

// A block of memory, shared by views. Blocks go back to a list: each step asks for the same ones.
struct Storage {
    char *data;
    int64_t bytes;   // of the block; a view may not leave it
    int64_t users;
    bool ours;
};

std::vector<Storage *> idle;

Storage *take(int64_t bytes) {
    bytes = (std::max<int64_t>(bytes, 1) + 63) / 64 * 64;
    for (size_t i = 0; i < idle.size(); i++)
        if (idle[i]->bytes == bytes) {
            Storage *found = idle[i];
            idle[i] = idle.back();
            idle.pop_back();
            found->users = 1;
            return found;
        }
    char *data = static_cast<char *>(std::aligned_alloc(64, bytes));
    demand(data, "memory: none left\n");
    return new Storage{data, bytes, 1, true};
}

constexpr int DIMS = 8;

struct AtenTensorOpaque {
    Storage *storage;
    int64_t offset;   // in entries
    int64_t dims, sizes[DIMS], strides[DIMS];
    int32_t type;

    char *data() const { return storage->data + offset * width_of(type); }
    int64_t count() const {
        int64_t n = 1;
        for (int64_t d = 0; d < dims; d++) n *= sizes[d];
        return n;
    }
    bool dense() const {
        int64_t step = 1;
        for (int64_t d = dims; d-- > 0;) {
            if (sizes[d] != 1 && strides[d] != step) return false;
            step *= sizes[d];
        }
        return true;
    }
};
using Tensor = AtenTensorOpaque;

// Entries from a view's first to behind its last, none where it is empty; in 128 bits, where no sum
// of DIMS products of what is let through wraps.
__int128 extent_of(int64_t dims, const int64_t *sizes, const int64_t *strides) {
    demand(dims >= 0 && dims <= DIMS, "tensor: not of a form that the runtime has\n");
    __int128 extent = 1;
    bool empty = false;
    for (int64_t d = 0; d < dims; d++) {
        demand(sizes[d] >= 0 && strides[d] >= 0 && sizes[d] < (1ll << 40) && strides[d] < (1ll << 40),
               "tensor: a size or stride out of range\n");
        extent += static_cast<__int128>(sizes[d] - 1) * strides[d];
        empty = empty || sizes[d] == 0;
    }
    return empty ? 0 : extent;
}

Tensor *view(Storage *storage, int64_t dims, const int64_t *sizes, const int64_t *strides,
             int64_t offset, int32_t type) {
    const __int128 extent = extent_of(dims, sizes, strides);
    demand(offset >= 0 && (!extent || (offset + extent) * width_of(type) <= storage->bytes),
           "tensor: a view beyond its memory\n");
    auto *made = new Tensor{storage, offset, dims, {}, {}, type};
    std::copy(sizes, sizes + dims, made->sizes);
    std::copy(strides, strides + dims, made->strides);
    return made;
}

Tensor *fresh(int64_t dims, const int64_t *sizes, const int64_t *strides, int32_t type) {
    const __int128 bytes = extent_of(dims, sizes, strides) * width_of(type);
    demand(bytes < (1ll << 46), "tensor: too large\n");
    return view(take(static_cast<int64_t>(bytes)), dims, sizes, strides, 0, type);
}

Tensor *dense(int64_t dims, const int64_t *sizes, int32_t type) {
    int64_t strides[DIMS], step = 1;
    demand(dims <= DIMS, "tensor: not of a form that the runtime has\n");
    for (int64_t d = dims; d-- > 0;) {
        strides[d] = step;
        demand(!__builtin_mul_overflow(step, sizes[d], &step), "tensor: too large\n");
    }
    return fresh(dims, sizes, strides, type);
}

void drop(Storage *storage) {
    if (--storage->users) return;
    if (storage->ours) idle.push_back(storage);
    else delete storage;
}

// A tensor over memory that outlives the step.
Tensor *over(void *data, int64_t bytes, int64_t dims, const int64_t *sizes, const int64_t *strides,
             int32_t type) {
    auto *storage = new Storage{static_cast<char *>(data), bytes, 1, false};
    return view(storage, dims, sizes, strides, 0, type);
}

template <class E>
E *data_of(Tensor *t, int32_t type) {
    demand(t && t->type == type, "tensor: not of the type that a kernel takes\n");
    return reinterpret_cast<E *>(t->data());
}

extern "C" {

#define TELL(name, type, value) \
    type name(void) { return value; }
TELL(aoti_torch_device_type_cpu, int32_t, 0)
TELL(aoti_torch_device_type_cuda, int32_t, 1)
TELL(aoti_torch_dtype_uint8, int32_t, U8)
TELL(aoti_torch_dtype_int8, int32_t, I8)
TELL(aoti_torch_dtype_int32, int32_t, I32)
TELL(aoti_torch_dtype_int64, int32_t, I64)
TELL(aoti_torch_dtype_float32, int32_t, F32)
TELL(aoti_torch_dtype_float64, int32_t, F64)
TELL(aoti_torch_dtype_bool, int32_t, BOOL)
TELL(aoti_torch_grad_mode_is_enabled, bool, false)
#undef TELL
void aoti_torch_grad_mode_set_enabled(bool) {}

AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t *sizes, const int64_t *strides,
                                        int32_t type, int32_t, int32_t, AtenTensorHandle *made) {
    *made = fresh(dims, sizes, strides, type);
    return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t) {
    drop(t->storage);
    delete t;
    return 0;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle t, AtenTensorHandle *made) {
    t->storage->users++;
    *made = new Tensor(*t);
    return 0;
}
AOTITorchError aoti_torch__reinterpret_tensor(AtenTensorHandle t, int64_t dims, const int64_t *sizes,
                                              const int64_t *strides, int64_t offset,
                                              AtenTensorHandle *made) {
    t->storage->users++;
    *made = view(t->storage, dims, sizes, strides, t->offset + offset, t->type);
    return 0;
}
#define ASK(name, type, answer) \
    AOTITorchError name(AtenTensorHandle t, type *found) { \
        *found = answer; \
        return 0; \
    }
ASK(aoti_torch_get_data_ptr, void *, t->data())
ASK(aoti_torch_get_storage_size, int64_t, t->storage->bytes)
ASK(aoti_torch_get_storage_offset, int64_t, t->offset)
ASK(aoti_torch_get_dim, int64_t, t->dims)
ASK(aoti_torch_get_sizes, int64_t *, t->sizes)
ASK(aoti_torch_get_strides, int64_t *, t->strides)
ASK(aoti_torch_get_dtype, int32_t, t->type)
#undef ASK
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t *type) {
    *type = 0;
    return 0;
}
// An index out of range: admission has proved that there is none.
void aoti_torch_check(bool holds, const char *, const char *, uint32_t, const char *) {
    demand(holds, "step: an index beyond its tensor\n");
}
// The generated class can load constants and copy results; a step has neither.
AOTITorchError aoti_torch_clone(AtenTensorHandle, AtenTensorHandle *) {
    stop("tensor: a step copies nothing\n");
}
AOTITorchError aoti_torch_create_tensor_from_blob(void *, int64_t, const int64_t *, const int64_t *,
                                                  int64_t, int32_t, int32_t, int32_t,
                                                  AtenTensorHandle *) {
    stop("tensor: a step has no constants of its own\n");
}
AOTITorchError aoti_torch_create_tensor_from_blob_v2(void *, int64_t, const int64_t *,
                                                     const int64_t *, int64_t, int32_t, int32_t,
                                                     int32_t, AtenTensorHandle *, int32_t,
                                                     const uint8_t *, int64_t) {
    stop("tensor: a step has no constants of its own\n");
}

}  // extern "C"
