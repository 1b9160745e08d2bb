/* cgroup.c: Linux' quota, and how often it has made this process stand still. Where there are no cgroups, their files are
 * missing, and that is no limit. */
#include "cgroup.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "cpu_limits.h"

static const char self_groups[] = "/proc/self/cgroup", cgroup_mount[] = "/sys/fs/cgroup";

static FILE *open_in(const char *directory, const char *name) {
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return fopen(path, "re");
}

/* ------------------------------------------------------------------ the groups that this process is in */

/* One directory of a cgroup hierarchy, v1 or v2, whose files are to be read into arg. */
typedef void (*visit_fn)(const char *directory, bool is_v1, void *arg);

/* From `root``path` up to `root`: limits of parents hold for their children. */
static void visit_upwards(const char *root, const char *path, bool is_v1, visit_fn visit, void *arg) {
    char directory[4096];
    snprintf(directory, sizeof directory, "%s%s", root, path);
    for (;;) {
        visit(directory, is_v1, arg);
        char *slash = strrchr(directory, '/');
        if (slash == NULL || (size_t)(slash - directory) < strlen(root)) return;
        *slash = '\0';
    }
}

/* Whether `name` is one of the comma-separated controllers of a v1 hierarchy. */
static bool has_controller(const char *controllers, const char *name) {
    size_t length = strlen(name);
    for (const char *p = controllers; p != NULL; p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL)
        if (strncmp(p, name, length) == 0 && (p[length] == '\0' || p[length] == ',')) return true;
    return false;
}

/* Lines of /proc/self/cgroup: "0::/path" for v2, "3:cpu,cpuacct:/path" for v1. Inside a container the path may be the
 * host's and not exist here; then the root of the mount is this group, which visit_upwards reaches last. */
static void visit_groups(const char *groups, const char *mount, visit_fn visit, void *arg) {
    FILE *file = fopen(groups, "re");
    if (file == NULL) return;
    char line[4096], mount_v1[4096];
    snprintf(mount_v1, sizeof mount_v1, "%s/cpu", mount);
    while (fgets(line, sizeof line, file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (path == NULL) continue;
        *path++ = '\0';
        controllers++;
        if (controllers[0] == '\0') visit_upwards(mount, path, false, visit, arg);
        if (has_controller(controllers, "cpu")) visit_upwards(mount_v1, path, true, visit, arg);
    }
    fclose(file);
}

/* ------------------------------------------------------------------ quota */

static double read_number(const char *directory, const char *name) {
    double value;
    FILE *file = open_in(directory, name);
    if (file == NULL) return -1;
    int n = fscanf(file, "%lf", &value);
    fclose(file);
    return n == 1 ? value : -1;
}

/* The least quota / period so far, in CPUs, into *(double *)arg. */
static void visit_quota(const char *directory, bool is_v1, void *arg) {
    double quota = -1, period = -1, *least = arg;
    if (is_v1) {
        quota = read_number(directory, "cpu.cfs_quota_us"), period = read_number(directory, "cpu.cfs_period_us");
    } else {
        FILE *file = open_in(directory, "cpu.max"); /* "max 100000" = none */
        if (file == NULL) return;
        if (fscanf(file, "%lf %lf", &quota, &period) != 2) quota = -1;
        fclose(file);
    }
    if (quota > 0 && period > 0 && (*least == 0 || quota / period < *least)) *least = quota / period;
}

double pe_cgroup_quota(const char *groups, const char *mount) {
    double least = 0;
    visit_groups(groups, mount, visit_quota, &least);
    return least;
}

double pe_cpu_quota(void) { return pe_cgroup_quota(self_groups, cgroup_mount); }

/* ------------------------------------------------------------------ throttling */

/* Add the counters of one cpu.stat to *(pe_throttling *)arg; v1 counts nanoseconds. */
static void visit_throttling(const char *directory, bool is_v1, void *arg) {
    (void)is_v1; /* the names tell */
    pe_throttling *sum = arg;
    FILE *file = open_in(directory, "cpu.stat");
    if (file == NULL) return;
    char line[256], name[64];
    long long value;
    while (fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line, "%63s %lld", name, &value) != 2 || value < 0) continue;
        if (strcmp(name, "nr_periods") == 0) sum->n_periods += value;
        if (strcmp(name, "nr_throttled") == 0) sum->n_throttled += value;
        if (strcmp(name, "throttled_usec") == 0) sum->throttled_us += value;
        if (strcmp(name, "throttled_time") == 0) sum->throttled_us += value / 1000;
    }
    fclose(file);
}

void pe_cgroup_throttling(const char *groups, const char *mount, pe_throttling *out) {
    *out = (pe_throttling){0};
    visit_groups(groups, mount, visit_throttling, out);
}

void pe_throttling_get(pe_throttling *out) { pe_cgroup_throttling(self_groups, cgroup_mount, out); }
