/* A model's config.json, read as either of the two kinds: refused with one line, or sizes that the
 * model can be compared with. */
#include <string.h>

#include "fuzz.h"
#include "run/hf_config.h"

static void check_dino(const char *path) {
    FvDinoSizes s;
    FvError err = {0};
    if (fv_hf_read_dino(path, &s, &err) != FV_OK) {
        REQUIRE(err.status == FV_DATA && strstr(err.text, path) && !strchr(err.text, '\n'));
        return;
    }
    REQUIRE(s.image_size > 0 && s.patch > 0 && s.layers > 0 && s.heads > 0);
    REQUIRE(s.width > 0 && s.width % s.heads == 0 && s.mlp > 0 && s.mlp % s.width == 0);
}

static void check_llama(const char *path) {
    FvLlamaSizes s;
    FvError err = {0};
    if (fv_hf_read_llama(path, &s, &err) != FV_OK) {
        REQUIRE(err.status == FV_DATA && strstr(err.text, path) && !strchr(err.text, '\n'));
        return;
    }
    REQUIRE(s.layers > 0 && s.heads > 0 && s.kv_heads > 0 && s.mlp > 0 && s.vocab > 0);
    REQUIRE(s.width > 0 && s.width % s.heads == 0 && s.heads % s.kv_heads == 0);
    REQUIRE(s.rope_theta >= 1 && s.rms_eps >= 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char path[FUZZ_PATH];
    int file = fuzz_file(data, size, NULL, 0, path);
    check_dino(path);
    check_llama(path);
    close(file);
    return 0;
}
