/* Which instruction sets of setup.py's table this processor has, and whether the operating system saves their registers.
   Asked before a kernel module is imported: such a module may use its instructions as soon as it is loaded. */
#ifndef PYX_XENT_CPU_H
#define PYX_XENT_CPU_H

#if defined(__x86_64__) || defined(_M_X64)

#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
static void pyx_xent_cpuid(unsigned leaf, unsigned subleaf, unsigned r[4]) { __cpuidex((int *)r, (int)leaf, (int)subleaf); }
static unsigned long long pyx_xent_xcr0(void) { return _xgetbv(0); }
#else
#include <cpuid.h>
static void pyx_xent_cpuid(unsigned leaf, unsigned subleaf, unsigned r[4]) {
  __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
}
static unsigned long long pyx_xent_xcr0(void) {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((unsigned long long)high << 32) | low;
}
#endif

/* 0: x86-64's baseline, 1: x86-64-v3, 2: x86-64-v4. Bits as in Intel's and AMD's manuals for CPUID. */
static int pyx_xent_x86_level(void) {
  enum { EAX, EBX, ECX, EDX };
  const unsigned v3_leaf1_ecx = 1u << 0 | 1u << 9 | 1u << 12 | 1u << 13 | 1u << 19 | 1u << 20 /* SSE3 SSSE3 FMA CX16 SSE4.1 SSE4.2 */
                                | 1u << 22 | 1u << 23 | 1u << 27 | 1u << 28 | 1u << 29;       /* MOVBE POPCNT OSXSAVE AVX F16C */
  const unsigned v3_leaf7_ebx = 1u << 3 | 1u << 5 | 1u << 8;                                  /* BMI1 AVX2 BMI2 */
  const unsigned v4_leaf7_ebx = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;         /* AVX512 F DQ CD BW VL */
  const unsigned extended_ecx = 1u << 0 | 1u << 5;                                            /* LAHF LZCNT */
  unsigned r[4], leaf7_ebx;
  unsigned long long saved;
  pyx_xent_cpuid(0, 0, r);
  if (r[EAX] < 7) return 0;
  pyx_xent_cpuid(0x80000000u, 0, r);
  if (r[EAX] < 0x80000001u) return 0;
  pyx_xent_cpuid(0x80000001u, 0, r);
  if ((r[ECX] & extended_ecx) != extended_ecx) return 0;
  pyx_xent_cpuid(1, 0, r);
  if ((r[ECX] & v3_leaf1_ecx) != v3_leaf1_ecx) return 0;
  pyx_xent_cpuid(7, 0, r);
  leaf7_ebx = r[EBX];
  saved = pyx_xent_xcr0();
  if ((leaf7_ebx & v3_leaf7_ebx) != v3_leaf7_ebx || (saved & 0x06) != 0x06) return 0;  /* xmm, ymm */
  if ((leaf7_ebx & v4_leaf7_ebx) != v4_leaf7_ebx || (saved & 0xe6) != 0xe6) return 1;  /* and masks, zmm */
  return 2;
}

#else
static int pyx_xent_x86_level(void) { return 0; }
#endif
#endif
