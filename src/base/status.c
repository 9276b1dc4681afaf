#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>

FvStatus fv_fail_at(FvError *err, FvStatus status, const char *file, int line, const char *format,
                    ...) {
    if (err) {
        err->status = status;
        err->file = file;
        err->line = line;
        va_list args;
        va_start(args, format);
        vsnprintf(err->text, sizeof err->text, format, args);
        va_end(args);
        /* names out of files may hold anything: one line, and nothing that a terminal obeys */
        for (char *c = err->text; *c; c++)
            if ((unsigned char)*c < ' ' || *c == 0x7f)
                *c = '?';
    }
    return status;
}
