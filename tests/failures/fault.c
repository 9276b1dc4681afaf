/* Preloaded (LD_PRELOAD) into the program: the FAULT_AT-th call that changes a file whose path
 * contains FAULT_UNDER meets FAULT, and so does every one after it.
 *
 *   FAULT=KILL              the process is killed inside the call, before it takes effect
 *   FAULT=HALF              the process is killed when half of what it writes is written
 *   FAULT=ENOSPC | EDQUOT | EROFS | EIO   the call fails
 *
 * Calls that count: write, pwrite, fsync, rename. Those of a run come in nearly the same order
 * every time, so FAULT_AT chooses the moment. */
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static atomic_long calls;

static int is_watched(const char *path) {
    const char *under = getenv("FAULT_UNDER");
    return under && strstr(path, under) != NULL;
}

static int is_watched_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0)
        return 0;
    path[n] = '\0';
    return is_watched(path);
}

/* Whether this call is to go wrong. */
static int is_due(void) {
    const char *at = getenv("FAULT_AT");
    return at && atomic_fetch_add(&calls, 1) + 1 >= atol(at);
}

/* Fails the call: -1 with errno, or does not return. */
static int strike(void) {
    static const struct {
        const char *name;
        int code;
    } named[] = {{"ENOSPC", ENOSPC}, {"EDQUOT", EDQUOT}, {"EROFS", EROFS}};
    const char *fault = getenv("FAULT");
    if (!fault || strcmp(fault, "KILL") == 0 || strcmp(fault, "HALF") == 0)
        kill(getpid(), SIGKILL);
    errno = EIO;
    for (size_t i = 0; i < sizeof named / sizeof *named; i++)
        if (strcmp(fault, named[i].name) == 0)
            errno = named[i].code;
    return -1;
}

static int is_half(void) {
    const char *fault = getenv("FAULT");
    return fault && strcmp(fault, "HALF") == 0;
}

/* The C library's own function behind this one. */
#define REAL(type, name, ...)                                                                      \
    static type (*real)(__VA_ARGS__);                                                              \
    if (!real)                                                                                     \
    *(void **)&real = dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!is_watched_fd(fd) || !is_due())
        return real(fd, data, size);
    if (is_half())
        (void)!real(fd, data, size / 2);
    return strike();
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    if (!is_watched_fd(fd) || !is_due())
        return real(fd, data, size, offset);
    if (is_half())
        (void)!real(fd, data, size / 2, offset);
    return strike();
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    return pwrite64(fd, data, size, offset);
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    return is_watched_fd(fd) && is_due() ? strike() : real(fd);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return is_watched(to) && is_due() ? strike() : real(from, to);
}
