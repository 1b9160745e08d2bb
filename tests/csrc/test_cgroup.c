/* test_cgroup.c: how many CPUs a cgroup allows and how often it stopped us, from made-up files. Not for Windows. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cgroup.h"
#include "harness.h"

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

void test_cgroups(void) {
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
}
