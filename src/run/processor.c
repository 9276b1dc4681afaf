#include "run/processor.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/backend.h"

void fv_settle_blas(char **argv) {
    const char *core = getenv("OPENBLAS_CORETYPE") ? NULL : fv_cpu_better_blas_core();
    const char *threads = getenv("OPENBLAS_NUM_THREADS");
    bool one_thread = threads && strcmp(threads, "1") == 0;
    if (!core && one_thread)
        return;
    /* set now, so that the new process finds nothing to do: no loop */
    if ((core && setenv("OPENBLAS_CORETYPE", core, 1) != 0) ||
        setenv("OPENBLAS_NUM_THREADS", "1", 1) != 0)
        return;
    char program[4096]; /* by its own path, so that ps shows its name */
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    if (n <= 0)
        return;
    program[n] = '\0';
    execv(program, argv);
}

/* Cores first .. first + count of a set, in order. */
static cpu_set_t part_of(const cpu_set_t *set, size_t first, size_t count) {
    cpu_set_t part;
    CPU_ZERO(&part);
    size_t seen = 0;
    for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, set))
            continue;
        if (seen >= first && seen < first + count)
            CPU_SET(cpu, &part);
        seen++;
    }
    return part;
}

size_t fv_claim_cores(const FvWorld *world) {
    cpu_set_t mine;
    cpu_set_t *all = calloc(world->local_size, sizeof *all);
    if (!all || (world->by_mpirun && sched_getaffinity(getppid(), sizeof mine, &mine) != 0) ||
        (!world->by_mpirun && sched_getaffinity(0, sizeof mine, &mine) != 0))
        CPU_ZERO(&mine);
    bool shared = true;
    if (all) {
        fv_host_gather(&mine, sizeof mine, all); /* by every rank, also one alone on its host */
        for (size_t i = 0; i < world->local_size; i++)
            shared = shared && CPU_EQUAL(&all[i], &mine);
    }
    free(all);
    size_t cores = (size_t)CPU_COUNT(&mine);
    if (cores == 0)
        return 1;
    if (shared && world->local_size > 1) {
        size_t share = cores / world->local_size;
        if (share == 0) { /* more ranks than cores: the system places them */
            sched_setaffinity(0, sizeof mine, &mine);
            return 1;
        }
        mine = part_of(&mine, world->local_rank * share, share);
        cores = share;
    }
    sched_setaffinity(0, sizeof mine, &mine);
    return cores;
}

size_t fv_available_cores(void) {
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return n < 1 ? 1 : (size_t)n;
}

FvMemoryUse fv_memory_use(void) {
    FvMemoryUse use = {0, 0};
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    while (file && fgets(line, sizeof line, file)) {
        unsigned long kib = 0;
        if (sscanf(line, "VmRSS: %lu kB", &kib) == 1)
            use.now = kib * 1024;
        else if (sscanf(line, "VmHWM: %lu kB", &kib) == 1)
            use.peak = kib * 1024;
    }
    if (file)
        fclose(file);
    return use;
}
