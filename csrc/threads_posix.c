/* threads_posix.c: the threads of platform.h; a file of their own, so that only who starts threads is linked with it. */
#define _GNU_SOURCE
#include <signal.h>

#include "platform.h"

int pe_thread_start(pe_thread *thread, void *(*fn)(void *), void *arg) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failure = pthread_create(thread, NULL, fn, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failure;
}

void *pe_thread_join(pe_thread thread) {
    void *result = NULL;
    pthread_join(thread, &result);
    return result;
}
