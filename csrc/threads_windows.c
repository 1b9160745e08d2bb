/* threads_windows.c: the threads of platform.h; a file of their own, so that only who starts threads is linked with it. */
#if defined(_WIN32) /* elsewhere the file is empty, so that whoever compiles all of csrc/ need not know */
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include <errno.h>
#include <process.h>
#include <stdlib.h>

#include "platform.h"

struct pe_windows_thread {
    HANDLE handle;
    void *(*fn)(void *);
    void *arg, *result;
};

static unsigned __stdcall run_thread(void *arg) {
    pe_thread thread = arg;
    thread->result = thread->fn(thread->arg);
    return 0;
}

int pe_thread_start(pe_thread *out, void *(*fn)(void *), void *arg) {
    pe_thread thread = malloc(sizeof *thread);
    if (thread == NULL) return ENOMEM;
    *thread = (struct pe_windows_thread){.fn = fn, .arg = arg};
    thread->handle = (HANDLE)_beginthreadex(NULL, 0, run_thread, thread, 0, NULL); /* not CreateThread: fn may use C's library */
    if (thread->handle == NULL) {
        int failure = errno;
        free(thread);
        return failure;
    }
    *out = thread;
    return 0;
}

void *pe_thread_join(pe_thread thread) {
    WaitForSingleObject(thread->handle, INFINITE);
    CloseHandle(thread->handle);
    void *result = thread->result;
    free(thread);
    return result;
}

#endif
