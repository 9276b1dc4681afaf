#include "run/comm.h"

#include <limits.h>
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static void nap(long milliseconds) {
    struct timespec t = {.tv_nsec = milliseconds * 1000000L};
    nanosleep(&t, NULL);
}

static FvStatus check(int code, const char *what, FvError *err) {
    if (code == MPI_SUCCESS)
        return FV_OK;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    return FV_FAIL(err, FV_DEVICE, "MPI: %s: %s", what, text);
}

/* Number in an environment variable, 0 when it is not there. */
static size_t env_count(const char *name) {
    const char *text = getenv(name);
    return text ? (size_t)strtoul(text, NULL, 10) : 0;
}

static FvStatus check_launcher(size_t size, FvError *err) {
    static const char *const counts[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS",
                                         "SLURM_STEP_NUM_TASKS"};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        size_t meant = env_count(counts[i]);
        /* mpirun inside a Slurm step sets both; its own count is the one that holds */
        if (meant == size)
            return FV_OK;
        if (meant > 1 && size == 1)
            return FV_FAIL(err, FV_DEVICE,
                           "the launcher started %zu processes (%s), but this one finds itself "
                           "alone: use Open MPI's mpirun, or srun --mpi=pmix",
                           meant, counts[i]);
    }
    return FV_OK;
}

FvStatus fv_world_start(int *argc, char ***argv, FvWorld *out, FvError *err) {
    int provided = 0, rank = 0, size = 1, local_rank = 0, local_size = 1;
    if (MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided) != MPI_SUCCESS)
        return FV_FAIL(err, FV_DEVICE, "MPI could not be started");
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    *out = (FvWorld){.rank = (size_t)rank, .size = (size_t)size, .local_size = 1};
    out->by_mpirun = getenv("OMPI_COMM_WORLD_RANK") && !getenv("SLURM_STEP_ID");
    if (gethostname(out->host, sizeof out->host - 1) != 0)
        snprintf(out->host, sizeof out->host, "unknown");
    if (provided < MPI_THREAD_MULTIPLE)
        return FV_FAIL(err, FV_DEVICE, "this MPI has no thread support (MPI_THREAD_MULTIPLE)");
    FV_TRY(check_launcher(out->size, err));
    MPI_Comm host;
    FV_TRY(check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host),
                 "splitting by host", err));
    MPI_Comm_rank(host, &local_rank);
    MPI_Comm_size(host, &local_size);
    MPI_Comm_free(&host);
    out->local_rank = (size_t)local_rank;
    out->local_size = (size_t)local_size;
    return FV_OK;
}

/* A rank that waits in MPI_Finalize spins; others may still need its core. */
void fv_world_end(void) {
    MPI_Request request;
    if (MPI_Ibarrier(MPI_COMM_WORLD, &request) == MPI_SUCCESS)
        for (int done = 0; !done; nap(5))
            if (MPI_Test(&request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS)
                break;
    MPI_Finalize();
}

_Noreturn void fv_world_abort(FvStatus status) {
    MPI_Abort(MPI_COMM_WORLD, (int)status);
    _exit((int)status);
}

FvStatus fv_world_agree(const FvWorld *world, FvStatus mine, bool *speaker) {
    int rank = mine == FV_OK ? (int)world->size : (int)world->rank, lowest = rank;
    int code = (int)mine;
    *speaker = false;
    if (MPI_Allreduce(&rank, &lowest, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD) != MPI_SUCCESS)
        return FV_DEVICE;
    if (lowest == (int)world->size)
        return FV_OK;
    *speaker = lowest == (int)world->rank;
    if (MPI_Bcast(&code, 1, MPI_INT, lowest, MPI_COMM_WORLD) != MPI_SUCCESS)
        return FV_DEVICE;
    return (FvStatus)code;
}

bool fv_world_all(bool mine) {
    int all = mine;
    return MPI_Allreduce(MPI_IN_PLACE, &all, 1, MPI_INT, MPI_LAND, MPI_COMM_WORLD) == MPI_SUCCESS &&
           all;
}

FvStatus fv_world_broadcast(void *data, size_t bytes, FvError *err) {
    return check(MPI_Bcast(data, (int)bytes, MPI_BYTE, 0, MPI_COMM_WORLD), "telling all ranks",
                 err);
}

void fv_world_gather(const void *mine, size_t bytes, void *all) {
    MPI_Gather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, 0, MPI_COMM_WORLD);
}

void fv_host_gather(const void *mine, size_t bytes, void *all) {
    MPI_Comm host;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
    MPI_Allgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, host);
    MPI_Comm_free(&host);
}

/* --- groups --------------------------------------------------------------------------------- */

FvStatus fv_group_create(const FvWorld *world, size_t ranks, size_t slots, FvGroup *out,
                         FvError *err) {
    *out = (FvGroup){.index = world->rank / ranks,
                     .count = world->size / ranks,
                     .rank = world->rank % ranks,
                     .size = ranks,
                     .slots = slots};
    MPI_Comm *comms = calloc(slots, sizeof *comms);
    if (!comms)
        return FV_FAIL(err, FV_DEVICE, "out of memory for communicators");
    out->comms = comms;
    for (size_t i = 0; i < slots; i++)
        FV_TRY(check(MPI_Comm_split(MPI_COMM_WORLD, (int)out->index, (int)world->rank, &comms[i]),
                     "making rank groups", err));
    for (size_t i = 0; i < slots; i++)
        MPI_Comm_set_errhandler(comms[i], MPI_ERRORS_RETURN);
    return FV_OK;
}

void fv_group_free(FvGroup *group) {
    MPI_Comm *comms = group->comms;
    for (size_t i = 0; comms && i < group->slots; i++)
        MPI_Comm_free(&comms[i]);
    free(comms);
    group->comms = NULL;
}

static MPI_Comm comm_of(const FvGroup *group, size_t slot) {
    return ((const MPI_Comm *)group->comms)[slot];
}

/* MPI counts are ints: long tensors go in pieces. */
enum { PIECE = 1 << 26 };

FvStatus fv_group_average(const FvGroup *group, size_t slot, real *x, size_t count, FvError *err) {
    if (group->size == 1)
        return FV_OK;
    MPI_Datatype type = sizeof(real) == sizeof(float) ? MPI_FLOAT : MPI_DOUBLE;
    for (size_t i = 0; i < count; i += PIECE) {
        int n = (int)(count - i < PIECE ? count - i : PIECE);
        FV_TRY(check(MPI_Allreduce(MPI_IN_PLACE, x + i, n, type, MPI_SUM, comm_of(group, slot)),
                     "averaging gradients", err));
    }
    real factor = (real)1 / (real)group->size;
    for (size_t i = 0; i < count; i++)
        x[i] *= factor;
    return FV_OK;
}

FvStatus fv_group_sum(const FvGroup *group, size_t slot, double *x, size_t count, FvError *err) {
    if (group->size == 1)
        return FV_OK;
    return check(
        MPI_Allreduce(MPI_IN_PLACE, x, (int)count, MPI_DOUBLE, MPI_SUM, comm_of(group, slot)),
        "adding measures", err);
}

FvStatus fv_group_broadcast(const FvGroup *group, size_t slot, void *data, size_t bytes,
                            FvError *err) {
    if (group->size == 1)
        return FV_OK;
    for (size_t i = 0; i < bytes; i += PIECE) {
        int n = (int)(bytes - i < PIECE ? bytes - i : PIECE);
        FV_TRY(check(MPI_Bcast((char *)data + i, n, MPI_BYTE, 0, comm_of(group, slot)),
                     "sharing state", err));
    }
    return FV_OK;
}

FvStatus fv_group_gather(const FvGroup *group, size_t slot, const void *mine, size_t bytes,
                         void *all, FvError *err) {
    if (group->size == 1) {
        memmove(all, mine, bytes);
        return FV_OK;
    }
    return check(
        MPI_Gather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, 0, comm_of(group, slot)),
        "gathering measures", err);
}

/* --- messages ------------------------------------------------------------------------------- */

FvStatus fv_message_send(size_t to, int tag, const void *data, size_t bytes, FvError *err) {
    return check(MPI_Send(data, (int)bytes, MPI_BYTE, (int)to, tag, MPI_COMM_WORLD),
                 "sending a message", err);
}

/* MPI_Improbe takes the message out of the queue, so that two threads cannot see the same one. */
static bool take(int source, int tag, void *data, size_t bytes, size_t *from) {
    MPI_Message message;
    MPI_Status status;
    int there = 0;
    if (MPI_Improbe(source, tag, MPI_COMM_WORLD, &there, &message, &status) != MPI_SUCCESS ||
        !there)
        return false;
    if (MPI_Mrecv(data, (int)bytes, MPI_BYTE, &message, &status) != MPI_SUCCESS)
        return false;
    *from = (size_t)status.MPI_SOURCE;
    return true;
}

bool fv_message_poll(int tag, void *data, size_t bytes, size_t *from) {
    return take(MPI_ANY_SOURCE, tag, data, bytes, from);
}

void fv_message_wait(size_t from, int tag, void *data, size_t bytes) {
    size_t sender;
    while (!take((int)from, tag, data, bytes, &sender))
        nap(1);
}

/* The checker wants a request's start and its wait in one function.
 * NOLINTBEGIN(clang-analyzer-optin.mpi.MPI-Checker) */
struct FvPost {
    MPI_Request request; /* MPI_REQUEST_NULL: none on its way */
    char data[FV_MESSAGE];
};

FvPost *fv_post_create(void) {
    FvPost *post = calloc(1, sizeof *post);
    if (post)
        post->request = MPI_REQUEST_NULL;
    return post;
}

bool fv_post_send(FvPost *post, size_t to, int tag, const void *data, size_t bytes) {
    int done = 0;
    if (MPI_Test(&post->request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || !done)
        return false;
    memcpy(post->data, data, bytes);
    return MPI_Isend(post->data, (int)bytes, MPI_BYTE, (int)to, tag, MPI_COMM_WORLD,
                     &post->request) == MPI_SUCCESS;
}

/* The memory of a message that is not taken stays MPI's. */
void fv_post_destroy(FvPost *post, bool taken) {
    int done = 1;
    if (post && taken)
        MPI_Wait(&post->request, MPI_STATUS_IGNORE);
    else if (post)
        MPI_Test(&post->request, &done, MPI_STATUS_IGNORE);
    if (done)
        free(post);
}
/* NOLINTEND(clang-analyzer-optin.mpi.MPI-Checker) */

void fv_mpi_version(char *out, size_t size) {
    char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int length = 0;
    MPI_Get_library_version(text, &length);
    text[strcspn(text, ",\n")] = '\0';
    snprintf(out, size, "%s", text);
}
