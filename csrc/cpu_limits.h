/* cpu_limits.h: what besides the affinity mask limits this process: a cgroup (cgroup.c) or a job object (job_object.c). */
#ifndef PE_CPU_LIMITS_H
#define PE_CPU_LIMITS_H

/* CPUs whose time the system gives to this process or to the group that it is in, like 1.5; 0 = no limit. */
double pe_cpu_quota(void);

#endif
