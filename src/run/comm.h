/* Everything that knows MPI: the world, rank groups, averages, and the messages between group
 * roots and rank 0. Without a launcher the world is this one process. */
#ifndef FV_RUN_COMM_H
#define FV_RUN_COMM_H

#include <stdbool.h>
#include <stddef.h>

#include "base/real.h"
#include "base/status.h"

enum { FV_HOST = 64 };

typedef struct FvWorld {
    size_t rank, size;
    size_t local_rank, local_size; /* among the ranks of this host */
    char host[FV_HOST];
    bool by_mpirun; /* started by Open MPI's mpirun, whose binding is not the user's wish */
} FvWorld;

/* Starts MPI with threads. Fails (FV_DEVICE) when a launcher meant this process to be one of
 * several and it finds itself alone, as with a launcher of another MPI. */
FvStatus fv_world_start(int *argc, char ***argv, FvWorld *out, FvError *err);
/* Waits for all ranks without burning their cores, then ends MPI. */
void fv_world_end(void);
/* Ends every rank at once; for main() and its watchdogs. */
_Noreturn void fv_world_abort(FvStatus);

/* One rank's failure is everyone's: all ranks return the status of the lowest rank that failed,
 * and *speaker tells whether that is this rank, whose error is the one to print. */
FvStatus fv_world_agree(const FvWorld *, FvStatus mine, bool *speaker);
/* Whether it holds on every rank. */
bool fv_world_all(bool mine);
/* Rank 0's `data` becomes everyone's. */
FvStatus fv_world_broadcast(void *data, size_t bytes, FvError *err);
/* Rank 0 receives every rank's `bytes` in rank order in `all` (size * bytes); others pass NULL. */
void fv_world_gather(const void *mine, size_t bytes, void *all);
/* The same among the ranks of this host, received by all of them. */
void fv_host_gather(const void *mine, size_t bytes, void *all);

/* Ranks [index * size, (index + 1) * size) of the world. Each job slot of a group has a
 * communicator of its own, so that jobs of a rank do not meet in one collective. */
typedef struct FvGroup {
    size_t index, count; /* this group, number of groups */
    size_t rank, size;   /* within the group; rank 0 is its root */
    size_t slots;
    void *comms; /* [slots] */
} FvGroup;

FvStatus fv_group_create(const FvWorld *, size_t ranks_per_group, size_t slots, FvGroup *out,
                         FvError *err);
void fv_group_free(FvGroup *);

/* One slot's collectives; errors are FV_DEVICE. With one rank they do nothing. */
FvStatus fv_group_average(const FvGroup *, size_t slot, real *x, size_t count, FvError *err);
FvStatus fv_group_sum(const FvGroup *, size_t slot, double *x, size_t count, FvError *err);
FvStatus fv_group_broadcast(const FvGroup *, size_t slot, void *data, size_t bytes, FvError *err);
/* The root receives `bytes` of every rank, in rank order. */
FvStatus fv_group_gather(const FvGroup *, size_t slot, const void *mine, size_t bytes, void *all,
                         FvError *err);

/* Messages between group roots and rank 0, of at most FV_MESSAGE bytes; thread-safe. */
enum { FV_MESSAGE = 1024 };
FvStatus fv_message_send(size_t to, int tag, const void *data, size_t bytes, FvError *err);
/* Takes a waiting message with this tag from anyone; false when there is none. */
bool fv_message_poll(int tag, void *data, size_t bytes, size_t *from);
/* Waits (sleeping between looks) for a message with this tag from rank `from`. */
void fv_message_wait(size_t from, int tag, void *data, size_t bytes);

/* A place for one message on its way, sent without waiting. For one thread. */
typedef struct FvPost FvPost;
FvPost *fv_post_create(void); /* NULL when memory is out */
/* Of at most FV_MESSAGE bytes; false, and nothing is sent, while the last one is not taken. */
bool fv_post_send(FvPost *, size_t to, int tag, const void *data, size_t bytes);
/* taken: waits until the last one is; else it is left behind, for a program that ends. */
void fv_post_destroy(FvPost *, bool taken);

/* "Open MPI 4.1.4" */
void fv_mpi_version(char *out, size_t size);

#endif
