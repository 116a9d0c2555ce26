/* To be loaded before the C library: lets one of its calls fail, once or from then on.
 * What the store writes in C passes no seam of Python; this is where it can be stopped. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, PWRITEV, FDATASYNC };
enum { SHORT = -1, NO_PROGRESS = -2 }; /* in place of an errno */

static int planned_call, planned_at, planned_error, planned_forever, interrupts;
static int calls[3];

/* Let call number `at` from now on, from 1, fail. */
void failing_calls_plan(int call, int at, int error, int forever) {
    planned_call = call;
    planned_at = at;
    planned_error = error;
    planned_forever = forever;
    calls[PWRITEV] = calls[FDATASYNC] = 0;
}

/* Have the calling thread get a SIGINT with every failure. */
void failing_calls_interrupt(int yes) { interrupts = yes; }

/* What the C library answers in a German locale of one byte a character. */
static int german;
void failing_calls_in_german(int yes) { german = yes; }

char *strerror(int error) {
    char *(*real)(int) = dlsym(RTLD_NEXT, "strerror");
    return german ? "Auf dem Ger\xe4t ist kein Speicherplatz" : real(error);
}

int failing_calls_count(int call) { return calls[call]; }

static int fails(int call) {
    int at = ++calls[call];
    int now = planned_forever ? at >= planned_at : at == planned_at;
    if (call != planned_call || !now)
        return 0;
    if (interrupts)
        raise(SIGINT);
    return 1;
}

/* The name that it has where sizes of files have 64 bits, whatever longs have. */
ssize_t pwritev64(int descriptor, const struct iovec *buffers, int n, off64_t offset) {
    ssize_t (*real)(int, const struct iovec *, int, off64_t) =
        dlsym(RTLD_NEXT, "pwritev64");
    if (!fails(PWRITEV))
        return real(descriptor, buffers, n, offset);
    if (planned_error == NO_PROGRESS)
        return 0;
    if (planned_error == SHORT) {
        struct iovec part = *buffers;
        part.iov_len = (part.iov_len + 1) / 2;
        return real(descriptor, &part, 1, offset);
    }
    errno = planned_error;
    return -1;
}

int fdatasync(int descriptor) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync");
    if (!fails(FDATASYNC))
        return real(descriptor);
    errno = planned_error;
    return -1;
}
