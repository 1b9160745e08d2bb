/* threads_posix.c: the threads of platform.h; a file of their own, so that only who starts threads is linked with it. */
#define _GNU_SOURCE
#include <signal.h>

#include "platform.h"

int pe_thread_start(pe_thread *thread, void *(*fn)(void *), void *arg) {
    /* Signals stay with the application's threads, but for those that tell of a thread's own fault: were they blocked, the
     * system would end the process without asking the application's handler. */
    const int faults[] = {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP};
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++) sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int failure = pthread_create(thread, NULL, fn, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failure;
}

void *pe_thread_join(pe_thread thread) {
    void *result = NULL;
    pthread_join(thread, &result);
    return result;
}
