/* cpu_limits.c: how many CPUs this process may really use: its affinity mask and its group's quota, whichever is less.
 * Threads beyond a quota do not run slower, they make the whole group stop until the next period: engines that count
 * cores instead lose a factor of ten and more inside containers. */
#include "cpu_limits.h"

#include "platform.h"
#include "pyengine.h"
#include "threadpool.h"

void pe_thread_info_get(pe_thread_info *info) {
    info->n_affinity = pe_count_cpus();
    info->cpu_quota = pe_cpu_quota();
    info->n_default = info->n_affinity;
    if (info->cpu_quota > 0 && info->cpu_quota < info->n_default)
        info->n_default = info->cpu_quota < 1 ? 1 : (int)info->cpu_quota;
    if (info->n_default < 1) info->n_default = 1;
    if (info->n_default > PE_MAX_THREADS) info->n_default = PE_MAX_THREADS;
}
