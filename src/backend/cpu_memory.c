/* How much memory a process could still take: what the machine has available, or less where a
 * control group of the process, or one above it, has a limit. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "backend/cpu.h"

enum { PATH = 4096 };

/* The number in a file of one number, or behind `key` on a line of its own; `fallback` where it
 * cannot be read (a group without a limit says "max"). */
static uint64_t read_number(const char *path, const char *key, uint64_t fallback) {
    FILE *file = fopen(path, "r");
    if (!file)
        return fallback;
    char line[256];
    uint64_t value = fallback, read;
    size_t skip = strlen(key);
    while (fgets(line, sizeof line, file))
        if (strncmp(line, key, skip) == 0 && sscanf(line + skip, "%" SCNu64, &read) == 1) {
            value = read;
            break;
        }
    fclose(file);
    return value;
}

typedef struct Files { /* of one version of control groups, below the group's folder */
    const char *root, *limit, *used, *reclaimable;
} Files;

/* What one group leaves. Pages of files that are not in use count as used and can be taken back. */
static uint64_t left_in(const Files *f, const char *group) {
    char path[PATH + 64];
    snprintf(path, sizeof path, "%s%s/%s", f->root, group, f->limit);
    uint64_t limit = read_number(path, "", UINT64_MAX);
    snprintf(path, sizeof path, "%s%s/%s", f->root, group, f->used);
    uint64_t used = read_number(path, "", 0);
    snprintf(path, sizeof path, "%s%s/memory.stat", f->root, group);
    uint64_t idle = read_number(path, f->reclaimable, 0);
    used -= idle < used ? idle : used;
    return used < limit ? limit - used : 0;
}

/* The least that is left in `group` and the groups above it; cuts the path. */
static uint64_t left_above(const Files *f, char *group) {
    uint64_t left = UINT64_MAX;
    for (;;) {
        uint64_t here = left_in(f, group);
        left = here < left ? here : left;
        char *last = strrchr(group, '/');
        if (!last)
            return left;
        *last = '\0';
    }
}

/* A line of /proc/self/cgroup is ID:CONTROLLERS:PATH; version 2 names no controllers. */
static uint64_t left_in_groups(void) {
    static const Files second = {"/sys/fs/cgroup", "memory.max", "memory.current",
                                 "inactive_file "};
    static const Files first = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes",
                                "memory.usage_in_bytes", "total_inactive_file "};
    uint64_t left = UINT64_MAX;
    char line[PATH];
    FILE *file = fopen("/proc/self/cgroup", "r");
    while (file && fgets(line, sizeof line, file)) {
        char *controllers = strchr(line, ':'),
             *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group)
            continue;
        *group++ = '\0';
        group[strcspn(group, "\n")] = '\0';
        bool memory = strstr(controllers, "memory") != NULL;
        if (controllers[1] && !memory)
            continue;
        uint64_t here = left_above(memory ? &first : &second, group);
        left = here < left ? here : left;
    }
    if (file)
        fclose(file);
    return left;
}

size_t fv_cpu_memory_left(FvBackend *backend) {
    (void)backend;
    uint64_t kib = read_number("/proc/meminfo", "MemAvailable:", 0);
    uint64_t machine = kib < UINT64_MAX / 1024 ? kib * 1024 : UINT64_MAX;
    uint64_t groups = left_in_groups(), left = machine < groups ? machine : groups;
    return left < SIZE_MAX ? (size_t)left : SIZE_MAX;
}
