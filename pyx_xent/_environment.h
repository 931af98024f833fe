/* The floating-point environment of the calling thread: rounding to nearest, with subnormal numbers and without traps for the
   time of a calculation; then what the caller had set, its exception flags too. Compilers know nothing of that: what is computed
   in between has to be in memory before `leave`, so a result in a register is given to it by its address. */
#ifndef PYX_XENT_ENVIRONMENT_H
#define PYX_XENT_ENVIRONMENT_H

#if defined(__GNUC__) || defined(__clang__)
#define PYX_XENT_IN_MEMORY(result) __asm__ volatile("" : : "r"(result) : "memory")
#else
static void *volatile pyx_xent_in_memory;
#define PYX_XENT_IN_MEMORY(result) (pyx_xent_in_memory = (void *)(result))
#endif

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
typedef unsigned pyx_xent_environment;
static inline pyx_xent_environment pyx_xent_enter(void) {
  unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80); /* as a process starts: all exceptions masked */
  PYX_XENT_IN_MEMORY(&before);
  return before;
}
static inline void pyx_xent_leave(pyx_xent_environment before, void *result) {
  PYX_XENT_IN_MEMORY(result);
  _mm_setcsr(before);
}

#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
typedef struct {
  unsigned long long control, flags;
} pyx_xent_environment;
static inline pyx_xent_environment pyx_xent_enter(void) {
  pyx_xent_environment before;
  unsigned long long normal = 0;
  __asm__ volatile("mrs %0, fpcr" : "=r"(before.control));
  __asm__ volatile("mrs %0, fpsr" : "=r"(before.flags));
  __asm__ volatile("msr fpcr, %0" : : "r"(normal) : "memory");
  return before;
}
static inline void pyx_xent_leave(pyx_xent_environment before, void *result) {
  PYX_XENT_IN_MEMORY(result);
  __asm__ volatile("msr fpcr, %0" : : "r"(before.control) : "memory");
  __asm__ volatile("msr fpsr, %0" : : "r"(before.flags) : "memory");
}

#else
#include <fenv.h>
typedef fenv_t pyx_xent_environment;
static inline pyx_xent_environment pyx_xent_enter(void) {
  fenv_t before;
  fegetenv(&before);
  fesetenv(FE_DFL_ENV);
  PYX_XENT_IN_MEMORY(&before);
  return before;
}
static inline void pyx_xent_leave(pyx_xent_environment before, void *result) {
  PYX_XENT_IN_MEMORY(result);
  fesetenv(&before);
}
#endif
#endif
