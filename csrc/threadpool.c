/* threadpool.c: see threadpool.h.
 *
 * A loop's units are dealt to the threads in equal runs, one run a thread, so that a thread walks through memory in one
 * direction and claims its units from a cache line that nobody else touches. Whoever is through with its own run takes
 * units from the far ends of the others', one by one. A run is one 64-bit word:
 *
 *     | n_threads - 1: 8 | begin: 28 | end: 28 |      units [begin, end) are left
 *
 * Claiming a unit is one compare-and-swap, begin + 1 by the owner or end - 1 by a thief. Whoever succeeds may read
 * `pool.fn`, `pool.arg` and `pool.n_units`: they were written before the word was, and stay until the unit is reported
 * finished, since the caller waits for all units. A worker that wakes late sees empty runs and cannot touch an old loop,
 * and one beyond the loop's n_threads reads in the word itself that it is not invited.
 *
 * Other programs want the CPUs, too, and what a worker holds while it has none, all threads wait for. So a worker that
 * waits makes way, before the kernel sees to it at a worse moment: make_way. */
#include "threadpool.h"

#include <string.h>

#include "float_env.h"
#include "platform.h"
#include "status.h"

enum {
    UNIT_BITS = 28,
    UNITS_PER_POLL = 8 /* reading the clock is some per cent of a short unit; eight of the longest are a few ms */
};
static const uint64_t max_units = ((uint64_t)1 << UNIT_BITS) - 1;

/* Between two loops of a forward pass lie a few microseconds, so waiting threads spin that long; more would burn a
 * quota. */
static const int64_t spin_ns = 50 * 1000;
static const int64_t poll_interval_ns = 20 * 1000 * 1000;
/* Less than the usual time slices, 2 to 4 ms, so that a worker yields before its own ends. To yield to nobody takes 0.3 us. */
static const int64_t yield_interval_ns = 1000 * 1000;

static struct pe_pool {
    pe_mutex lock; /* guards n_users, n_workers, threads and the start and end of workers */
    bool knows_forks;
    int n_users;
    atomic_int n_workers; /* written under the lock, read by every loop */
    pe_thread threads[PE_MAX_THREADS];

    atomic_bool busy; /* a loop is running; taken by try-lock */
    atomic_bool stopping;
    pe_unit_fn fn; /* the running loop: written before its runs are published */
    void *arg;
    size_t n_units;
    pe_control *control;

    atomic_int n_threads;  /* of the last loop: how far thieves look. A stale value costs them a look */
    atomic_int caller_cpu; /* likewise: the CPU that it was dealt out on, or -1 */
    atomic_int n_clashes;

    /* Each on its own cache line. */
    _Alignas(64) _Atomic uint32_t n_finished;
    _Alignas(64) _Atomic uint32_t n_sleeping; /* workers in a futex wait */
    _Atomic uint32_t wakeups;                 /* the word they wait on */
    _Atomic uint32_t caller_sleeps;
    struct {
        _Alignas(64) _Atomic uint64_t left;
    } runs[PE_MAX_THREADS];
} pool = {.lock = PE_MUTEX_INIT};

/* Of the loop that this thread leads in the pool; NULL = none, or one that nobody can end. */
static _Thread_local pe_control *led;

/* ------------------------------------------------------------------ units */

static uint64_t run_make(int n_threads, uint64_t begin, uint64_t end) {
    return (uint64_t)(n_threads - 1) << 2 * UNIT_BITS | begin << UNIT_BITS | end;
}
static uint64_t run_begin(uint64_t run) { return run >> UNIT_BITS & max_units; }
static uint64_t run_end(uint64_t run) { return run & max_units; }
static bool run_is_open_to(uint64_t run, int thread) {
    return run_begin(run) < run_end(run) && (uint64_t)thread <= run >> 2 * UNIT_BITS;
}

/* Take the first unit of the thread's own run or the last one of another's. */
static bool claim_from(int owner, int thread, size_t *unit) {
    _Atomic uint64_t *left = &pool.runs[owner].left;
    uint64_t run = atomic_load_explicit(left, memory_order_acquire);
    while (run_is_open_to(run, thread)) {
        bool own = owner == thread;
        *unit = own ? run_begin(run) : run_end(run) - 1;
        if (atomic_compare_exchange_weak_explicit(left, &run, own ? run + ((uint64_t)1 << UNIT_BITS) : run - 1,
                                                  memory_order_acq_rel, memory_order_acquire))
            return true; /* else run now holds the newer value */
    }
    return false;
}

static bool claim(int thread, size_t *unit) {
    if (claim_from(thread, thread, unit)) return true;
    int n_threads = atomic_load_explicit(&pool.n_threads, memory_order_relaxed);
    for (int other = 0; other < n_threads; other++)
        if (other != thread && claim_from(other, thread, unit)) return true;
    return false;
}

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

/* Whoever sees the caller's flag makes it the call's own: units were skipped, whatever becomes of the flag. */
static bool is_cancelled(pe_control *control) {
    if (control == NULL) return false;
    if (atomic_load_explicit(&control->cancelled, memory_order_relaxed)) return true;
    if (control->cancel == NULL || __atomic_load_n(control->cancel, __ATOMIC_RELAXED) == 0) return false;
    atomic_store(&control->cancelled, true);
    return true;
}

void pe_request_cancel(int *cancel) { __atomic_store_n(cancel, 1, __ATOMIC_RELAXED); }

/* Claim and run units of the current loop until none is left, then report them. */
static void work(int thread) {
    size_t unit;
    uint32_t n_done = 0;
    while (claim(thread, &unit)) {
        if (thread == 0 && n_done % UNITS_PER_POLL == 0) poll_control(pool.control);
        if (!is_cancelled(pool.control)) pool.fn(pool.arg, unit, thread);
        n_done++;
    }
    if (n_done == 0) return;
    uint32_t n_units = (uint32_t)pool.n_units; /* after the report the loop may be gone */
    if (atomic_fetch_add(&pool.n_finished, n_done) + n_done == n_units && atomic_load(&pool.caller_sleeps))
        pe_wake_all(&pool.n_finished);
}

/* For a worker that holds no unit and has to wait: make way for those who want its CPU. False: sleep rather than spin.
 *
 * The caller may want it. Where other programs have the other CPUs, the kernel likes to wake workers on the caller's, and
 * there the two only take turns: the worker moves, and shares a CPU with another program instead.
 *
 * Or another program wants it, and goes first once a millisecond; the caller computes on meanwhile. A worker that keeps the
 * CPU until its time slice ends most often holds a unit then, and all threads wait for that unit through the slice of
 * the other program. */
static bool make_way(int64_t now, int64_t *yielded_ns) {
    int cpu = pe_current_cpu();
    if (cpu >= 0 && cpu == atomic_load_explicit(&pool.caller_cpu, memory_order_relaxed)) {
        atomic_fetch_add(&pool.n_clashes, 1);
        return pe_leave_cpu(cpu);
    }
    if (now - *yielded_ns < yield_interval_ns) return true;
    pe_yield();
    *yielded_ns = pe_now_ns();
    return true;
}

/* Whether the thread's own run has units. Spins for a while; nothing else is done when the wait is a short one.
 * *yielded_ns is when the worker last let others go first. */
static bool wait_for_run(int thread, int64_t *yielded_ns) {
    int64_t give_up = 0;
    for (;;) {
        for (int i = 0; i < 64; i++) {
            if (run_is_open_to(atomic_load_explicit(&pool.runs[thread].left, memory_order_acquire), thread)) return true;
            pe_cpu_relax();
        }
        int64_t now = pe_now_ns();
        if (give_up == 0) {
            give_up = now + spin_ns;
            if (!make_way(now, yielded_ns)) return false;
        }
        if (now >= give_up) return false;
    }
}

static void *worker(void *arg) {
    int thread = (int)(intptr_t)arg;
    int64_t yielded_ns = 0;
    pe_float_env_enter();
    while (!atomic_load(&pool.stopping)) {
        work(thread);
        uint32_t wakeups = atomic_load(&pool.wakeups);
        if (wait_for_run(thread, &yielded_ns) || atomic_load(&pool.stopping)) continue;
        /* Announce the sleep, then look once more: the caller publishes first and looks for sleepers second. */
        atomic_fetch_add(&pool.n_sleeping, 1);
        if (!run_is_open_to(atomic_load(&pool.runs[thread].left), thread) && !atomic_load(&pool.stopping))
            pe_sleep_while_equal(&pool.wakeups, wakeups, -1);
        atomic_fetch_sub(&pool.n_sleeping, 1);
    }
    return NULL;
}

static void wake_workers(void) {
    atomic_fetch_add(&pool.wakeups, 1);
    pe_wake_all(&pool.wakeups);
}

/* ------------------------------------------------------------------ lifetime */

/* Threads do not survive fork: the child begins with an empty pool, and the next loop or context starts workers again. If the
 * thread that forks leads a loop (its poll ran a signal handler that forked), units that workers had begun are lost: there is
 * nothing to wait for, and its call ends as cancelled. Until then the pool stays taken. */
static void forget_workers_in_child(void) {
    pe_mutex_reset_after_fork(&pool.lock);
    pe_sleep_reset_after_fork();
    pool.n_workers = 0;
    atomic_store(&pool.busy, led != NULL);
    if (led != NULL) {
        atomic_store(&led->cancelled, true);
        atomic_store(&pool.n_finished, (uint32_t)pool.n_units);
    }
    atomic_store(&pool.stopping, false);
    for (int thread = 0; thread < PE_MAX_THREADS; thread++) atomic_store(&pool.runs[thread].left, 0);
    atomic_store(&pool.n_sleeping, 0);
    atomic_store(&pool.caller_sleeps, 0);
}

/* With pool.lock held. */
static pe_status start_workers(int n_workers, char *err) {
    int failure = 0;
    while (pool.n_workers < n_workers && failure == 0) {
        failure = pe_thread_start(&pool.threads[pool.n_workers], worker, (void *)(intptr_t)(pool.n_workers + 1));
        if (failure == 0) pool.n_workers++;
    }
    if (failure == 0) return PE_OK;
    return pe_fail(PE_ERR_SYSTEM, err, "cannot start worker thread %d of %d: %s", pool.n_workers + 1, n_workers,
                   strerror(failure));
}

pe_status pe_pool_acquire(int n_threads, char *err) {
    pe_mutex_lock(&pool.lock);
    if (!pool.knows_forks) pe_at_fork_in_child(forget_workers_in_child);
    pool.knows_forks = true;
    pe_status status = start_workers(n_threads - 1, err);
    if (status == PE_OK) pool.n_users++;
    pe_mutex_unlock(&pool.lock);
    return status;
}

void pe_pool_release(void) {
    pe_mutex_lock(&pool.lock);
    if (--pool.n_users == 0) {
        atomic_store(&pool.stopping, true);
        wake_workers();
        for (int i = 0; i < pool.n_workers; i++) pe_thread_join(pool.threads[i]);
        pool.n_workers = 0;
        atomic_store(&pool.stopping, false);
    }
    pe_mutex_unlock(&pool.lock);
}

/* ------------------------------------------------------------------ loops */

static void run_alone(size_t n_units, pe_unit_fn fn, void *arg, pe_control *control) {
    for (size_t unit = 0; unit < n_units; unit++) {
        if (unit % UNITS_PER_POLL == 0) poll_control(control);
        if (is_cancelled(control)) return;
        fn(arg, unit, 0);
    }
}

/* All units are claimed; wait until those that workers hold are finished. (In the child of a fork the caller's own count twice.) */
static void wait_for_workers(uint32_t n_units) {
    int64_t give_up = 0;
    for (int i = 1; atomic_load_explicit(&pool.n_finished, memory_order_acquire) < n_units; i++) {
        pe_cpu_relax();
        if (i % 64 != 0) continue;
        int64_t now = pe_now_ns();
        if (give_up == 0) give_up = now + spin_ns;
        if (now < give_up) continue;
        atomic_store(&pool.caller_sleeps, 1);
        uint32_t n_finished = atomic_load(&pool.n_finished);
        if (n_finished < n_units) pe_sleep_while_equal(&pool.n_finished, n_finished, -1);
        atomic_store(&pool.caller_sleeps, 0);
    }
}

void pe_parallel_for(int n_threads, size_t n_units, pe_unit_fn fn, void *arg, pe_control *control) {
    bool free_before = false;
    if (n_threads < 2 || n_units < 2 || n_units > max_units ||
        !atomic_compare_exchange_strong(&pool.busy, &free_before, true)) {
        run_alone(n_units, fn, arg, control);
        return;
    }
    if (pool.n_workers < n_threads - 1) { /* after a fork */
        char err[PE_ERR_LEN];
        pe_mutex_lock(&pool.lock);
        start_workers(n_threads - 1, err); /* fewer workers only mean less help */
        pe_mutex_unlock(&pool.lock);
    }
    pool.fn = fn, pool.arg = arg, pool.n_units = n_units, pool.control = control;
    atomic_store(&pool.n_finished, 0);
    atomic_store(&pool.n_threads, n_threads);
    atomic_store_explicit(&pool.caller_cpu, pe_current_cpu(), memory_order_relaxed);
    for (uint64_t thread = (uint64_t)n_threads; thread-- > 0;) { /* the caller's last: workers need longer to begin */
        uint64_t begin = (thread * n_units + n_threads - 1) / n_threads,
                 end = ((thread + 1) * n_units + n_threads - 1) / n_threads;
        atomic_store(&pool.runs[thread].left, run_make(n_threads, begin, end));
    }
    if (atomic_load(&pool.n_sleeping) > 0) wake_workers();
    led = control;
    work(0);
    wait_for_workers((uint32_t)n_units);
    led = NULL;
    atomic_store(&pool.busy, false);
}

int pe_pool_count_clashes(void) { return atomic_load(&pool.n_clashes); }
