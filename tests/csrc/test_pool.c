/* test_pool.c: the thread pool runs every unit exactly once, whoever else uses it; and how many CPUs a cgroup allows. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cpu_limits.h"
#include "harness.h"
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
        if (rng_below(&r, 40) == 0) usleep(200); /* long enough for the workers to fall asleep */
    }
    pe_pool_release();
    free(l);
    return good ? NULL : "bad";
}

static void test_loops(void) {
    for (uintptr_t seed = 1; seed <= 8; seed++) CHECK(caller((void *)seed) == NULL, "one caller, seed %zu", (size_t)seed);
    pthread_t threads[N_CALLERS];
    for (uintptr_t i = 0; i < N_CALLERS; i++) pthread_create(&threads[i], NULL, caller, (void *)(100 + i));
    for (int i = 0; i < N_CALLERS; i++) {
        void *result = NULL;
        pthread_join(threads[i], &result);
        CHECK(result == NULL, "caller %d of %d at once", i, N_CALLERS);
    }
}

void test_pool(void) { test_loops(); }

/* ------------------------------------------------------------------ cgroups, on made-up files */

static char root[64];

static const char *path_of(const char *name) {
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", root, name);
    return path;
}

static void write_file(const char *name, const char *text) {
    for (size_t i = 1; name[i] != '\0'; i++) /* the directories above it */
        if (name[i] == '/') {
            char directory[128];
            snprintf(directory, sizeof directory, "%.*s", (int)i, name);
            mkdir(path_of(directory), 0700);
        }
    FILE *file = fopen(path_of(name), "w");
    if (!CHECK(file != NULL, "cannot write %s", name)) return;
    fputs(text, file);
    fclose(file);
}

static void expect_quota(const char *groups, double expected) {
    char mount[96], list[96];
    write_file("groups", groups);
    snprintf(mount, sizeof mount, "%s/mount", root), snprintf(list, sizeof list, "%s/groups", root);
    double got = pe_cgroup_quota(list, mount);
    CHECK(got == expected, "'%s' gives %g CPUs, expected %g", groups, got, expected);
}

static void expect_throttling(const char *groups, int64_t n_periods, int64_t n_throttled, int64_t throttled_us) {
    char mount[96], list[96];
    write_file("groups", groups);
    snprintf(mount, sizeof mount, "%s/mount", root), snprintf(list, sizeof list, "%s/groups", root);
    pe_throttling got;
    pe_cgroup_throttling(list, mount, &got);
    CHECK(got.n_periods == n_periods && got.n_throttled == n_throttled && got.throttled_us == throttled_us,
          "'%s' gives %lld of %lld, %lld us", groups, (long long)got.n_throttled, (long long)got.n_periods,
          (long long)got.throttled_us);
}

static void test_throttling(void) {
    write_file("mount/a/cpu.stat", "usage_usec 5\nuser_usec 4\nsystem_usec 1\n"); /* no quota: no counters */
    write_file("mount/a/b/cpu.stat", "usage_usec 5\nnr_periods 40\nnr_throttled 30\nthrottled_usec 1234567\nnr_bursts 0\n");
    write_file("mount/a/b/c/cpu.stat", "nr_periods 2\nnr_throttled 1\nthrottled_usec 10\n");
    write_file("mount/broken/cpu.stat", "nr_periods\nnr_throttled many\nthrottled_usec -5\n\n\n");
    write_file("mount/cpu/v1/cpu.stat", "nr_periods 9\nnr_throttled 8\nthrottled_time 7000000\n");
    expect_throttling("", 0, 0, 0);
    expect_throttling("nonsense\n::\n0:\n", 0, 0, 0);
    expect_throttling("0::/a\n", 0, 0, 0);
    expect_throttling("0::/a/b\n", 40, 30, 1234567);
    expect_throttling("0::/a/b/c\n", 42, 31, 1234577); /* whoever's quota it is, we stand still */
    expect_throttling("0::/a/b/not/mounted/here\n", 40, 30, 1234567);
    expect_throttling("0::/broken\n", 0, 0, 0);
    expect_throttling("4:cpu,cpuacct:/v1\n", 9, 8, 7000);
    expect_throttling("4:memory:/v1\n", 0, 0, 0);
    expect_throttling("4:cpu:/v1\n0::/a/b\n", 49, 38, 1241567);
}

static void remove_all(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", root);
    CHECK(system(command) == 0, "%s", command);
}

void test_cpu_limits(void) {
    const char *directory = getenv("TMPDIR");
    snprintf(root, sizeof root, "%.40s/pe_test_XXXXXX", directory != NULL ? directory : "/tmp");
    if (!CHECK(mkdtemp(root) != NULL, "no temporary directory %s", root)) return;
    write_file("mount/a/cpu.max", "max 100000\n");
    write_file("mount/a/b/cpu.max", "150000 100000\n");
    write_file("mount/a/b/c/cpu.max", "400000 100000\n");
    write_file("mount/broken/cpu.max", "many few\n");
    write_file("mount/zero/cpu.max", "0 0\n");
    write_file("mount/cpu/v1/cpu.cfs_quota_us", "50000\n");
    write_file("mount/cpu/v1/cpu.cfs_period_us", "100000\n");
    write_file("mount/cpu/free/cpu.cfs_quota_us", "-1\n");
    write_file("mount/cpu/free/cpu.cfs_period_us", "100000\n");
    expect_quota("", 0);
    expect_quota("nonsense\n::\n0:\n", 0);
    expect_quota("0::/a\n", 0);
    expect_quota("0::/a/b\n", 1.5);
    expect_quota("0::/a/b/c\n", 1.5);               /* a parent's limit holds */
    expect_quota("0::/a/b/c/not/mounted/here\n", 1.5);
    expect_quota("0::/broken\n", 0);
    expect_quota("0::/zero\n", 0);
    expect_quota("4:memory:/v1\n", 0);
    expect_quota("4:cpu,cpuacct:/v1\n", 0.5);
    expect_quota("4:cpuacct,cpu:/v1\n", 0.5);
    expect_quota("4:cpuset:/v1\n3:cpuacct:/v1\n", 0);
    expect_quota("4:cpu:/free\n", 0);
    expect_quota("4:cpu,cpuacct:/v1\n0::/a/b\n", 0.5); /* both kinds: the lesser */
    test_throttling();
    write_file("mount/cpu.max", "100000 100000\n"); /* inside a container: the path is the host's, the root is ours */
    expect_quota("0::/kubepods/pod1234/abcd\n", 1);
    remove_all();
    CHECK(pe_cgroup_quota("/nonexistent", "/nonexistent") == 0, "no cgroups at all");

    pe_throttling throttling;
    pe_throttling_get(&throttling);
    CHECK(throttling.n_throttled <= throttling.n_periods, "throttled in more periods than there were");
    pe_thread_info info;
    pe_thread_info_get(&info);
    CHECK(info.n_affinity >= 1 && info.n_default >= 1 && info.n_default <= PE_MAX_THREADS, "%d of %d", info.n_default, info.n_affinity);
    CHECK(info.cpu_quota == 0 || info.n_default <= (info.cpu_quota < 1 ? 1 : info.cpu_quota), "%d of %g", info.n_default, info.cpu_quota);
}
