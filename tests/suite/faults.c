/* Preloaded into laam: the call number FAULT_AT, of those that touch the folder FAULT_UNDER, fails with
   FAULT_ERRNO; if that is 0, a write is short, and if it is -1, the process is killed. With FAULT_STICKY all
   later calls fail as well. Each call is a line of FAULT_LOG, the failed ones with a mark.

   In the process of rank FAULT_RANK, the clock of laam runs FAULT_CLOCK_RATE times as fast; and once the file
   FAULT_PANIC is there, it fails once in the main thread, at which Rust's standard library panics. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define SHORT_WRITE (-2)

static int calls;

/* The errno of a call on a path, or on a descriptor if the path is NULL; 0 if it goes through. */
static int fault(const char *call, int descriptor, const char *path) {
    char full[8192] = "";
    const char *under = getenv("FAULT_UNDER");
    if (!under)
        return 0;
    if (!path || path[0] != '/') {
        char link[64];
        snprintf(link, sizeof link, descriptor == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", descriptor);
        ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, full, sizeof full / 2);
        if (length < 0)
            return 0;
        full[length] = 0;
        if (path)
            strcat(full, "/");
    }
    if (path)
        strncat(full, path, sizeof full - strlen(full) - 1);
    if (strncmp(full, under, strlen(under)))
        return 0;
    int number = __sync_add_and_fetch(&calls, 1), at = atoi(getenv("FAULT_AT"));
    int hit = number == at || (getenv("FAULT_STICKY") && at > 0 && number > at);
    int error = hit ? atoi(getenv("FAULT_ERRNO")) : 0;
    char line[8400];
    int length = snprintf(line, sizeof line, "%s%s %s\n", hit ? "* " : "", call, full);
    int log = syscall(SYS_openat, AT_FDCWD, getenv("FAULT_LOG"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    syscall(SYS_write, log, line, length);
    syscall(SYS_close, log);
    if (error == -1)
        kill(getpid(), SIGKILL);
    return hit && error == 0 ? SHORT_WRITE : error;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    static int failed;
    static struct timespec start;
    const char *rank = getenv("FAULT_RANK"), *file = getenv("FAULT_PANIC"), *rate = getenv("FAULT_CLOCK_RATE");
    const char *names[] = {"LAAM_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"}, *own = NULL;
    for (int i = 0; i < 3 && !own; i++)
        own = getenv(names[i]);
    Dl_info caller;
    /* MPI libraries ask for the time too. */
    int is_hit = rank && own && !strcmp(rank, own) && dladdr(__builtin_return_address(0), &caller) &&
                 strstr(caller.dli_fname, "/laam");
    if (is_hit && file && !failed && getpid() == syscall(SYS_gettid) && !syscall(SYS_access, file, F_OK)) {
        failed = 1;
        errno = EINVAL;
        return -1;
    }
    int result = syscall(SYS_clock_gettime, clock, time);
    if (is_hit && rate && clock == CLOCK_MONOTONIC && !result) {
        if (!start.tv_sec)
            start = *time;
        double past = time->tv_sec - start.tv_sec + (time->tv_nsec - start.tv_nsec) / 1e9;
        time->tv_sec = start.tv_sec + (time_t)(past * atoi(rate));
    }
    return result;
}

#define CALL(type, name, parameters, descriptor, path, arguments)                                                  \
    type name parameters {                                                                                         \
        int error = fault(#name, descriptor, path);                                                                \
        if (error > 0) {                                                                                           \
            errno = error;                                                                                         \
            return -1;                                                                                             \
        }                                                                                                          \
        return NEXT(name) arguments;                                                                               \
    }

#define OPEN(name, parameters, descriptor, path, arguments)                                                        \
    int name parameters {                                                                                          \
        va_list more;                                                                                              \
        va_start(more, flags);                                                                                     \
        mode_t mode = va_arg(more, mode_t);                                                                        \
        va_end(more);                                                                                              \
        int error = fault(#name, descriptor, path);                                                                \
        if (error > 0) {                                                                                           \
            errno = error;                                                                                         \
            return -1;                                                                                             \
        }                                                                                                          \
        return NEXT(name) arguments;                                                                               \
    }

OPEN(open, (const char *path, int flags, ...), AT_FDCWD, path, (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, path, (path, flags, mode))
OPEN(openat, (int at, const char *path, int flags, ...), at, path, (at, path, flags, mode))
OPEN(openat64, (int at, const char *path, int flags, ...), at, path, (at, path, flags, mode))
CALL(int, fsync, (int file), file, NULL, (file))
CALL(int, fdatasync, (int file), file, NULL, (file))
CALL(int, ftruncate, (int file, off_t length), file, NULL, (file, length))
CALL(int, ftruncate64, (int file, off64_t length), file, NULL, (file, length))
CALL(int, rename, (const char *from, const char *to), AT_FDCWD, from, (from, to))
CALL(int, mkdir, (const char *path, mode_t mode), AT_FDCWD, path, (path, mode))
CALL(int, rmdir, (const char *path), AT_FDCWD, path, (path))
CALL(int, unlink, (const char *path), AT_FDCWD, path, (path))
CALL(int, unlinkat, (int at, const char *path, int flags), at, path, (at, path, flags))
CALL(int, chmod, (const char *path, mode_t mode), AT_FDCWD, path, (path, mode))

ssize_t write(int file, const void *bytes, size_t length) {
    int error = fault("write", file, NULL);
    if (error > 0) {
        errno = error;
        return -1;
    }
    return NEXT(write)(file, bytes, error == SHORT_WRITE && length > 1 ? length / 2 : length);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    int error = fault("writev", file, NULL);
    if (error > 0) {
        errno = error;
        return -1;
    }
    return NEXT(writev)(file, parts, error == SHORT_WRITE && count > 1 ? count / 2 : count);
}
