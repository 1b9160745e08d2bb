/* test_pool.c: the thread pool runs every unit exactly once, whoever else uses it, and its workers leave the caller's CPU; the number of
 * threads it has by default. */
#define _GNU_SOURCE
#if defined(__linux__)
#include <sched.h>
#endif
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "harness.h"
#include "platform.h"
#include "threadpool.h"

/* ------------------------------------------------------------------ loops */

enum { MAX_UNITS = 3000, N_LOOPS = 400, N_CALLERS = 4 };

typedef struct loop {
    atomic_int runs[MAX_UNITS];
    int n_threads;
    atomic_int bad_thread;
    int plain_sum; /* written by the caller before, read by units: must be visible to them */
} loop;

static void unit(void *arg, size_t index, int thread) {
    loop *l = arg;
    if (thread < 0 || thread >= l->n_threads || l->plain_sum != 42) atomic_store(&l->bad_thread, 1);
    atomic_fetch_add(&l->runs[index], 1);
}

static void *caller(void *arg) {
    uint64_t seed = (uint64_t)(uintptr_t)arg;
    rng r = {seed};
    loop *l = calloc(1, sizeof *l);
    char err[PE_ERR_LEN] = "";
    int n_threads = 1 + (int)rng_below(&r, 4);
    bool good = l != NULL && pe_pool_acquire(n_threads, err) == PE_OK;
    for (int i = 0; good && i < (quick ? N_LOOPS / 4 : N_LOOPS); i++) {
        size_t n_units = rng_below(&r, 10) == 0 ? MAX_UNITS : rng_below(&r, 20);
        l->n_threads = n_threads, l->plain_sum = 42;
        pe_parallel_for(n_threads, n_units, unit, l, NULL);
        for (size_t k = 0; k < MAX_UNITS; k++) {
            good &= atomic_load(&l->runs[k]) == (k < n_units);
            atomic_store(&l->runs[k], 0);
        }
        good &= !atomic_load(&l->bad_thread);
        l->plain_sum = 0;
        if (rng_below(&r, 50) == 0) { /* other users come and go; the last one to go stops the workers */
            pe_pool_release();
            good &= pe_pool_acquire(n_threads, err) == PE_OK;
        }
        _Atomic uint32_t nobody = 0; /* wakes it: long enough for the workers to fall asleep */
        if (rng_below(&r, 40) == 0) pe_sleep_while_equal(&nobody, 0, 200 * 1000);
    }
    pe_pool_release();
    free(l);
    return good ? NULL : "bad";
}

static void test_loops(void) {
    for (uintptr_t seed = 1; seed <= 8; seed++) CHECK(caller((void *)seed) == NULL, "one caller, seed %zu", (size_t)seed);
    pe_thread threads[N_CALLERS];
    for (uintptr_t i = 0; i < N_CALLERS; i++) CHECK(pe_thread_start(&threads[i], caller, (void *)(100 + i)) == 0, "no thread");
    for (int i = 0; i < N_CALLERS; i++) {
        CHECK(pe_thread_join(threads[i]) == NULL, "caller %d of %d at once", i, N_CALLERS);
    }
}

/* ------------------------------------------------------------------ whose CPU it is */

#if defined(__linux__) && !defined(PE_PLATFORM_POSIX)
enum { N_TRIES = 20000 };

/* The caller lets go of its CPU, so that a worker that has no other gets it. */
static void patient_unit(void *arg, size_t index, int thread) {
    (void)arg, (void)index;
    _Atomic uint32_t nobody = 0;
    if (thread == 0) pe_sleep_while_equal(&nobody, 0, 200 * 1000);
}

/* A worker leaves the caller's CPU for any other of its affinity mask, and the mask is as it was. Where there is no other,
 * it finds out, and loops run all the same. */
static void test_way(void) {
    cpu_set_t before, now, one;
    if (sched_getaffinity(0, sizeof before, &before) != 0) return; /* more CPUs than a cpu_set_t holds */
    int cpu = pe_current_cpu();
    CHECK(cpu >= 0 && CPU_ISSET(cpu, &before), "on CPU %d", cpu);
    CHECK(pe_leave_cpu(cpu) == (CPU_COUNT(&before) > 1), "%d CPUs", CPU_COUNT(&before));
    CHECK(sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&before, &now), "another mask after a move");

    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one) != 0) return; /* an emulator */
    CHECK(!pe_leave_cpu(cpu), "left the only CPU");
    CHECK(sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&one, &now), "another mask after no move");
    char err[PE_ERR_LEN] = "";
    CHECK(pe_pool_acquire(2, err) == PE_OK, "%s", err); /* the worker inherits the mask */
    int n_before = pe_pool_count_clashes(), n_tries = 0;
    while (pe_pool_count_clashes() == n_before && n_tries++ < N_TRIES) pe_parallel_for(2, 2, patient_unit, NULL, NULL);
    CHECK(n_tries < N_TRIES, "a worker on the caller's CPU does not find out");
    pe_pool_release();
    sched_setaffinity(0, sizeof before, &before);
}
#else
static void test_way(void) {} /* the system does not say */
#endif

void test_pool(void) {
    test_loops();
    test_way();
}

/* ------------------------------------------------------------------ limits of this machine */

void test_cpu_limits(void) {
    pe_throttling throttling;
    pe_throttling_get(&throttling);
    CHECK(throttling.n_throttled <= throttling.n_periods, "throttled in more periods than there were");
    pe_thread_info info;
    pe_thread_info_get(&info);
    CHECK(info.n_affinity >= 1 && info.n_default >= 1 && info.n_default <= PE_MAX_THREADS, "%d of %d", info.n_default, info.n_affinity);
    CHECK(info.cpu_quota == 0 || info.n_default <= (info.cpu_quota < 1 ? 1 : info.cpu_quota), "%d of %g", info.n_default, info.cpu_quota);
}
