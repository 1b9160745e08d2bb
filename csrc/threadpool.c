/* threadpool.c: see threadpool.h. Linux futexes, condition variables elsewhere.
 *
 * The whole state of a loop that threads race for is one 64-bit word, the ticket:
 *
 *     | epoch: 32 | n_threads: 8 | units left to claim: 24 |
 *
 * Claiming a unit is one compare-and-swap that takes 1 off the low part. Whoever succeeds knows that the loop described
 * by `pool.fn`, `pool.arg` and `pool.n_units` is the one of that epoch and stays so until the unit is reported
 * finished, since the caller waits for every claimed unit. A worker that wakes late sees either nothing left or a newer
 * epoch and cannot touch an old loop. */
#define _GNU_SOURCE
#include "threadpool.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "float_env.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
static void sleep_while_equal(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}
static void wake_all(_Atomic uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, PE_MAX_THREADS, NULL, NULL, 0);
}
#else
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sleep_condition = PTHREAD_COND_INITIALIZER;
static void sleep_while_equal(_Atomic uint32_t *word, uint32_t value) {
    pthread_mutex_lock(&sleep_lock);
    while (atomic_load(word) == value) pthread_cond_wait(&sleep_condition, &sleep_lock);
    pthread_mutex_unlock(&sleep_lock);
}
static void wake_all(_Atomic uint32_t *word) {
    (void)word;
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&sleep_condition);
    pthread_mutex_unlock(&sleep_lock);
}
#endif

enum { UNITS_BITS = 24, THREADS_BITS = 8, MAX_UNITS = (1 << UNITS_BITS) - 1 };

/* Between two loops of a forward pass lie a few microseconds, so waiting threads spin that long; more would burn a
 * quota. */
static const int64_t spin_ns = 50 * 1000;
static const int64_t poll_interval_ns = 20 * 1000 * 1000;

static struct pe_pool {
    pthread_mutex_t lock; /* guards n_users, n_workers, threads and the start and end of workers */
    int n_users;
    atomic_int n_workers; /* written under the lock, read by every loop */
    pthread_t threads[PE_MAX_THREADS];

    atomic_bool busy; /* a loop is running; taken by try-lock */
    atomic_bool stopping;
    pe_unit_fn fn; /* the running loop: written before its ticket is published */
    void *arg;
    size_t n_units;
    pe_control *control;

    /* Each on its own cache line: all threads hammer them. */
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic uint32_t n_finished;
    _Alignas(64) _Atomic uint32_t n_sleeping; /* workers in a futex wait */
    _Atomic uint32_t wakeups;                 /* the word they wait on */
    _Atomic uint32_t caller_sleeps;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

int64_t pe_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ------------------------------------------------------------------ units */

static size_t units_left(uint64_t ticket) { return ticket & MAX_UNITS; }
static int ticket_threads(uint64_t ticket) { return (int)(ticket >> UNITS_BITS & ((1 << THREADS_BITS) - 1)); }

/* Ask the outside world, now and then, whether to go on. Only the thread that started the call comes here. */
static void poll_control(pe_control *control) {
    if (control == NULL || (control->poll == NULL && control->deadline_ns == 0)) return;
    int64_t now = pe_now_ns();
    bool stop = control->deadline_ns != 0 && now >= control->deadline_ns;
    if (control->poll != NULL && now - control->last_poll_ns >= poll_interval_ns) {
        control->last_poll_ns = now;
        stop |= control->poll(control->poll_user) != 0;
    }
    if (stop) atomic_store(&control->cancelled, true);
}

static bool is_cancelled(pe_control *control) {
    return control != NULL && atomic_load_explicit(&control->cancelled, memory_order_relaxed);
}

/* Claim, run and report units of the current loop until none is left. */
static void work(int thread) {
    uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    while (units_left(ticket) > 0 && thread <= ticket_threads(ticket)) {
        if (!atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, ticket - 1, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue; /* ticket now holds the newer value */
        if (thread == 0) poll_control(pool.control);
        if (!is_cancelled(pool.control)) pool.fn(pool.arg, pool.n_units - units_left(ticket), thread);
        size_t n_units = pool.n_units; /* after the report below the loop may be gone */
        if (atomic_fetch_add(&pool.n_finished, 1) + 1 == n_units && atomic_load(&pool.caller_sleeps))
            wake_all(&pool.n_finished);
        ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    }
}

static void *worker(void *arg) {
    int thread = (int)(intptr_t)arg;
    pe_float_env_enter();
    while (!atomic_load(&pool.stopping)) {
        work(thread);
        uint32_t wakeups = atomic_load(&pool.wakeups);
        int64_t give_up = pe_now_ns() + spin_ns;
        bool has_work = false;
        while (!has_work && pe_now_ns() < give_up)
            for (int i = 0; i < 32 && !has_work; i++) {
                uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
                has_work = units_left(ticket) > 0 && thread <= ticket_threads(ticket);
                relax();
            }
        if (has_work || atomic_load(&pool.stopping)) continue;
        /* Announce the sleep, then look once more: the caller publishes first and looks for sleepers second. */
        atomic_fetch_add(&pool.n_sleeping, 1);
        uint64_t ticket = atomic_load(&pool.ticket);
        if (!(units_left(ticket) > 0 && thread <= ticket_threads(ticket)) && !atomic_load(&pool.stopping))
            sleep_while_equal(&pool.wakeups, wakeups);
        atomic_fetch_sub(&pool.n_sleeping, 1);
    }
    return NULL;
}

static void wake_workers(void) {
    atomic_fetch_add(&pool.wakeups, 1);
    wake_all(&pool.wakeups);
}

/* ------------------------------------------------------------------ lifetime */

/* Threads do not survive fork: the child begins with an empty pool, and the next loop or context starts workers again. */
static void forget_workers_in_child(void) {
    pthread_mutex_init(&pool.lock, NULL);
    pool.n_workers = 0;
    atomic_store(&pool.busy, false);
    atomic_store(&pool.stopping, false);
    atomic_store(&pool.ticket, 0);
    atomic_store(&pool.n_sleeping, 0);
    atomic_store(&pool.caller_sleeps, 0);
}

static void register_fork_handler(void) { pthread_atfork(NULL, NULL, forget_workers_in_child); }

/* With pool.lock held. Signals stay with the application's threads. */
static pe_status start_workers(int n_workers, char *err) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failure = 0;
    while (pool.n_workers < n_workers && failure == 0) {
        failure = pthread_create(&pool.threads[pool.n_workers], NULL, worker, (void *)(intptr_t)(pool.n_workers + 1));
        if (failure == 0) pool.n_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failure == 0) return PE_OK;
    snprintf(err, PE_ERR_LEN, "cannot start worker thread %d of %d: %s", pool.n_workers + 1, n_workers,
             strerror(failure));
    return PE_ERR_SYSTEM;
}

pe_status pe_pool_acquire(int n_threads, char *err) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork_handler);
    pthread_mutex_lock(&pool.lock);
    pe_status status = start_workers(n_threads - 1, err);
    if (status == PE_OK) pool.n_users++;
    pthread_mutex_unlock(&pool.lock);
    return status;
}

void pe_pool_release(void) {
    pthread_mutex_lock(&pool.lock);
    if (--pool.n_users == 0) {
        atomic_store(&pool.stopping, true);
        wake_workers();
        for (int i = 0; i < pool.n_workers; i++) pthread_join(pool.threads[i], NULL);
        pool.n_workers = 0;
        atomic_store(&pool.stopping, false);
    }
    pthread_mutex_unlock(&pool.lock);
}

/* ------------------------------------------------------------------ loops */

static void run_alone(size_t n_units, pe_unit_fn fn, void *arg, pe_control *control) {
    for (size_t unit = 0; unit < n_units; unit++) {
        poll_control(control);
        if (is_cancelled(control)) return;
        fn(arg, unit, 0);
    }
}

/* All units are claimed; wait until those that workers hold are finished. */
static void wait_for_workers(uint32_t n_units) {
    int64_t give_up = pe_now_ns() + spin_ns;
    while (atomic_load_explicit(&pool.n_finished, memory_order_acquire) != n_units) {
        relax();
        if (pe_now_ns() < give_up) continue;
        atomic_store(&pool.caller_sleeps, 1);
        uint32_t n_finished = atomic_load(&pool.n_finished);
        if (n_finished != n_units) sleep_while_equal(&pool.n_finished, n_finished);
        atomic_store(&pool.caller_sleeps, 0);
    }
}

void pe_parallel_for(int n_threads, size_t n_units, pe_unit_fn fn, void *arg, pe_control *control) {
    bool free_before = false;
    if (n_threads < 2 || n_units < 2 || n_units > MAX_UNITS ||
        !atomic_compare_exchange_strong(&pool.busy, &free_before, true)) {
        run_alone(n_units, fn, arg, control);
        return;
    }
    if (pool.n_workers < n_threads - 1) { /* after a fork */
        char err[PE_ERR_LEN];
        pthread_mutex_lock(&pool.lock);
        start_workers(n_threads - 1, err); /* fewer workers only mean less help */
        pthread_mutex_unlock(&pool.lock);
    }
    pool.fn = fn, pool.arg = arg, pool.n_units = n_units, pool.control = control;
    atomic_store(&pool.n_finished, 0);
    uint64_t epoch = (atomic_load(&pool.ticket) >> (UNITS_BITS + THREADS_BITS)) + 1;
    atomic_store(&pool.ticket,
                 epoch << (UNITS_BITS + THREADS_BITS) | (uint64_t)(n_threads - 1) << UNITS_BITS | n_units);
    if (atomic_load(&pool.n_sleeping) > 0) wake_workers();
    work(0);
    wait_for_workers((uint32_t)n_units);
    atomic_store(&pool.busy, false);
}
