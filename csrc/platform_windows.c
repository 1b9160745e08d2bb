/* platform_windows.c: see platform.h. Windows 8 and newer: before it, threads could not wait for a word. */
#if defined(_WIN32) /* elsewhere the file is empty, so that whoever compiles all of csrc/ need not know */
#define WIN32_LEAN_AND_MEAN
#include "platform.h"

#include <windows.h>

#include <malloc.h>

/* ------------------------------------------------------------------ mutexes and forks */

_Static_assert(sizeof(pe_mutex) == sizeof(SRWLOCK), "pe_mutex is an SRWLOCK, whose initial value is a null pointer");

void pe_mutex_lock(pe_mutex *mutex) { AcquireSRWLockExclusive((SRWLOCK *)mutex); }
void pe_mutex_unlock(pe_mutex *mutex) { ReleaseSRWLockExclusive((SRWLOCK *)mutex); }

/* There is no fork. */
void pe_mutex_reset_after_fork(pe_mutex *mutex) { (void)mutex; }
void pe_at_fork_in_child(void (*handler)(void)) { (void)handler; }
void pe_sleep_reset_after_fork(void) {}

/* ------------------------------------------------------------------ sleeping */

void pe_sleep_while_equal(_Atomic uint32_t *word, uint32_t value, int64_t timeout_ns) {
    const int64_t ns_per_ms = 1000000, longest = INFINITE - 1;
    int64_t ms = timeout_ns / ns_per_ms + (timeout_ns % ns_per_ms > 0);
    WaitOnAddress(word, &value, sizeof value, timeout_ns < 0 ? INFINITE : (DWORD)(ms < longest ? ms : longest));
}

void pe_wake_all(_Atomic uint32_t *word) { WakeByAddressAll(word); }

/* ------------------------------------------------------------------ memory */

void *pe_aligned_alloc(size_t n_bytes) { return n_bytes > SIZE_MAX - 63 ? NULL : _aligned_malloc(n_bytes > 0 ? n_bytes : 1, 64); }
void pe_aligned_free(void *memory) { _aligned_free(memory); }

/* Whole pages. No huge ones: these take a privilege that accounts do not have. */
void *pe_zeros_alloc(size_t n_bytes) { return VirtualAlloc(NULL, n_bytes > 0 ? n_bytes : 1, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE); }

void pe_zeros_free(void *memory, size_t n_bytes) {
    (void)n_bytes;
    if (memory != NULL) VirtualFree(memory, 0, MEM_RELEASE);
}

/* ------------------------------------------------------------------ clock and CPUs */

int64_t pe_now_ns(void) {
    const int64_t ns_per_s = 1000000000;
    LARGE_INTEGER ticks, per_second; /* the same for as long as the system runs */
    QueryPerformanceFrequency(&per_second);
    QueryPerformanceCounter(&ticks);
    int64_t seconds = ticks.QuadPart / per_second.QuadPart, rest = ticks.QuadPart % per_second.QuadPart;
    return seconds * ns_per_s + rest * ns_per_s / per_second.QuadPart;
}

int pe_count_cpus(void) {
    DWORD_PTR of_process = 0, of_system = 0;
    GetProcessAffinityMask(GetCurrentProcess(), &of_process, &of_system);
    int n = __builtin_popcountll(of_process); /* 0: the process has threads in several groups of 64 CPUs */
    if (n == 0) n = (int)GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
    return n > 0 ? n : 1;
}

/* Not asked: nobody has seen yet where this system wakes threads. */
int pe_current_cpu(void) { return -1; }
bool pe_leave_cpu(int cpu) { return (void)cpu, false; }

void pe_yield(void) { SwitchToThread(); }

#endif
