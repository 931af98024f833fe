/* Atomic operations on one word, for gcc, clang and MSVC: C11's <stdatomic.h> is still an experiment in the last.
   All are in one order for all threads: who puts a block into a slot and then reads the budget, and who sets the budget and
   then empties the slots, must not both miss what the other has done. */
#ifndef PYX_XENT_ATOMIC_H
#define PYX_XENT_ATOMIC_H

#include <stddef.h>

#if defined(__GNUC__) || defined(__clang__)
/* -> what was there */
static inline void *pyx_xent_swap(void **place, void *value) { return __atomic_exchange_n(place, value, __ATOMIC_SEQ_CST); }
/* -> whether it was NULL, and is `value` now */
static inline int pyx_xent_put_if_null(void **place, void *value) {
  void *expected = NULL;
  return __atomic_compare_exchange_n(place, &expected, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}
static inline int pyx_xent_is_null(void **place) { return __atomic_load_n(place, __ATOMIC_RELAXED) == NULL; }
/* -> the sum */
static inline ptrdiff_t pyx_xent_add(ptrdiff_t *count, ptrdiff_t n) { return __atomic_add_fetch(count, n, __ATOMIC_SEQ_CST); }
static inline ptrdiff_t pyx_xent_load(ptrdiff_t *count) { return __atomic_load_n(count, __ATOMIC_SEQ_CST); }
static inline void pyx_xent_store(ptrdiff_t *count, ptrdiff_t n) { __atomic_store_n(count, n, __ATOMIC_SEQ_CST); }

#else
/* A pointer holds either kind of word, so that one set of intrinsics serves 32 and 64 bits. */
#include <intrin.h>
static __inline void *pyx_xent_swap(void **place, void *value) { return _InterlockedExchangePointer(place, value); }
static __inline int pyx_xent_put_if_null(void **place, void *value) {
  return _InterlockedCompareExchangePointer(place, value, NULL) == NULL;
}
static __inline int pyx_xent_is_null(void **place) { return *(void *volatile *)place == NULL; }
static __inline ptrdiff_t pyx_xent_load(ptrdiff_t *count) {
  return (ptrdiff_t)_InterlockedCompareExchangePointer((void **)count, NULL, NULL);
}
static __inline void pyx_xent_store(ptrdiff_t *count, ptrdiff_t n) { _InterlockedExchangePointer((void **)count, (void *)n); }
static __inline ptrdiff_t pyx_xent_add(ptrdiff_t *count, ptrdiff_t n) {
  for (;;) {
    ptrdiff_t before = pyx_xent_load(count);
    if (_InterlockedCompareExchangePointer((void **)count, (void *)(before + n), (void *)before) == (void *)before)
      return before + n;
  }
}
#endif

#endif
