/* fovea: trains a small foveated video model under a table of ablations.
 *
 * main() chooses the command, catches signals, turns a status into one line and an exit code; the
 * study itself starts in run/execute.c; a training step is compute() in run/train.c, between
 * begin_step() and finish_step(). */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/backend.h"
#include "revision.h"
#include "run/attend.h"
#include "run/config.h"
#include "run/device.h"
#include "run/execute.h"
#include "run/files.h"
#include "run/hdf5_lock.h"
#include "run/info.h"
#include "run/latents_command.h"
#include "run/prepare.h"
#include "run/pretrain.h"
#include "run/pretrain_config.h"
#include "run/processor.h"
#include "run/ranking.h"

/* The one piece of global state: set by a signal, read at step boundaries. */
static volatile sig_atomic_t stop_asked;

static void ask_stop(int signal_number) {
    (void)signal_number;
    stop_asked = 1;
}

static void catch_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = ask_stop;
    action.sa_flags = SA_RESTART;
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    action.sa_flags = SA_RESTART | (int)SA_RESETHAND; /* a second Ctrl-C ends at once */
    sigaction(SIGINT, &action, NULL);
    signal(SIGXFSZ, SIG_IGN); /* a file size limit is a write error like a full disk */
}

static void print_help(void) {
    printf("usage: fovea [STUDY.yaml] [key=value ...] [NAME.key=value ...] [options]\n"
           "       mpirun -np N fovea ...   N ranks share the study's jobs\n"
           "       fovea prepare VIDEOS... -o clips.h5   makes a data file of videos\n"
           "       fovea latents clips.h5 --vae FILE     adds an autoencoder's latents to it\n"
           "       fovea pretrain DATA [key=value ...]   trains an encoder without labels; --help\n"
           "       fovea attend OUT/NAME VIDEO           where an experiment looks in a video\n"
           "       fovea info STUDY.yaml [FILE] | FILE   lists parameters and what FILE would set\n"
           "       fovea status OUT                      how a study stands\n\n"
           "Without STUDY: configs/ablations.yaml, the seven ablations. Running the same command\n"
           "again goes on where it stopped.\n\noptions:\n");
    fv_options_print_help();
    printf("\nconfiguration keys:\n");
    fv_config_print_help();
    printf("\nexit status: 0 done, 2 usage or configuration, 3 data or weights, 4 a job failed,\n"
           "5 device, memory or MPI, 6 results or checkpoint, 75 stopped after a signal\n");
}

static void print_version(void) {
    char mpi[128], hdf5[32], gpu[192];
    fv_device_versions(gpu, sizeof gpu);
    fv_mpi_version(mpi, sizeof mpi);
    fv_hdf5_version(hdf5, sizeof hdf5);
    printf("fovea %s\n%s\nHDF5 %s\n%s\n%s", FV_REVISION, mpi, hdf5, fv_cpu_blas_name(), gpu);
}

/* world: NULL for commands that have no ranks */
static void complain(const FvError *err, const FvWorld *world) {
    if (world && world->size > 1)
        fprintf(stderr, "fovea: rank %zu on %s: %s\n", world->rank, world->host, err->text);
    else
        fprintf(stderr, "fovea: %s\n", err->text);
    if (getenv("FOVEA_TRACE") && err->file)
        fprintf(stderr, "fovea: at %s:%d\n", err->file, err->line);
}

static char *join(int argc, char **argv) {
    size_t room = 1;
    for (int i = 0; i < argc; i++)
        room += strlen(argv[i]) + 1;
    char *line = calloc(room, 1);
    size_t used = 0;
    for (int i = 0; line && i < argc; i++)
        used += (size_t)snprintf(line + used, room - used, "%s%s", i ? " " : "", argv[i]);
    return line;
}

typedef FvStatus Ranked(const FvInvocation *, bool *speaker, bool *abort, FvError *err);

/* A command of all ranks: a study, or pretraining. */
static FvStatus run_ranked(int argc, char **argv, const FvOptions *options, Ranked *run,
                           FvError *err) {
    char path[FV_PATH];
    FvInvocation in = {.options = *options, .revision = FV_REVISION, .stop = &stop_asked};
    FvStatus status = fv_world_start(&argc, &argv, &in.world, err);
    if (status != FV_OK) {
        complain(err, &in.world);
        fv_world_abort(status);
    }
    char *line = join(argc, argv);
    in.command_line = line ? line : argv[0];
    fv_beside_program("configs/ablations.yaml", path);
    in.study_path = options->study ? options->study : path;
    bool speaker = false, abort = false;
    status = run(&in, &speaker, &abort, err);
    if (status != FV_OK && speaker)
        complain(err, &in.world);
    if (abort)
        fv_world_abort(status);
    free(line);
    fv_world_end();
    return status;
}

/* Commands that need no ranks. */
static FvStatus run_command(int argc, char **argv, FvError *err) {
    if (strcmp(argv[1], "prepare") == 0)
        return fv_prepare(argc - 1, argv + 1, err);
    if (strcmp(argv[1], "latents") == 0)
        return fv_latents_command(argc - 1, argv + 1, err);
    if (strcmp(argv[1], "attend") == 0)
        return fv_attend(argc - 1, argv + 1, err);
    if (strcmp(argv[1], "info") == 0)
        return fv_info(argc - 1, argv + 1, err);
    if (argc != 3)
        return FV_FAIL(err, FV_USAGE, "usage: fovea status OUT");
    return fv_print_status(argv[2], err);
}

int main(int argc, char **argv) {
    static const char *const commands[] = {"prepare", "latents", "attend", "info", "status"};
    FvError err = {0};
    FvStatus status;
    catch_signals(); /* before MPI starts: a batch system may signal at any moment */
    fv_settle_blas(argv);
    for (size_t i = 0; argc > 1 && i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(argv[1], commands[i]) != 0)
            continue;
        status = run_command(argc, argv, &err);
        if (status != FV_OK)
            complain(&err, NULL);
        return (int)status;
    }
    FvOptions options;
    bool pretrain = argc > 1 && strcmp(argv[1], "pretrain") == 0;
    status = fv_options_parse(argc - pretrain, argv + pretrain, &options, &err);
    if (status != FV_OK) {
        complain(&err, NULL);
    } else if (options.help) {
        (pretrain ? fv_pretrain_print_help : print_help)();
    } else if (options.version) {
        print_version();
    } else {
        status = run_ranked(argc, argv, &options, pretrain ? fv_pretrain : fv_execute, &err);
    }
    fv_options_free(&options);
    return (int)status;
}
