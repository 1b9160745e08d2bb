/* job_object.c: Windows' quota: containers, services and schedulers put their processes into a job object, whose CPU rate may be
 * capped. How often that has stopped the process is not counted anywhere. */
#if defined(_WIN32) /* elsewhere the file is empty, so that whoever compiles all of csrc/ need not know */
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include "cpu_limits.h"
#include "pyengine.h"

double pe_cpu_quota(void) {
    const double whole_machine = 10000; /* the rate is in hundredths of a per cent of all CPUs together */
    JOBOBJECT_CPU_RATE_CONTROL_INFORMATION rate = {0};
    if (!QueryInformationJobObject(NULL, JobObjectCpuRateControlInformation, &rate, sizeof rate, NULL)) return 0; /* in no job */
    DWORD hard = JOB_OBJECT_CPU_RATE_CONTROL_ENABLE | JOB_OBJECT_CPU_RATE_CONTROL_HARD_CAP;
    if ((rate.ControlFlags & hard) != hard) return 0;
    return rate.CpuRate / whole_machine * GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
}

void pe_throttling_get(pe_throttling *out) { *out = (pe_throttling){0}; }

#endif
