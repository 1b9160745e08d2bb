/* status.c: see status.h; and code -> message. */
#include "status.h"

#include <stdarg.h>
#include <stdio.h>

static const char *const messages[PE_STATUS_COUNT] = {
    [PE_OK] = "no error",
    [PE_ERR_INVALID_ARGUMENT] = "an argument is out of range",
    [PE_ERR_OUT_OF_MEMORY] = "out of memory",
    [PE_ERR_FORMAT] = "the model file is damaged or inconsistent",
    [PE_ERR_CONTEXT_FULL] = "the tokens do not fit the context",
    [PE_ERR_NOT_FINITE] = "an infinity or NaN appeared in the computation",
    [PE_ERR_CANCELLED] = "the call was cancelled",
    [PE_ERR_SYSTEM] = "the operating system refused a request",
    [PE_ERR_UNSUPPORTED_ISA] = "this instruction set is not available",
};

const char *pe_status_message(pe_status status) {
    if ((unsigned)status >= PE_STATUS_COUNT) return "unknown status";
    return messages[status];
}

pe_status pe_fail(pe_status status, char *err, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err, PE_ERR_LEN, format, args);
    va_end(args);
    return status;
}
