/* This rank's share of the machine: which BLAS kernels, which cores, how many threads. */
#ifndef FV_RUN_PROCESSOR_H
#define FV_RUN_PROCESSOR_H

#include "run/comm.h"

/* Call first in main(): when BLAS would use slower kernels than the processor has, or threads of
 * its own, sets its environment variables and starts the program again. Returns when all is well
 * (or cannot be bettered). */
void fv_settle_blas(char **argv);

/* Gives this rank its share of the cores that the launcher or the batch system has granted, and
 * says how many. mpirun binds a rank to one core by default; that is not the user's wish, so the
 * ranks of a host divide what mpirun itself may use. A binding that differs between the ranks of
 * a host was chosen by somebody and is kept. Collective over the host. */
size_t fv_claim_cores(const FvWorld *);

/* Cores that this process may use: for commands that have no ranks. */
size_t fv_available_cores(void);

/* Bytes of memory that this process holds, and has held at most (0 where the system does not
 * tell). */
typedef struct FvMemoryUse {
    size_t now, peak;
} FvMemoryUse;
FvMemoryUse fv_memory_use(void);

#endif
