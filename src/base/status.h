/* Status codes and the error that travels with them. Functions that can fail return FvStatus and
 * take an FvError to describe the first failure; only main() turns a status into an exit. */
#ifndef FV_BASE_STATUS_H
#define FV_BASE_STATUS_H

#include <stddef.h>

/* The values are the program's exit codes. */
typedef enum FvStatus {
    FV_OK = 0,
    FV_USAGE = 2,   /* command line or configuration */
    FV_DATA = 3,    /* data file or weights */
    FV_JOB = 4,     /* an experiment failed, others may have finished */
    FV_DEVICE = 5,  /* device, memory, MPI or NCCL */
    FV_IO = 6,      /* results or checkpoint could not be written or read */
    FV_STOPPED = 75 /* stopped cleanly after a signal: run again to go on */
} FvStatus;

typedef struct FvError {
    FvStatus status;
    const char *file; /* source position of the failure, for the log */
    int line;
    char text[512]; /* one line for the user: what, where, what to do */
} FvError;

/* Fills err (when not NULL) and returns status, so that `return FV_FAIL(...)` reads well. */
FvStatus fv_fail_at(FvError *err, FvStatus status, const char *file, int line, const char *format,
                    ...) __attribute__((format(printf, 5, 6)));

/* The value is `status` as it stands at the call, so that static analysers see which way a function
 * has failed. */
static inline FvStatus fv_second(FvStatus filled, FvStatus status) {
    (void)filled;
    return status;
}

#define FV_FAIL(err, status, ...)                                                                  \
    fv_second(fv_fail_at((err), (status), __FILE__, __LINE__, __VA_ARGS__), (status))

/* Passes a failure of `call` on to the caller. */
#define FV_TRY(call)                                                                               \
    do {                                                                                           \
        FvStatus fv_status_ = (call);                                                              \
        if (fv_status_ != FV_OK)                                                                   \
            return fv_status_;                                                                     \
    } while (0)

#endif
