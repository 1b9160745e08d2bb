/* cpu_limits.c: how many CPUs this process may really use: its affinity mask and its cgroup's quota, whichever is less.
 * Threads beyond a quota do not run slower, they make the whole group stop until the next period: engines that count
 * cores instead lose a factor of ten and more inside containers. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cpu_limits.h"
#include "pyengine.h"
#include "threadpool.h"

#if defined(__linux__)
static int count_affinity(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    long online = sysconf(_SC_NPROCESSORS_ONLN); /* more CPUs than cpu_set_t holds */
    return online > 0 ? (int)online : 1;
}

/* quota / period of a cgroup v2 directory ("max 100000" = none), 0 if there is none. */
static double quota_v2(const char *directory) {
    char path[4200];
    double quota, period;
    snprintf(path, sizeof path, "%s/cpu.max", directory);
    FILE *file = fopen(path, "re");
    if (file == NULL) return 0;
    int n = fscanf(file, "%lf %lf", &quota, &period);
    fclose(file);
    return n == 2 && quota > 0 && period > 0 ? quota / period : 0;
}

static double read_number(const char *directory, const char *name) {
    char path[4200];
    double value;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "re");
    if (file == NULL) return -1;
    int n = fscanf(file, "%lf", &value);
    fclose(file);
    return n == 1 ? value : -1;
}

static double quota_v1(const char *directory) {
    double quota = read_number(directory, "cpu.cfs_quota_us"), period = read_number(directory, "cpu.cfs_period_us");
    return quota > 0 && period > 0 ? quota / period : 0;
}

/* The least quota from `root``path` up to `root`: limits of parents hold for their children. */
static double least_quota(const char *root, const char *path, double (*read_quota)(const char *)) {
    char directory[4096];
    double least = 0;
    snprintf(directory, sizeof directory, "%s%s", root, path);
    for (;;) {
        double quota = read_quota(directory);
        if (quota > 0 && (least == 0 || quota < least)) least = quota;
        char *slash = strrchr(directory, '/');
        if (slash == NULL || (size_t)(slash - directory) < strlen(root)) return least;
        *slash = '\0';
    }
}

/* Whether `name` is one of the comma-separated controllers of a v1 hierarchy. */
static int has_controller(const char *controllers, const char *name) {
    size_t length = strlen(name);
    for (const char *p = controllers; p != NULL; p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL)
        if (strncmp(p, name, length) == 0 && (p[length] == '\0' || p[length] == ',')) return 1;
    return 0;
}

/* Lines of /proc/self/cgroup: "0::/path" for v2, "3:cpu,cpuacct:/path" for v1. Inside a container the path may be the
 * host's and not exist here; then the root of the mount is this group, which least_quota reaches last. */
double pe_cgroup_quota(const char *groups, const char *mount) {
    FILE *file = fopen(groups, "re");
    if (file == NULL) return 0;
    char line[4096], mount_v1[4096];
    double least = 0;
    snprintf(mount_v1, sizeof mount_v1, "%s/cpu", mount);
    while (fgets(line, sizeof line, file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (path == NULL) continue;
        *path++ = '\0';
        controllers++;
        double quota = 0;
        if (controllers[0] == '\0') {
            quota = least_quota(mount, path, quota_v2);
        } else if (has_controller(controllers, "cpu")) {
            quota = least_quota(mount_v1, path, quota_v1);
        }
        if (quota > 0 && (least == 0 || quota < least)) least = quota;
    }
    fclose(file);
    return least;
}
#else
static int count_affinity(void) {
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}
double pe_cgroup_quota(const char *groups, const char *mount) {
    (void)groups, (void)mount;
    return 0;
}
#endif

void pe_thread_info_get(pe_thread_info *info) {
    info->n_affinity = count_affinity();
    info->cpu_quota = pe_cgroup_quota("/proc/self/cgroup", "/sys/fs/cgroup");
    info->n_default = info->n_affinity;
    if (info->cpu_quota > 0 && info->cpu_quota < info->n_default)
        info->n_default = info->cpu_quota < 1 ? 1 : (int)info->cpu_quota;
    if (info->n_default < 1) info->n_default = 1;
    if (info->n_default > PE_MAX_THREADS) info->n_default = PE_MAX_THREADS;
}
