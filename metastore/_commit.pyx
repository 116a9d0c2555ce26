"""Group commit: many threads ask, one leader writes for all of them.

A request joins the queue. Whoever finds no leader leads: it takes the queue, numbers
its frames, writes them with one call, syncs once, hands the lead to the first that
waits by then, and lets its group go. While many wait it goes on itself, for some
groups.

This is in C since a sync lasts as long as thousands of bytecodes: neither to wait nor
to wake nor to write takes the GIL, so a thread that keeps it delays nobody's write. It
is also why an interrupt cannot come between two steps: it waits for the call's return.
A file without a descriptor (as in tests) is written to by its methods, with the GIL;
all else is the same for both.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport strerror

from metastore.errors import StoreClosedError

cdef extern from "_kernels.h" nogil:
    const size_t MS_HEADER
    void ms_init()
    void ms_finish_frame(
        uint8_t* frame, uint32_t seed, uint64_t sequence, uint64_t durable
    )
    uint32_t ms_load_u32(const uint8_t* at)
    uint64_t ms_load_u64(const uint8_t* at)

# Semaphores, where the system has them; they need no GIL.
cdef extern from "pythread.h" nogil:
    ctypedef void* PyThread_type_lock
    PyThread_type_lock PyThread_allocate_lock()
    void PyThread_free_lock(PyThread_type_lock)
    int PyThread_acquire_lock(PyThread_type_lock, int)
    void PyThread_release_lock(PyThread_type_lock)

cdef extern from "_turnstile.h" nogil:
    void ms_turn_await()
    void ms_turn_begin()
    void ms_turn_end()
    void ms_turn_hold()

cdef extern from * nogil:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <pthread.h>
    #include <sys/uio.h>
    #include <unistd.h>

    #if defined(__APPLE__)
    #define ms_sync(descriptor) fcntl(descriptor, F_FULLFSYNC)
    #else
    #define ms_sync(descriptor) fdatasync(descriptor)
    #endif

    /* Begin to write to the medium what was written to the file. What becomes of it
     * the next sync tells: an error here is none yet. */
    static void ms_begin_sync(int descriptor, long long offset, size_t size) {
    #if defined(__linux__)
        sync_file_range(descriptor, offset, size, SYNC_FILE_RANGE_WRITE);
    #endif
    }

    /* How often this process, or one that it descends from, was forked. A signal
     * handler may fork, and the child return into any call of the store: what a tail
     * refers to by then was closed, and its number may be that of another file. */
    static int ms_n_forks;
    static void ms_begin_child(void) {
        ms_n_forks++;
        ms_turn_forget();
    }
    static int ms_count_forks(void) {
        return pthread_atfork(NULL, NULL, ms_begin_child);
    }

    #define ms_thread() ((uintptr_t)pthread_self())
    #define MS_AHEAD_SIZE_MAX (1 << 20)
    static uint8_t ms_zeros[MS_AHEAD_SIZE_MAX];
    """
    ctypedef struct pthread_mutex_t:
        pass
    struct iovec:
        void* iov_base
        size_t iov_len
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)
    ssize_t pwritev(int, const iovec*, int, long long)
    int ms_sync(int)
    void ms_begin_sync(int, long long, size_t)
    const int ms_n_forks
    int ms_count_forks()
    uintptr_t ms_thread()
    const size_t MS_AHEAD_SIZE_MAX
    uint8_t* ms_zeros

cdef extern from "Python.h":
    str PyUnicode_DecodeLocale(const char*, const char*)

ms_init()
if ms_count_forks():
    raise MemoryError

# Zeros are written ahead of small frames, so that their sync writes no metadata: as
# much as the log is long, within these bounds. Frames above the last size bring none.
cdef enum:
    AHEAD_FRAMES_MAX = 64 << 10
    # What is to be synced is written in pieces, so that the device works on the first
    # while the next is copied (C4: 13% to 19% less for a batch of 2.4 MB).
    PIECE_SIZE = 512 << 10
    # Frames of one write: with the zeros fewer than the 1,024 that Linux takes.
    GROUP_MAX = 1000
    # With so many waiting the leader goes on, up to so many groups: to wake an heir
    # among that many threads takes as long as a sync.
    MANY_WAITING = 8
    LEAD_MAX = 8
    # Data of a heap packs 9 times; what packs better than this counts as if it did not.
    WEIGHED_RATIO_MAX = 16
    # In place of an errno: a method of the file has raised; nothing was tried, since
    # nothing may be written any more; all is written, but the log has to rotate; the
    # log has its end frame, and what was written behind it would never be read; the log
    # is the parent's of this forked process.
    RAISED = -1
    REFUSED = -2
    DUE = -3
    SEALED = -4
    FORKED = -5


cdef inline uint64_t _weight(
    uint64_t size, uint64_t n_records, uint64_t user_data_size
) noexcept nogil:
    return max(size, (20 * n_records + user_data_size) // WEIGHED_RATIO_MAX)


def weight(uint64_t size, uint64_t n_records, uint64_t user_data_size):
    """Return what so many bytes of a file count for where they bound a recovery.

    Their size; what packs better than 16 times as if it packed so well, since a
    recovery holds it unpacked.
    """
    return _weight(size, n_records, user_data_size)


cdef class Tail:
    """The end of the active log: where the next frame goes. One thread at a time.

    After a failure, and behind an end frame, nothing is written or synced any more: a
    sync tried again may succeed although what it failed to write is lost. That is kept
    here, where no interrupt can come between the failure and its keeping.

    Parameters
    ----------
    file : FileProtocol
        The log. Its owner closes it, and only while nobody appends.
    path : str
        Its name in errors.
    seed : int
        Of the frames' header checksums.
    sequence : int
        Of the next batch.
    size : int
        Where the next frame goes.
    zeroed_size : int
        Up to where the file holds zeros already; later as many at least are written
        ahead.

    Attributes
    ----------
    weight : int
        What the log counts for: `size`, or more where its frames pack well (see
        :func:`weight`).
    """

    cdef object _file
    cdef str _path
    cdef int _descriptor
    cdef uint32_t _seed
    cdef readonly uint64_t sequence
    cdef readonly uint64_t size
    cdef readonly uint64_t weight
    cdef uint64_t _zeroed_size
    cdef uint64_t _ahead_size_min
    cdef object _raised
    #: An errno, RAISED or SEALED, once nothing may be written any more; else 0.
    cdef int _ended
    cdef int _n_forks

    def __init__(
        self, file, str path, uint32_t seed, uint64_t sequence, uint64_t size,
        uint64_t zeroed_size
    ):
        self._file = file
        self._path = path
        self._descriptor = file.descriptor
        self._seed = seed
        self.sequence = sequence
        self.size = self.weight = size
        self._zeroed_size = self._ahead_size_min = zeroed_size
        self._ended = 0
        self._n_forks = ms_n_forks

    cdef int _end(self) noexcept nogil:
        """Return why nothing may be written any more, or 0."""
        return self._ended if self._n_forks == ms_n_forks else FORKED

    @property
    def failure(self):
        """What ended it: an exception, or None."""
        return self.error(self._end()) if self._end() else None

    def seal(self, bytearray end not None):
        """Write a started end frame and make it durable; all before must be already."""
        cdef iovec buffers[2]
        cdef uint64_t last = self.sequence - 1
        cdef int error
        if self._end():
            raise self.error(self._end())
        _point_at(buffers, end)
        ms_finish_frame(<uint8_t*>buffers[0].iov_base, self._seed, last, last)
        with nogil:
            error = self._write(buffers, 1, True)
            if not error:
                error = self.sync()
            if not error:
                self._ended = SEALED
        if error:
            raise self.error(error)

    cdef int append(
        self, iovec* frames, int n, uint64_t durable, bint sync
    ) noexcept nogil:
        """Number and write `n` started frames; return 0 or what ended the log.

        There is room for one more behind `frames`, which are changed. With `sync` the
        caller syncs next, and the device may begin.
        """
        cdef uint64_t size, excess = 0
        cdef uint8_t* frame
        cdef int i, error
        if self._end():
            return self._end()
        for i in range(n):
            frame = <uint8_t*>frames[i].iov_base
            ms_finish_frame(frame, self._seed, self.sequence + i, durable)
            size = frames[i].iov_len
            excess += _weight(
                size, ms_load_u32(frame + 24), ms_load_u64(frame + 40)
            ) - size
        error = self._write(frames, n, sync)
        if not error:
            self.sequence += n
            self.weight += excess
        return error

    cdef int _write(self, iovec* buffers, int n, bint sync) noexcept nogil:
        cdef uint64_t size = 0, ahead
        cdef int i, error
        for i in range(n):
            size += buffers[i].iov_len
        if self.size + size > self._zeroed_size and size <= AHEAD_FRAMES_MAX:
            ahead = min(max(self.size, self._ahead_size_min), MS_AHEAD_SIZE_MAX)
            buffers[n].iov_base = ms_zeros
            buffers[n].iov_len = ahead
            n += 1
            self._zeroed_size = self.size + size + ahead
        if self._descriptor >= 0:
            error = _write_all(self._descriptor, buffers, n, self.size, sync)
        else:
            error = self._write_by_method(buffers, n)
        if not error:
            self.size += size
            self.weight += size
        self._ended = error
        return error

    cdef int _write_by_method(self, iovec* buffers, int n) noexcept with gil:
        cdef int i
        try:
            views = [
                PyMemoryView_FromMemory(
                    <char*>buffers[i].iov_base, buffers[i].iov_len, PyBUF_READ
                )
                for i in range(n)
            ]
            self._file.write(views, self.size)
        except BaseException as error:
            self._raised = error
            return RAISED
        return 0

    cdef int sync(self) noexcept nogil:
        """Make everything written durable; return 0 or what ended the log."""
        if not self._end():
            self._ended = self._sync()
        return self._end()

    cdef int _sync(self) noexcept nogil:
        if self._descriptor < 0:
            return self._sync_by_method()
        while ms_sync(self._descriptor) < 0:
            if errno != EINTR:
                return errno
        return 0

    cdef int _sync_by_method(self) noexcept with gil:
        try:
            self._file.sync()
        except BaseException as error:
            self._raised = error
            return RAISED
        return 0

    cdef object error(self, int number):
        """Return the exception for what `append` or `sync` has returned."""
        if number == RAISED:
            return self._raised
        if number == SEALED:
            return RuntimeError(f"no log has followed the sealed one ({self._path})")
        if number == FORKED:
            return StoreClosedError.in_a_fork(self._path)
        words = PyUnicode_DecodeLocale(strerror(number), "surrogateescape")
        return OSError(number, words, self._path)


cdef int _point_at(iovec* buffer, bytearray frame) except -1:
    if <size_t>len(frame) < MS_HEADER:
        raise ValueError(f"frame of {len(frame)} bytes is shorter than its header")
    buffer.iov_base = PyByteArray_AS_STRING(frame)
    buffer.iov_len = len(frame)
    return 0


cdef int _write_all(
    int descriptor, iovec* buffers, int n, long long offset, bint sync
) noexcept nogil:
    """Write `buffers` one after another at `offset`; return 0 or an errno."""
    cdef ssize_t written
    cdef iovec piece
    while n:
        if sync and buffers.iov_len > PIECE_SIZE:
            piece.iov_base, piece.iov_len = buffers.iov_base, PIECE_SIZE
            written = pwritev(descriptor, &piece, 1, offset)
            if written > 0:
                ms_begin_sync(descriptor, offset, written)
        else:
            written = pwritev(descriptor, buffers, n, offset)
        if written < 0:
            if errno == EINTR:
                continue
            return errno
        if written == 0:
            return EIO  # no progress
        offset += written
        # Short: above 2 GiB, or when the disk fills up.
        while n and <size_t>written >= buffers.iov_len:
            written -= buffers.iov_len
            buffers += 1
            n -= 1
        if n:
            buffers.iov_base = <char*>buffers.iov_base + written
            buffers.iov_len -= written
    return 0


cdef enum State:
    LEADING
    WRITTEN
    FAILED


cdef struct Request:
    # One caller's part of a group. Requests are used again, and freed with the queue:
    # who wakes one may still be about it when its owner has gone on.
    PyThread_type_lock told  # taken, until who sets the state of another's releases it
    State state             # read by its owner once that has taken `told` again
    iovec frame             # of no size: nothing to write
    bint sync
    bint is_alone           # wants the lead, and nothing written
    uint64_t sequence
    Request* next           # in the queue or its group, or in the list of free ones
    Request* other          # in the list of all


cdef class GroupCommit:
    """The queue and its leader. Thread-safe.

    Parameters
    ----------
    tail : Tail
        Where to write.
    on_failure : callable
        Told the exception of a failed write or sync, before anybody learns of it.
    failed : callable
        Returns what to raise for a request that was not written.
    rotate : callable
        Called by the leader, when its group is durable, if the log has grown beyond
        `weight_max`.
    """

    #: Where to write, and up to which weight before `rotate` is called; to be changed
    #: by who leads, the latter by anyone.
    cdef public Tail tail
    cdef public uint64_t weight_max
    #: Whether anything may be written; once cleared, by :meth:`close` or by a failure,
    #: it stays so.
    cdef readonly bint is_open
    #: The newest sequence that is durable.
    cdef readonly uint64_t durable
    cdef readonly uint64_t n_batches
    cdef readonly uint64_t n_writes
    cdef readonly uint64_t n_syncs
    cdef object _on_failure
    cdef object _failed
    cdef object _rotate
    cdef pthread_mutex_t _mutex  # guards the fields that follow
    cdef Request* _first
    cdef Request* _last
    cdef bint _is_led
    cdef uintptr_t _leader      # its thread
    cdef Request* _free
    cdef Request* _all
    #: How many requests no leader has taken up.
    cdef readonly int n_waiting
    cdef iovec _buffers[GROUP_MAX + 1]

    def __cinit__(self):
        pthread_mutex_init(&self._mutex, NULL)

    def __init__(self, Tail tail not None, on_failure, failed, rotate):
        self.tail = tail
        self.durable = tail.sequence - 1
        self.weight_max = <uint64_t>-1
        self.is_open = True
        self._on_failure = on_failure
        self._failed = failed
        self._rotate = rotate

    def __dealloc__(self):
        cdef Request* request = self._all
        while request != NULL:
            self._all = request.other
            PyThread_free_lock(request.told)
            free(request)
            request = self._all
        pthread_mutex_destroy(&self._mutex)

    def close(self):
        """Let nothing more be written; who waits fails."""
        self.is_open = False

    def forget_after_fork(self):
        """In a forked child: let nothing be written, and nobody wait for who is gone.

        Another thread may have had the lead, or the mutex, when its process was forked.
        """
        self.is_open = False
        pthread_mutex_init(&self._mutex, NULL)
        self._first = NULL
        self.n_waiting = 0
        self._is_led = self._is_led_here()

    @property
    def is_led_here(self):
        """Whether this thread leads: as a signal handler amid a rotation finds it."""
        pthread_mutex_lock(&self._mutex)
        cdef bint is_led = self._is_led_here()
        pthread_mutex_unlock(&self._mutex)
        return is_led

    cdef bint _is_led_here(self) noexcept:
        return self._is_led and self._leader == ms_thread()

    def commit(self, bytearray frame, bint sync):
        """Return when a started frame was written by this thread or another, or raise.

        Parameters
        ----------
        frame : bytearray or None
            None to write nothing.
        sync : bool
            Whether everything so far has to be durable before the caller goes on.

        Returns
        -------
        int
            The sequence of the batch; 0 without one.
        """
        cdef Request* request = self._new_request(frame, sync, False)
        cdef Request* group = NULL
        cdef int left = 0
        try:
            ms_turn_hold()
            with nogil:
                ms_turn_end()
                self._join(request)
                if request.state == LEADING:
                    left = self._lead(request, &group)
                else:
                    _let_go(request.next, request.state)  # who was left to us
                ms_turn_await()
            ms_turn_begin()
            if left:
                self._end_lead(left, group)
            if request.state == FAILED:
                raise self._failed()
            return request.sequence
        finally:
            self._free_request(request)

    def exclusively(self, action):
        """Call `action` while nobody writes; it may write and change `tail`."""
        cdef Request* request = self._new_request(None, False, True)
        try:
            with nogil:
                self._join(request)
                self._take()
            try:
                action()
            finally:
                with nogil:
                    self._hand_on()
        finally:
            self._free_request(request)

    cdef Request* _new_request(
        self, bytearray frame, bint sync, bint is_alone
    ) except NULL:
        cdef Request* request
        cdef iovec buffer
        buffer.iov_base, buffer.iov_len = NULL, 0
        if frame is not None:
            _point_at(&buffer, frame)
        pthread_mutex_lock(&self._mutex)  # who keeps it asks for nothing meanwhile
        if self._is_led_here():
            pthread_mutex_unlock(&self._mutex)
            raise RuntimeError("this thread is in the middle of a commit already")
        request = self._free
        if request != NULL:
            self._free = request.next
        pthread_mutex_unlock(&self._mutex)
        if request == NULL:
            request = self._allocate()
        request.next = NULL
        request.sync = sync
        request.is_alone = is_alone
        request.sequence = 0
        request.frame = buffer
        return request

    cdef Request* _allocate(self) except NULL:
        cdef Request* request = <Request*>calloc(1, sizeof(Request))
        if request == NULL:
            raise MemoryError
        request.told = PyThread_allocate_lock()
        if request.told == NULL:
            free(request)
            raise MemoryError
        PyThread_acquire_lock(request.told, 1)
        pthread_mutex_lock(&self._mutex)
        request.other = self._all
        self._all = request
        pthread_mutex_unlock(&self._mutex)
        return request

    cdef void _free_request(self, Request* request) noexcept:
        pthread_mutex_lock(&self._mutex)
        request.next = self._free
        self._free = request
        pthread_mutex_unlock(&self._mutex)

    cdef void _join(self, Request* request) noexcept nogil:
        """Queue a request; return when it leads, or another has done what it asks."""
        cdef bint is_led
        pthread_mutex_lock(&self._mutex)
        if self._first == NULL:
            self._first = request
        else:
            self._last.next = request
        self._last = request
        self.n_waiting += 1
        is_led = self._is_led
        self._is_led = True
        pthread_mutex_unlock(&self._mutex)
        if is_led:
            PyThread_acquire_lock(request.told, 1)
        else:
            request.state = LEADING

    cdef Request* _take(self) noexcept nogil:
        """Take the leader, which is first, and who may be in its group."""
        cdef Request* leader
        cdef Request* last
        cdef int n = 1
        pthread_mutex_lock(&self._mutex)
        self._leader = ms_thread()
        leader = last = self._first
        while (
            not leader.is_alone and last.next != NULL and not last.next.is_alone
            and n < GROUP_MAX
        ):
            last = last.next
            n += 1
        self.n_waiting -= n
        self._first = last.next
        last.next = NULL
        pthread_mutex_unlock(&self._mutex)
        return leader

    cdef int _lead(self, Request* own, Request** group) noexcept nogil:
        """Write the first group, and others as long as many wait, then hand on.

        Returns
        -------
        int
            What is left to do with the lead and the GIL, or 0.
        """
        cdef Request* done
        cdef int n, error
        group[0] = self._take()
        for n in range(1, LEAD_MAX + 1):
            error = self._write(group[0])
            if n == 1:  # own is the first of its group, and needs not be told
                own.state = FAILED if error else WRITTEN
                group[0] = own.next
            if error:
                return error
            if self.tail.weight > self.weight_max:
                _let_go(group[0], WRITTEN)
                return DUE
            if n == LEAD_MAX or not self._do_many_wait():
                break
            done, group[0] = group[0], self._take()
            if done != NULL:
                _tell(done, WRITTEN)  # and leave the rest to it
        self._hand_on()  # first, so that the next group is on its way
        _let_go(group[0], WRITTEN)
        return 0

    cdef bint _do_many_wait(self) noexcept nogil:
        pthread_mutex_lock(&self._mutex)
        cdef bint do_many = (
            self.n_waiting >= MANY_WAITING and not self._first.is_alone
        )
        pthread_mutex_unlock(&self._mutex)
        return do_many

    cdef int _end_lead(self, int left, Request* group) except -1:
        try:
            if left == DUE:
                self._rotate()
            elif left != REFUSED:
                self._on_failure(self.tail.error(left))
        finally:
            with nogil:
                self._hand_on()
                if left != DUE:
                    _let_go(group, FAILED)
        return 0

    cdef int _write(self, Request* group) noexcept nogil:
        """Write and sync what a group asks; return 0, an errno, RAISED or REFUSED."""
        cdef Request* request = group
        cdef bint sync = False
        cdef int n = 0, error = 0
        if not self.is_open:
            return REFUSED
        while request != NULL:
            if request.frame.iov_len:
                request.sequence = self.tail.sequence + n
                self._buffers[n] = request.frame
                n += 1
            sync |= request.sync
            request = request.next
        if n:
            error = self.tail.append(self._buffers, n, self.durable, sync)
            self.n_writes += 1
            if not error:
                self.n_batches += n
        if sync and not error:
            error = self._sync()
        if error:
            self.is_open = False  # before anybody is told: a signal handler may run
        return error

    cdef int _sync(self) noexcept nogil:
        cdef uint64_t last = self.tail.sequence - 1
        cdef int error = 0
        if self.durable < last:
            error = self.tail.sync()
            self.n_syncs += 1
            if not error:
                self.durable = last
        return error

    def sync_now(self):
        """Make everything durable; for who leads."""
        cdef int error
        with nogil:
            error = self._sync()
        if error:
            self.is_open = False
            raise self.tail.error(error)

    cdef void _hand_on(self) noexcept nogil:
        """Give up the lead, to the first that waits if there is one."""
        cdef Request* heir
        pthread_mutex_lock(&self._mutex)
        heir = self._first
        self._leader = 0
        self._is_led = heir != NULL
        pthread_mutex_unlock(&self._mutex)
        if heir != NULL:
            _tell(heir, LEADING)


cdef void _let_go(Request* group, State state) noexcept nogil:
    cdef Request* request
    while group != NULL:
        request = group
        group = group.next  # before it is told: then it may be used again
        request.next = NULL  # nobody is left to it
        _tell(request, state)


cdef void _tell(Request* request, State state) noexcept nogil:
    request.state = state
    PyThread_release_lock(request.told)
