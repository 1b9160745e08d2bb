# cython: language_level=3
"""The step lock: who computes now, and how the others wait."""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint32_t

from pyengine.errors import PyEngineError


cdef extern from "platform.h" nogil:
    ctypedef uint32_t atomic_uint32 "_Atomic uint32_t"
    void pe_sleep_while_equal(atomic_uint32 *word, uint32_t value, int64_t timeout_ns)
    void pe_wake_all(atomic_uint32 *word)
    uint32_t load32 "atomic_load" (atomic_uint32 *word)
    uint32_t add32 "atomic_fetch_add" (atomic_uint32 *word, uint32_t n)

cdef extern from "pythread.h":
    unsigned long PyThread_get_thread_ident()

# A sleeping thread looks for signals so often.
cdef int64_t SLEEP_NS = 20 * 1000 * 1000

# Threads that are in a caller's own function, which a step has called.
cdef set guests = set()
# Those of them whose step's lock a fork has taken meanwhile, and a number that changes when one gets it back.
cdef set passed = set()
cdef atomic_uint32 n_returned


def call_guest(function, *args):
    """function(*args), a caller's own, in the middle of a step. Until it returns, this thread may wait for no step lock: that of
    the engine whose step this is it has already, and who has another's may be in such a function and wait for this one. No
    exception, wherever it is raised, can leave the thread marked. A fork does not wait for the function, but this for the fork."""
    cdef object me = PyThread_get_thread_ident()
    cdef uint32_t news
    guests.add(me)
    try:
        return function(*args)
    finally:
        while me in passed:
            news = load32(&n_returned)
            with nogil:
                pe_sleep_while_equal(&n_returned, news, SLEEP_NS)
        guests.discard(me)


@cython.auto_pickle(False)  # clang cannot compare what C calls atomic with a literal, and nobody pickles a lock
cdef class StepLock:
    """A lock and a condition in one: one thread at a time computes, for all, and the others sleep until there is news.

    Taking it, calling and giving it back are one compiled call: no exception, wherever it is raised, can leave it taken.

    A caller that computes keeps it from step to step, so whoever needs it for something else says so (`is_wanted`), and comes
    before the next who computes.

    Its fields change under the interpreter's lock; the wait is a sleep on `counter`, so no news is missed.
    """

    cdef atomic_uint32 counter
    cdef unsigned long holder  # thread, 0 = nobody
    cdef bint in_call  # inside of a call
    cdef int depth  # of acquire by the holder
    cdef unsigned long suspended  # thread inside of a call that `acquire` has passed, 0 = none
    cdef int n_sleeping
    cdef int n_wanting  # threads in `exclusively` or `acquire` that have to wait
    cdef object __weakref__

    @property
    def news(self) -> int:
        """A number that changes with every notify. Read it before looking whether there is news for you."""
        return load32(&self.counter)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it who does not compute: between two steps its holder should give it back."""
        return self.n_wanting > 0

    def notify(self) -> None:
        """Wake whoever waits: something may have come for it."""
        self.wake()

    cdef void wake(self) noexcept:
        add32(&self.counter, 1)
        if self.n_sleeping > 0:
            pe_wake_all(&self.counter)

    cdef void sleep_while(self, uint32_t news) noexcept:
        """At most SLEEP_NS: whoever calls it looks for signals after it."""
        self.n_sleeping += 1
        with nogil:
            pe_sleep_while_equal(&self.counter, news, SLEEP_NS)
        self.n_sleeping -= 1

    cdef int check_free_of(self, unsigned long me) except -1:
        if len(guests) > 0 and me in guests:
            raise PyEngineError("a logits_processor or stopping_criteria cannot use an engine: a step waits for it")
        if self.holder == me:
            raise PyEngineError("this engine is at work in this very thread (a signal handler cannot use it)")
        return 0

    def run(self, uint32_t news, function, *args) -> bool:
        """Call function(*args), which computes, with the lock as soon as nobody else has it or wants it: True. Or return
        False when there is news first, newer than `news`. Raises PyEngineError in a signal handler that runs inside of such
        a call, or in a guest of one."""
        cdef unsigned long me = PyThread_get_thread_ident()
        self.check_free_of(me)
        while self.holder != 0 or self.n_wanting > 0:
            if load32(&self.counter) != news:
                return False
            self.sleep_while(news)
            PyErr_CheckSignals()
        self.call(me, function, args)
        return True

    def exclusively(self, function, *args) -> None:
        """Call function(*args) with the lock, between two steps. Raises PyEngineError like `run`."""
        cdef unsigned long me = PyThread_get_thread_ident()
        self.check_free_of(me)
        self.wait_until_free(me, False)
        self.call(me, function, args)

    def try_run(self, function, *args) -> bool:
        """Call function(*args) with the lock if nobody has it now."""
        if self.holder != 0:
            return False
        self.call(PyThread_get_thread_ident(), function, args)
        return True

    cdef int wait_until_free(self, unsigned long me, bint for_fork) except -1:
        """Until nobody but this thread has it. A signal handler that runs meanwhile may compute, so nobody is wanting then.
        for_fork: or a guest, whose step is as good as one that an exception has ended."""
        try:
            while self.holder != 0 and self.holder != me:
                if for_fork and self.holder in guests:
                    break
                self.n_wanting += 1
                self.sleep_while(load32(&self.counter))
                self.n_wanting -= 1
                PyErr_CheckSignals()
        finally:
            self.wake()  # those that compute waited for this one, too
        return 0

    cdef int call(self, unsigned long me, function, args) except -1:
        self.holder, self.in_call = me, True
        try:
            function(*args)
        finally:
            self.in_call = False
            if self.depth == 0:
                self.holder = 0
            self.wake()
        return 0

    def acquire(self) -> bool:
        """Wait for the lock and keep it, for a fork. By the thread that has it: once more. True."""
        cdef unsigned long me = PyThread_get_thread_ident()
        self.wait_until_free(me, True)
        if self.holder != 0 and self.holder != me:
            self.suspended = self.holder
            passed.add(self.holder)
        self.holder = me
        self.depth += 1
        return True

    def release(self) -> None:
        """Give back what `acquire` took. In the child of a fork: nobody else exists there."""
        self.depth -= 1
        if self.depth == 0 and self.suspended != 0:
            self.holder, self.suspended = self.suspended, 0
            passed.discard(self.holder)
            add32(&n_returned, 1)
            pe_wake_all(&n_returned)
        elif self.depth == 0 and not self.in_call:
            self.holder = 0
            self.wake()

    def after_fork_in_child(self) -> None:
        """The threads that slept do not exist here, nor one inside of a call."""
        cdef unsigned long me = PyThread_get_thread_ident()
        guests.intersection_update((me,))
        passed.clear()
        if self.suspended != 0 or self.holder != me:
            self.suspended, self.in_call = 0, False
        if self.holder != me:
            self.holder = 0
        self.n_sleeping = 0
        self.n_wanting = 0
