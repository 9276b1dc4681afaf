/* Where a rank computes: a GPU of its own where the build and the machine have them, or the
 * processor. */
#ifndef FV_RUN_DEVICE_H
#define FV_RUN_DEVICE_H

#include "backend/backend.h"
#include "run/comm.h"

typedef struct FvDevice {
    bool gpu;
    size_t index;   /* among the GPUs that this process sees */
    size_t memory;  /* bytes, of a GPU */
    size_t threads; /* of the processor, for one job */
    size_t ranks;   /* of this host that share the device and its memory; fv_device_share */
    char bus[16];   /* of a GPU: "0000:1b:00.0" */
    char text[96];  /* "cpu, 2 threads", "NVIDIA H200 0000:1b:00.0, 141 GB" */
} FvDevice;

/* `wish`: auto, cuda or cpu; auto takes a GPU where there is one. Ranks of a host take its GPUs in
 * turn; where the launcher shows each rank one GPU, that one. FV_DEVICE: "cuda" without a GPU. */
FvStatus fv_device_choose(const char *wish, const FvWorld *, size_t threads, FvDevice *out,
                          FvError *err);

/* Counts the ranks of this host on the same device: those on a processor all share its memory.
 * Collective over the host. */
void fv_device_share(FvDevice *, const FvWorld *);

/* This rank's share of the memory that is left. */
FvStatus fv_device_memory_left(const FvDevice *, size_t *out, FvError *err);
/* Libraries of GPUs that the program is built with, a line each; "" without. */
void fv_device_versions(char *out, size_t size);

/* The precision key's value (auto, fp32 or bf16) on this device: auto is bf16 on a GPU and fp32 on
 * the processor. FV_USAGE: bf16 on the processor. */
FvStatus fv_device_precision(const FvDevice *, const char *precision, bool *bf16, FvError *err);

/* A backend for one job on the device, with `threads` on a processor; fv_backend_destroy it. */
FvStatus fv_device_open(const FvDevice *, const char *precision, size_t threads, FvBackend **out,
                        FvError *err);

#endif
