/* platform.h: what the core asks of the operating system beyond C11: threads and a mutex, sleeping on a word, aligned memory, a
 * clock, the number of CPUs. platform_posix.c and threads_posix.c have it for Linux, and for any other POSIX system;
 * platform_windows.c and threads_windows.c for Windows 8 and newer. */
#ifndef PE_PLATFORM_H
#define PE_PLATFORM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
typedef struct pe_windows_thread *pe_thread;
typedef struct pe_mutex {
    void *lock; /* an SRWLOCK, without its header */
} pe_mutex;
#define PE_MUTEX_INIT {NULL}
#else
#include <pthread.h>
typedef pthread_t pe_thread;
typedef pthread_mutex_t pe_mutex;
#define PE_MUTEX_INIT PTHREAD_MUTEX_INITIALIZER
#endif

/* Run fn(arg) in a thread of its own, which hears no signals but those of its own faults: the others stay with the
 * application's threads. 0, or an errno. Every thread that was started must be joined. */
int pe_thread_start(pe_thread *thread, void *(*fn)(void *), void *arg);
/* Wait for the thread's end; what fn returned. */
void *pe_thread_join(pe_thread thread);

/* A mutex that is PE_MUTEX_INIT; not recursive. */
void pe_mutex_lock(pe_mutex *mutex);
void pe_mutex_unlock(pe_mutex *mutex);
/* In the child of a fork: free, whoever held it in the parent. */
void pe_mutex_reset_after_fork(pe_mutex *mutex);
/* Call handler in the child of every fork from now on, for the rest of the process; never where there is no fork. */
void pe_at_fork_in_child(void (*handler)(void));

/* Sleep while *word == value, until pe_wake_all(word) or for timeout_ns (negative: as long as it takes); may return early.
 * Threads of this process only. */
void pe_sleep_while_equal(_Atomic uint32_t *word, uint32_t value, int64_t timeout_ns);
/* Wake every thread that sleeps on `word`. Call it after *word has changed: then no sleeper misses the change. */
void pe_wake_all(_Atomic uint32_t *word);
/* In the child of a fork, where no other thread exists: nobody sleeps and nobody holds a lock any more. */
void pe_sleep_reset_after_fork(void);

/* n_bytes of memory that begin at a multiple of 64 bytes, or NULL (also for sizes that do not fit). */
void *pe_aligned_alloc(size_t n_bytes);
/* What pe_aligned_alloc returned; NULL does nothing. */
void pe_aligned_free(void *memory);
/* n_bytes of zeros, aligned likewise. On Linux, the whole huge pages (2 MiB) that fit into them are asked for as such, so that
 * walking through them misses fewer translations; what is left over is small pages, and takes memory only as it is touched. */
void *pe_zeros_alloc(size_t n_bytes);
/* What pe_zeros_alloc(n_bytes) returned; NULL does nothing. */
void pe_zeros_free(void *memory, size_t n_bytes);

/* A clock that never goes back, in nanoseconds since some moment of the past. */
int64_t pe_now_ns(void);

/* CPUs that this process may run on: its affinity mask where there is one, else those online; at least 1. */
int pe_count_cpus(void);

/* The CPU that the calling thread runs on, which may be another one a moment later; -1 where the system does not say. */
int pe_current_cpu(void);
/* Move the calling thread from `cpu`, where it runs, to another CPU of its affinity mask, which stays as it is. False if there
 * is no other, or the system does not allow it. */
bool pe_leave_cpu(int cpu);
/* Let another thread that waits for this CPU go first, if there is one. */
void pe_yield(void);

/* Tell the CPU that this is a waiting loop. */
static inline void pe_cpu_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
