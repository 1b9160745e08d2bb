/* cgroup.h: the part of cgroup.c that reads files, with the files as parameters so that it can be tested on made-up ones. */
#ifndef PE_CGROUP_H
#define PE_CGROUP_H

#include "pyengine.h"

/* CPUs that a cgroup may use, 0 = no limit. groups: a file like /proc/self/cgroup; mount: the directory like
 * /sys/fs/cgroup below which v2 groups lie directly and v1 groups of the cpu controller under cpu/. Anything unreadable
 * or malformed is no limit. */
double pe_cgroup_quota(const char *groups, const char *mount);
/* Sums of the counters in the cpu.stat files of these groups and their parents; what is unreadable counts 0. */
void pe_cgroup_throttling(const char *groups, const char *mount, pe_throttling *out);

#endif
