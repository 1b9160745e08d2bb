/* float_env.h: the floating-point environment that FORMAT.md assumes: round to nearest even, subnormals kept, nothing
 * trapped. Some library elsewhere in the process may have set flush-to-zero (loading one built with -Ofast is enough),
 * so every entry into the engine and every pool thread sets the default and puts the caller's back. */
#ifndef PE_FLOAT_ENV_H
#define PE_FLOAT_ENV_H

#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
static inline uint64_t pe_float_env_enter(void) {
    uint64_t saved = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return saved;
}
static inline void pe_float_env_leave(uint64_t saved) { _mm_setcsr((unsigned)saved); }
#elif defined(__aarch64__)
static inline uint64_t pe_float_env_enter(void) {
    uint64_t saved, standard = 0;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"(standard));
    return saved;
}
static inline void pe_float_env_leave(uint64_t saved) { __asm__ volatile("msr fpcr, %0" : : "r"(saved)); }
#else
#error "pyengine runs on x86-64 and AArch64"
#endif

#endif
