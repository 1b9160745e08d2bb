/* status.h: how a function of the core fails: one sentence into the caller's buffer, one status out. */
#ifndef PE_STATUS_H
#define PE_STATUS_H

#include "pyengine.h"

/* Write the sentence into err[PE_ERR_LEN] (cut if it is longer) and return `status`:
 *     return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "n_threads is %d, expected 0 to %d", n, most); */
pe_status pe_fail(pe_status status, char *err, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
