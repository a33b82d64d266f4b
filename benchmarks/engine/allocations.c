/* Preloaded: counts the bytes that a process has from the C allocator. Blocks from posix_memalign
   and its like (torch's tensors) carry a mark in their last bytes and are counted apart as well. */
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t), __libc_free(void *);

static atomic_llong live, aligned_live, peak;
#define MARK 0x9d3f61c2a7b45e08ULL

static void add(long long bytes) {
  long long now = atomic_fetch_add_explicit(&live, bytes, memory_order_relaxed) + bytes;
  long long top = atomic_load_explicit(&peak, memory_order_relaxed);
  while (now > top && !atomic_compare_exchange_weak(&peak, &top, now)) {}
}

static uint64_t *mark_of(void *p) {
  return (uint64_t *)((uintptr_t)p + ((malloc_usable_size(p) - 16) & ~(size_t)7));
}

static void taken(void *p) { if (p) add((long long)malloc_usable_size(p)); }

static void given_back(void *p) {
  long long bytes = (long long)malloc_usable_size(p);
  atomic_fetch_sub_explicit(&live, bytes, memory_order_relaxed);
  uint64_t *mark = mark_of(p);
  if (bytes >= 24 && mark[0] == MARK && mark[1] == (MARK ^ (uintptr_t)p)) {
    mark[0] = 0;
    atomic_fetch_sub_explicit(&aligned_live, bytes, memory_order_relaxed);
  }
}

void *malloc(size_t n) { void *p = __libc_malloc(n); taken(p); return p; }
void *calloc(size_t n, size_t k) { void *p = __libc_calloc(n, k); taken(p); return p; }
void free(void *p) { if (p) { given_back(p); __libc_free(p); } }

void *realloc(void *old, size_t n) {
  if (old) given_back(old);
  void *p = __libc_realloc(old, n);
  taken(p ? p : (n ? old : NULL));
  return p;
}

void *memalign(size_t alignment, size_t n) {
  void *p = __libc_memalign(alignment, n + 24);
  if (!p) return p;
  taken(p);
  uint64_t *mark = mark_of(p);
  mark[0] = MARK;
  mark[1] = MARK ^ (uintptr_t)p;
  atomic_fetch_add_explicit(&aligned_live, (long long)malloc_usable_size(p), memory_order_relaxed);
  return p;
}

void *aligned_alloc(size_t alignment, size_t n) { return memalign(alignment, n); }
int posix_memalign(void **out, size_t alignment, size_t n) {
  void *p = memalign(alignment, n);
  if (!p) return ENOMEM;
  *out = p;
  return 0;
}

long long bench_live(void) { return atomic_load(&live); }
long long bench_aligned(void) { return atomic_load(&aligned_live); }
long long bench_peak(void) { return atomic_load(&peak); }
void bench_mark(void) { atomic_store(&peak, atomic_load(&live)); }
