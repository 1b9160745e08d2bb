/* platform_posix.c: see platform.h. Compile with PE_PLATFORM_POSIX to get the other systems' half on Linux, for tests. */
#define _GNU_SOURCE
#include "platform.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__) && !defined(PE_PLATFORM_POSIX)
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

/* ------------------------------------------------------------------ mutexes and forks */

void pe_mutex_lock(pe_mutex *mutex) { pthread_mutex_lock(mutex); }
void pe_mutex_unlock(pe_mutex *mutex) { pthread_mutex_unlock(mutex); }
void pe_mutex_reset_after_fork(pe_mutex *mutex) { pthread_mutex_init(mutex, NULL); }
void pe_at_fork_in_child(void (*handler)(void)) { pthread_atfork(NULL, NULL, handler); }

/* ------------------------------------------------------------------ memory */

#define HUGE_PAGE ((size_t)2 << 20)

void *pe_aligned_alloc(size_t n_bytes) {
    size_t padded = (n_bytes + 63) / 64 * 64;
    return n_bytes > SIZE_MAX - 63 ? NULL : aligned_alloc(64, padded);
}

void pe_aligned_free(void *memory) { free(memory); }

void *pe_zeros_alloc(size_t n_bytes) {
    if (n_bytes < HUGE_PAGE) {
        void *memory = pe_aligned_alloc(n_bytes);
        if (memory != NULL) memset(memory, 0, n_bytes);
        return memory;
    }
    if (n_bytes > SIZE_MAX - HUGE_PAGE) return NULL;
    /* So much that a multiple of HUGE_PAGE lies in it, and back with what is before and behind. */
    char *memory = mmap(NULL, n_bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return NULL;
    size_t before = (HUGE_PAGE - (uintptr_t)memory % HUGE_PAGE) % HUGE_PAGE;
    size_t page = (size_t)sysconf(_SC_PAGESIZE), used = (n_bytes + page - 1) / page * page;
    if (before > 0) munmap(memory, before);
    if (before + used < n_bytes + HUGE_PAGE) munmap(memory + before + used, n_bytes + HUGE_PAGE - before - used);
#if defined(MADV_HUGEPAGE) && !defined(PE_PLATFORM_POSIX)
    madvise(memory + before, n_bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE); /* a wish: else pages are small ones */
#endif
    return memory + before;
}

void pe_zeros_free(void *memory, size_t n_bytes) {
    if (n_bytes < HUGE_PAGE)
        pe_aligned_free(memory);
    else if (memory != NULL)
        munmap(memory, n_bytes);
}

/* ------------------------------------------------------------------ clock and CPUs */

int64_t pe_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void pe_yield(void) { sched_yield(); }

static int count_online(void) {
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}

#if defined(__linux__) && !defined(PE_PLATFORM_POSIX)
/* ------------------------------------------------------------------ Linux: futexes, the affinity mask */

void pe_sleep_while_equal(_Atomic uint32_t *word, uint32_t value, int64_t timeout_ns) {
    struct timespec timeout = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, timeout_ns < 0 ? NULL : &timeout, NULL, 0);
}

void pe_wake_all(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }

void pe_sleep_reset_after_fork(void) {}

int pe_count_cpus(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    return count_online(); /* more CPUs than cpu_set_t holds */
}

int pe_current_cpu(void) { return sched_getcpu(); }

bool pe_leave_cpu(int cpu) {
    cpu_set_t mask, others;
    if (sched_getaffinity(0, sizeof mask, &mask) != 0) return false;
    others = mask;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return false;
    sched_setaffinity(0, sizeof mask, &mask); /* it need not stay away: the kernel may have better reasons later */
    return true;
}

#else
/* ------------------------------------------------------------------ POSIX: one condition variable for all words */

static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sleep_condition = PTHREAD_COND_INITIALIZER;

void pe_sleep_while_equal(_Atomic uint32_t *word, uint32_t value, int64_t timeout_ns) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until); /* what pthread_cond_timedwait goes by where it cannot be told otherwise */
    int64_t ns = until.tv_nsec + (timeout_ns < 0 ? 0 : timeout_ns);
    until.tv_sec += (time_t)(ns / 1000000000);
    until.tv_nsec = (long)(ns % 1000000000);
    pthread_mutex_lock(&sleep_lock);
    if (timeout_ns < 0) {
        while (atomic_load(word) == value) pthread_cond_wait(&sleep_condition, &sleep_lock);
    } else if (atomic_load(word) == value) {
        pthread_cond_timedwait(&sleep_condition, &sleep_lock, &until);
    }
    pthread_mutex_unlock(&sleep_lock);
}

void pe_wake_all(_Atomic uint32_t *word) {
    (void)word;
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&sleep_condition);
    pthread_mutex_unlock(&sleep_lock);
}

void pe_sleep_reset_after_fork(void) {
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&sleep_condition, NULL);
}

int pe_count_cpus(void) { return count_online(); }
int pe_current_cpu(void) { return -1; }
bool pe_leave_cpu(int cpu) { return (void)cpu, false; }

#endif
