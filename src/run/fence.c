#include "run/fence.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

/* The lines of OUT/owner. */
typedef struct Owner {
    char host[64], job[64]; /* job: of Slurm, with the array's task, "-" without */
    long pid;
    unsigned long restart; /* of the job */
    uint64_t start;        /* nanoseconds since 1970: two runs never agree in it */
} Owner;

#define OWNER_FORMAT "host %s\npid %ld\njob %s\nrestart %lu\nstart %" PRIu64 "\n"

static Owner this_run(void) {
    struct timespec now = {0};
    Owner o = {.job = "-", .pid = (long)getpid()};
    const char *job = getenv("SLURM_JOB_ID"), *restart = getenv("SLURM_RESTART_COUNT");
    if (gethostname(o.host, sizeof o.host - 1) != 0 || !o.host[0])
        snprintf(o.host, sizeof o.host, "unknown");
    if (job && job[0])
        snprintf(o.job, sizeof o.job, "%s", job);
    o.restart = restart ? strtoul(restart, NULL, 10) : 0;
    clock_gettime(CLOCK_REALTIME, &now);
    o.start = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    return o;
}

static FvStatus owner_path(const char *folder, char path[FV_PATH], FvError *err) {
    return fv_path(err, path, FV_PATH, "%s/owner", folder);
}

/* False when there is none that can be read. */
static bool read_owner(const char *folder, Owner *out) {
    char path[FV_PATH], *text = NULL;
    size_t size;
    FvError ignored;
    *out = (Owner){.job = "-"};
    if (owner_path(folder, path, &ignored) != FV_OK ||
        fv_file_read(path, &text, &size, &ignored) != FV_OK)
        return false;
    bool whole = sscanf(text, "host %63s pid %ld job %63s restart %lu start %" SCNu64, out->host,
                        &out->pid, out->job, &out->restart, &out->start) == 5;
    free(text);
    return whole;
}

static bool is_earlier_start(const Owner *held, const Owner *mine) {
    return strcmp(mine->job, "-") != 0 && strcmp(held->job, mine->job) == 0 &&
           held->restart < mine->restart;
}

static bool is_alive_here(const Owner *held, const Owner *mine) {
    return strcmp(held->host, mine->host) == 0 && held->pid != mine->pid &&
           (kill((pid_t)held->pid, 0) == 0 || errno == EPERM);
}

static void describe(const Owner *o, char *out, size_t size) {
    if (strcmp(o->job, "-") == 0)
        snprintf(out, size, "process %ld on %s", o->pid, o->host);
    else
        snprintf(out, size, "process %ld on %s, job %s (restart %lu)", o->pid, o->host, o->job,
                 o->restart);
}

void fv_fence_describe(const char *folder, char *out, size_t size) {
    Owner owner;
    if (read_owner(folder, &owner))
        describe(&owner, out, size);
    else
        snprintf(out, size, "unknown");
}

static FvStatus refuse(const char *folder, const Owner *held, FvError *err) {
    char who[FV_OWNER];
    describe(held, who, sizeof who);
    return FV_FAIL(err, FV_IO,
                   "%s: another fovea is writing there (%s); wait for it or choose another --out",
                   folder, who);
}

/* Whether the lock, or without locks the last owner, leaves the folder to this run. */
static FvStatus settle(const char *folder, int file, const Owner *mine, FvError *err) {
    Owner held;
    bool known = read_owner(folder, &held);
    if (flock(file, LOCK_EX | LOCK_NB) == 0 || (known && is_earlier_start(&held, mine)))
        return FV_OK;
    if (errno == EWOULDBLOCK)
        return refuse(folder, &held, err);
    if (errno != ENOLCK && errno != EOPNOTSUPP)
        return FV_FAIL(err, FV_IO, "%s/lock: %s", folder, strerror(errno));
    return known && is_alive_here(&held, mine) ? refuse(folder, &held, err) : FV_OK;
}

FvStatus fv_fence_take(const char *folder, FvFence *fence, int *lock, FvError *err) {
    char path[FV_PATH];
    Owner mine = this_run();
    FV_TRY(fv_path(err, path, sizeof path, "%s/lock", folder));
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file < 0)
        return FV_FAIL(err, FV_IO, "%s: cannot be written: %s; choose another --out", path,
                       strerror(errno));
    fence->lock = -1;
    FvStatus status = settle(folder, file, &mine, err);
    if (status == FV_OK)
        status = owner_path(folder, path, err);
    snprintf(fence->owner, sizeof fence->owner, OWNER_FORMAT, mine.host, mine.pid, mine.job,
             mine.restart, mine.start);
    if (status == FV_OK)
        status = fv_path(err, fence->folder, sizeof fence->folder, "%s", folder);
    if (status == FV_OK)
        status = fv_file_write(path, &(FvBytes){fence->owner, strlen(fence->owner)}, 1, err);
    if (status != FV_OK) {
        fence->owner[0] = '\0';
        close(file); /* releases it */
        return status;
    }
    *lock = fence->lock = file;
    return FV_OK;
}

void fv_fence_release(int lock) {
    if (lock >= 0)
        close(lock); /* releases it */
}

FvStatus fv_fence_check(const FvFence *fence, FvError *err) {
    char path[FV_PATH], *text = NULL;
    size_t size;
    Owner now;
    if (!fence || !fence->owner[0])
        return FV_OK;
    FV_TRY(owner_path(fence->folder, path, err));
    FV_TRY(fv_file_read(path, &text, &size, err));
    bool ours = strcmp(text, fence->owner) == 0;
    free(text);
    if (ours) {
        if (fence->lock >= 0)
            flock(fence->lock, LOCK_EX | LOCK_NB); /* an orphan may hold it still */
        return FV_OK;
    }
    if (!read_owner(fence->folder, &now))
        return FV_FAIL(err, FV_IO, "%s: is damaged: this run can no longer tell that it may write",
                       path);
    char who[FV_OWNER];
    describe(&now, who, sizeof who);
    return FV_FAIL(err, FV_IO, "%s: another run has taken over: %s", fence->folder, who);
}

static FvStatus allows(const void *fence, FvError *err) {
    return fv_fence_check(fence, err);
}

FvStatus fv_file_replace(const char *path, const FvBytes *parts, size_t count, const FvFence *fence,
                         FvError *err) {
    return fv_file_write_if(path, parts, count, allows, fence, err);
}
