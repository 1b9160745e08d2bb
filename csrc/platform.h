/* platform.h: what the core asks of the operating system beyond C11 and pthreads: sleeping on a word, aligned memory, a
 * clock, the number of CPUs. platform.c has it for Linux, and for any other POSIX system. */
#ifndef PE_PLATFORM_H
#define PE_PLATFORM_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* Sleep while *word == value, until pe_wake_all(word) or for timeout_ns (negative: as long as it takes); may return early.
 * Threads of this process only. */
void pe_sleep_while_equal(_Atomic uint32_t *word, uint32_t value, int64_t timeout_ns);
/* Wake every thread that sleeps on `word`. Call it after *word has changed: then no sleeper misses the change. */
void pe_wake_all(_Atomic uint32_t *word);
/* In the child of a fork, where no other thread exists: nobody sleeps and nobody holds a lock any more. */
void pe_sleep_reset_after_fork(void);

/* n_bytes of memory that begin at a multiple of 64 bytes, or NULL (also for sizes that do not fit). Freed by free(). */
void *pe_aligned_alloc(size_t n_bytes);
/* n_bytes of zeros, likewise. The whole huge pages (2 MiB) that fit into them are asked for as such, so that walking through
 * them misses fewer translations; what is left over is small pages, and takes memory only as it is touched. */
void *pe_zeros_alloc(size_t n_bytes);
/* What pe_zeros_alloc(n_bytes) returned; NULL does nothing. */
void pe_zeros_free(void *memory, size_t n_bytes);

/* CLOCK_MONOTONIC in nanoseconds. */
int64_t pe_now_ns(void);

/* CPUs that this process may run on: its affinity mask where there is one, else those online; at least 1. */
int pe_count_cpus(void);

/* Tell the CPU that this is a waiting loop. */
static inline void pe_cpu_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
