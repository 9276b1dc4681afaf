# fovea: `make run` and `make test` are all that is needed; `make help` lists the rest.

B ?= build
NP ?= 1
ARGS ?=
CFLAGS ?= -O3 -g
WARNINGS := -Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla
HOST_WARNINGS := -Wall -Wextra -Wshadow
ifeq ($(WERROR),1)
WARNINGS += -Werror
HOST_WARNINGS += -Werror
endif
ifeq ($(origin CC),default)
CC := gcc
endif
# `run` builds through a second make, on all cores unless -j was given.
JOBS = $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,-j$(shell nproc))

# Open MPI starts nothing for root unless told twice.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif
export CC WERROR CUDA

.DEFAULT_GOAL := all
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: all run report attend test tests bench soak weights info help clean sanitize fuzz fuzz-build \
        FORCE bundle gpu-tests bench-gpu study-gpu \
        format lint lint-format lint-layers lint-tidy lint-cppcheck lint-readme

# --- what was found ------------------------------------------------------------------------------
# These goals need no compiler, or look for it (and install it) themselves.
ifneq ($(filter-out run report test weights info help clean format lint-format lint-layers lint-readme,$(or $(MAKECMDGOALS),all)),)
include $(B)/config.mk
endif

$(B)/config.mk: scripts/configure scripts/packages.txt
	@scripts/configure write $@

# --- sources -------------------------------------------------------------------------------------
SOURCES := $(sort $(wildcard src/base/*.c src/backend/*.c src/model/*.c src/run/*.c src/main.c))
PARTS := $(filter-out src/main.c,$(SOURCES))
# The part of the program whose mathematics is proved in double.
PARTS_F64 := $(filter src/base/% src/backend/% src/model/% src/run/safetensors% src/run/file% src/run/fence% \
             src/run/weights.c src/run/model_folder% src/run/hf_config% src/run/config%,$(PARTS))
TESTS := $(sort $(wildcard tests/unit/test_*.c))
TESTS_F64 := $(sort $(wildcard tests/unit/test_ops*.c tests/unit/test_model*.c tests/unit/test_golden*.c))
SHARED := $(filter-out $(TESTS),$(wildcard tests/unit/*.c))
C_FILES := $(SOURCES) $(wildcard src/*/*.h cuda/*.[ch] cuda/*.cu cuda/*.cuh tests/cuda_host/* tests/unit/*.[ch] tests/fuzz/*.[ch] \
                                tests/speed/*.c tests/reference/*.c tests/gpu/*.c tests/failures/*.c)
FUZZERS := $(patsubst tests/fuzz/%.c,$(B)/fuzz/%,$(sort $(wildcard tests/fuzz/fuzz_*.c)))
# The readers that are fuzzed, and what they call.
FUZZ_PARTS := $(filter src/base/% src/model/config.c src/run/safetensors% src/run/files.c src/run/fence.c \
                       src/run/config.c src/run/study% src/run/model_folder.c \
                       src/run/hf_config.c,$(PARTS))

CPPFLAGS += -D_GNU_SOURCE -Isrc -I. -I$(B) $(if $(FFMPEG_FOUND),-DFV_FFMPEG) $(MPI_CFLAGS) \
            $(HDF5_CFLAGS) $(OPENBLAS_CFLAGS) $(YAML_CFLAGS) $(JANSSON_CFLAGS) $(XXHASH_CFLAGS) \
            $(if $(FFMPEG_FOUND),$(FFMPEG_CFLAGS)) $(CMOCKA_CFLAGS)
LIBS := $(MPI_LIBS) $(HDF5_LIBS) $(OPENBLAS_LIBS) $(YAML_LIBS) $(JANSSON_LIBS) $(XXHASH_LIBS) \
        $(if $(FFMPEG_FOUND),$(FFMPEG_LIBS)) -lpthread -lm
# Sums keep their order; only errno and trap flags, which nothing reads, are given up.
LANGUAGE := -std=c11 -ffp-contract=fast -fno-math-errno -fno-trapping-math $(WARNINGS)

# --- GPU -----------------------------------------------------------------------------------------
# Where the CUDA Toolkit is found; make CUDA=0 leaves it out (after make clean). Kernels for A100,
# RTX 40 and H100, and PTX for what comes after.
ALL_CUDA := $(sort $(wildcard cuda/*.c cuda/*.cu))
CUDA_SOURCES := $(filter-out $(if $(NCCL_FOUND),,cuda/collective.c),$(ALL_CUDA))
CUDA_USERS := src/run/device.c src/run/exchange.c # know about it where it is there
CUDA_DEFINES := -DFV_CUDA $(if $(NCCL_FOUND),-DFV_NCCL)
CUDA_OBJECTS := $(patsubst %,$(B)/gpu/%.o,$(CUDA_SOURCES) $(CUDA_USERS))
OTHER_OBJECTS := $(patsubst %.c,$(B)/f32/%.o,$(filter-out $(CUDA_USERS),$(SOURCES)))
OBJECTS := $(if $(CUDA_FOUND),$(CUDA_OBJECTS),$(CUDA_USERS:%.c=$(B)/f32/%.o)) $(OTHER_OBJECTS)
NVCC_FLAGS := -std=c++17 -O3 -lineinfo -Isrc -I. -Xcompiler=-Wall,-Wextra,-ffp-contract=off \
              $(if $(WERROR),-Werror all-warnings) \
              -gencode arch=compute_80,code=sm_80 -gencode arch=compute_89,code=sm_89 \
              -gencode arch=compute_90,code=[sm_90,compute_90]
$(B)/gpu/%.c.o: %.c $(B)/config.mk | $(B)/revision.h
	@mkdir -p $(@D)
	$(CC) $(LANGUAGE) $(CFLAGS) $(CUDA_DEFINES) $(CPPFLAGS) $(CUDA_CFLAGS) $(NCCL_CFLAGS) -MMD -MP -c $< -o $@
$(B)/gpu/%.cu.o: %.cu $(B)/config.mk
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) -MMD -MP -c $< -o $@

# --- program -------------------------------------------------------------------------------------
all: fovea

fovea: $(OBJECTS)
	$(CC) $(CFLAGS) $(LDFLAGS) -Wl,--as-needed $^ $(LIBS) $(if $(CUDA_FOUND),$(NCCL_LIBS) $(CUDA_LIBS)) -o $@

# One folder of objects per variant: float (the program), double (gradients), sanitizers.
FLAGS_f32 := $(CFLAGS)
FLAGS_f64 := $(CFLAGS) -DFV_DOUBLE
FLAGS_san := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all

define VARIANT
$(B)/$(1)/%.o: %.c $(B)/config.mk | $(B)/revision.h
	@mkdir -p $$(@D)
	$$(CC) $$(LANGUAGE) $$(FLAGS_$(1)) $$(CPPFLAGS) -MMD -MP -c $$< -o $$@
$(B)/$(1)/test_%: $(B)/$(1)/tests/unit/test_%.o $$(SHARED:%.c=$(B)/$(1)/%.o) $(2)
	$$(CC) $$(FLAGS_$(1)) $$(LDFLAGS) -Wl,--as-needed $$^ $$(LIBS) $$(CMOCKA_LIBS) -o $$@
endef
$(eval $(call VARIANT,f32,$(PARTS:%.c=$(B)/f32/%.o)))
$(eval $(call VARIANT,f64,$(PARTS_F64:%.c=$(B)/f64/%.o)))
$(eval $(call VARIANT,san,$(PARTS:%.c=$(B)/san/%.o)))

# Of the archive a target links what it needs.
FUZZ_FLAGS := -std=c11 -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all
$(B)/fuzz/%.o: %.c $(B)/config.mk
	@mkdir -p $(@D)
	$(or $(CLANG),clang) $(FUZZ_FLAGS) $(WARNINGS) -fsanitize=fuzzer-no-link,address,undefined \
	    $(CPPFLAGS) -MMD -MP -c $< -o $@
$(B)/fuzz/parts.a: $(FUZZ_PARTS:%.c=$(B)/fuzz/%.o)
	rm -f $@ && ar crs $@ $^
$(B)/fuzz/fuzz_%: $(B)/fuzz/tests/fuzz/fuzz_%.o $(B)/fuzz/parts.a
	$(or $(CLANG),clang) $(FUZZ_FLAGS) -fsanitize=fuzzer,address,undefined $^ -Wl,--as-needed \
	    $(YAML_LIBS) $(JANSSON_LIBS) $(XXHASH_LIBS) -lm -o $@

$(B)/revision.h: FORCE
	@mkdir -p $(@D)
	@printf '#define FV_REVISION "%s"\n' "$$(git describe --always --dirty --tags 2>/dev/null || \
	    echo unknown)" >$@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

-include $(shell find $(B) -name '*.d' 2>/dev/null)

# --- the GPU's kernels on the CPU ------------------------------------------------------------------
# The backend in cuda/, its own source, against the stand-in for CUDA in tests/cuda_host: operations
# and models under the sanitizers; without them the golden cases, which would take a minute longer,
# and what starts MPI, whose leaks would be reported: NCCL's test and the whole program.
HOST_FAST := $(filter tests/unit/test_golden%,$(TESTS_F64)) tests/cuda_host/test_nccl.cpp
HOST_CHECKED := $(filter-out $(HOST_FAST) %/test_ops_backend.c,$(TESTS_F64) $(wildcard tests/cuda_host/test_*.cpp))
HOST_TESTS := $(patsubst %,$(B)/host/%,$(basename $(notdir $(HOST_CHECKED)))) \
              $(patsubst %,$(B)/hostfast/%,$(basename $(notdir $(HOST_FAST)))) $(B)/hostfast/fovea
HOST_SHIM := $(filter-out tests/cuda_host/test_%,$(wildcard tests/cuda_host/*.cpp))
HOST_CPPFLAGS := -DFV_CUDA -DFV_NCCL -DFV_TEST_CUDA -Itests/cuda_host -Itests/unit $(CPPFLAGS)
FLAGS_host := -O2 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
FLAGS_hostfast := $(CFLAGS)

define HOST_VARIANT
$(B)/$(1)/%.c.o: %.c $(B)/config.mk | $(B)/revision.h
	@mkdir -p $$(@D)
	$$(CC) $$(LANGUAGE) $$(FLAGS_$(1)) $$(HOST_CPPFLAGS) -MMD -MP -c $$< -o $$@
$(B)/$(1)/%.o: % $(B)/config.mk
	@mkdir -p $$(@D)
	$$(CXX) -std=c++20 -x c++ -ffp-contract=off $$(HOST_WARNINGS) $$(FLAGS_$(1)) $$(HOST_CPPFLAGS) -MMD -MP -c $$< -o $$@
$(B)/$(1)/test_%: $(B)/$(1)/tests/cuda_host/test_%.cpp.o $$(HOST_SHIM:%=$(B)/$(1)/%.o)
	$$(CXX) $$(FLAGS_$(1)) $$(LDFLAGS) -Wl,--as-needed $$^ $$(LIBS) $$(CMOCKA_LIBS) -o $$@
$(B)/$(1)/test_%: $(B)/$(1)/tests/unit/test_%.c.o $$(patsubst %,$(B)/$(1)/%.o,$$(SHARED) $$(ALL_CUDA) $$(HOST_SHIM)) $(2)
	$$(CXX) $$(FLAGS_$(1)) $$(LDFLAGS) -Wl,--as-needed $$^ $$(LIBS) $$(CMOCKA_LIBS) -o $$@
endef
$(eval $(call HOST_VARIANT,host,$(PARTS_F64:%=$(B)/host/%.o)))
$(eval $(call HOST_VARIANT,hostfast,$(PARTS_F64:%.c=$(B)/f32/%.o)))

$(B)/hostfast/fovea: $(patsubst %,$(B)/hostfast/%.o,$(ALL_CUDA) $(HOST_SHIM) $(CUDA_USERS)) $(OTHER_OBJECTS)
	$(CXX) $(FLAGS_hostfast) $(LDFLAGS) -Wl,--as-needed $^ $(LIBS) -o $@
$(B)/host/compare_ops: $(patsubst %,$(B)/host/%.o,tests/gpu/compare_ops.c $(ALL_CUDA) $(HOST_SHIM) $(PARTS_F64))
	$(CXX) $(FLAGS_host) $(LDFLAGS) -Wl,--as-needed $^ $(LIBS) -o $@

# --- for a machine with a GPU -----------------------------------------------------------------------
# The tests of operations and model on the CUDA backend, and a folder that runs where the libraries
# are missing; without FFmpeg, whose libraries need a hundred others: no `fovea prepare` of videos.
GPU_TESTS := $(patsubst tests/unit/%.c,$(B)/gpu/%,$(filter-out %/test_ops_backend.c,$(TESTS_F64)))
GPU_PROGRAMS := $(B)/gpu/compare_ops $(B)/gpu/bench_encoder
GPU_PARTS := $(CUDA_SOURCES:%=$(B)/gpu/%.o) $(PARTS_F64:%.c=$(B)/f32/%.o)
LINK_GPU = $(CC) $(CFLAGS) $(LDFLAGS) -Wl,--as-needed $^ $(LIBS) $(CMOCKA_LIBS) $(NCCL_LIBS) $(CUDA_LIBS) -o $@
$(B)/gpu/tests/unit/%.c.o: CPPFLAGS += -DFV_TEST_CUDA
$(B)/gpu/src/run/video.c.o: CPPFLAGS += -UFV_FFMPEG
$(B)/gpu/test_%: $(B)/gpu/tests/unit/test_%.c.o $(SHARED:%=$(B)/gpu/%.o) $(GPU_PARTS)
	$(LINK_GPU)
$(B)/gpu/compare_ops: $(B)/gpu/tests/gpu/compare_ops.c.o $(GPU_PARTS)
	$(LINK_GPU)
$(B)/gpu/bench_encoder: $(B)/gpu/tests/speed/bench_encoder.c.o $(GPU_PARTS)
	$(LINK_GPU)
$(B)/gpu/fovea: $(filter-out %/video.o,$(OBJECTS)) $(B)/gpu/src/run/video.c.o
	$(LINK_GPU)
# Stands in front of functions of the CUDA runtime, found by dlsym.
$(B)/gpu/count_calls.so: tests/gpu/count_calls.c $(B)/config.mk
	@mkdir -p $(@D)
	$(CC) -shared -fPIC $(LANGUAGE) -Wno-pedantic $(CFLAGS) $(CPPFLAGS) $(CUDA_CFLAGS) $< -Wl,-z,lazy -o $@

gpu-tests: $(GPU_TESTS) $(GPU_PROGRAMS) $(B)/gpu/count_calls.so

bench-gpu: all gpu-tests
	$(or $(TORCH_PYTHON),python3) tests/bench_gpu

study-gpu: all
	$(or $(TORCH_PYTHON),python3) tests/bench_gpu --study

bundle: $(if $(CUDA_FOUND),$(B)/gpu/fovea gpu-tests)
	@$(if $(CUDA_FOUND),,echo "make bundle: no CUDA Toolkit was found, see 'make info'" && exit 1)
	@scripts/bundle $(B)/bundle $(B)/gpu/fovea $(GPU_TESTS) $(GPU_PROGRAMS) $(B)/gpu/count_calls.so

# --- running -------------------------------------------------------------------------------------
run:
	@scripts/configure install build
	@$(MAKE) --no-print-directory $(JOBS) all
	mpirun -np $(NP) ./fovea $(ARGS)

# The analysis in an environment of its own; OUT=DIR reports another study.
report: $(B)/analysis/made
	@PYTHONPATH=analysis $(B)/analysis/bin/python -m fovea_analysis report $(or $(OUT),runs/ablations) $(ARGS)
attend: all $(B)/analysis/made
	@./fovea attend $(RUN) $(VIDEO) -o $(B)/attention.h5 $(ARGS)
	@PYTHONPATH=analysis $(B)/analysis/bin/python -m fovea_analysis attend $(B)/attention.h5 \
	    -o $(or $(GIF),attention.gif)
$(B)/analysis/made: analysis/pyproject.toml scripts/analysis_environment
	@scripts/configure install analysis || true
	@scripts/analysis_environment $(B)/analysis

$(B)/f32/bench_%: $(B)/f32/tests/speed/bench_%.o $(PARTS:%.c=$(B)/f32/%.o)
	$(CC) $(CFLAGS) $(LDFLAGS) -Wl,--as-needed $^ $(LIBS) -o $@

$(B)/f32/parity: $(B)/f32/tests/reference/parity.o $(B)/f32/tests/unit/parity.o \
                 $(PARTS:%.c=$(B)/f32/%.o)
	$(CC) $(CFLAGS) $(LDFLAGS) -Wl,--as-needed $^ $(LIBS) -o $@

bench: all $(B)/f32/bench_ops $(B)/f32/bench_encoder $(B)/f32/bench_weights
	$(B)/f32/bench_ops
	$(or $(PYTHON),python3) tests/bench

soak: all fuzz-build
	tests/soak
	tests/fuzz/run $(or $(SECONDS),3600)

weights:
	@scripts/weights

# --- tests ---------------------------------------------------------------------------------------
test:
	@scripts/configure install build optional analysis test
	@tests/run

# Every test program; tests/run builds this first.
F32_TESTS := $(TESTS:tests/unit/%.c=$(B)/f32/%)
F64_TESTS := $(TESTS_F64:tests/unit/%.c=$(B)/f64/%)
# test_step_memory.c counts allocations in a way that the sanitizers' allocator does not allow.
SAN_TESTS := $(filter-out %/test_step_memory,$(TESTS:tests/unit/%.c=$(B)/san/%))
tests: all $(F32_TESTS) $(F64_TESTS) $(SAN_TESTS) $(HOST_TESTS) $(B)/host/compare_ops $(FUZZERS)

sanitize: $(SAN_TESTS)
	@tests/run sanitize

fuzz-build: $(FUZZERS)

fuzz: fuzz-build
	@tests/fuzz/run $(or $(SECONDS),20)

lint: lint-format lint-layers lint-tidy lint-cppcheck lint-readme

format:
	clang-format -i $(C_FILES)

lint-format:
	clang-format --dry-run -Werror $(C_FILES)

lint-layers:
	scripts/check_layers

lint-tidy: $(B)/revision.h
	printf '%s\n' $(SOURCES) | xargs -P $$(nproc) -n 1 sh -c \
	    'clang-tidy --quiet --warnings-as-errors="*" "$$0" -- -std=c11 $(CPPFLAGS) 2>/dev/null'

lint-cppcheck: $(B)/revision.h
	cppcheck -q -j $$(nproc) --std=c11 --enable=warning,performance,portability --inline-suppr \
	    --error-exitcode=1 --suppress=missingIncludeSystem -D_GNU_SOURCE \
	    $(if $(FFMPEG_FOUND),-DFV_FFMPEG) -Isrc -I$(B) src

lint-readme:
	scripts/configure table | while IFS= read -r line; do grep -qxF -e "$$line" README.md || \
	    { echo "README.md lacks this line of 'scripts/configure table': $$line"; exit 1; }; done

# --- the rest ------------------------------------------------------------------------------------
info:
	@scripts/configure info

clean:
	rm -rf $(B) fovea

help:
	@echo "make            build ./fovea"
	@echo "make run        install what is missing (where it may), build, run the study;"
	@echo "                NP=ranks, ARGS='options of fovea'"
	@echo "make report     what runs/ablations shows, as a page: runs/ablations/report/report.html;"
	@echo "                OUT=DIR another study, ARGS='options of fovea-report'"
	@echo "make attend     where an experiment looks in a video: RUN=runs/ablations/D_freeze_dino"
	@echo "                VIDEO=FILE, GIF=attention.gif, ARGS='options of fovea attend'"
	@echo "make test       the whole test suite; tests/run NAME... runs some of it"
	@echo "make weights    fetch the published checkpoints into models/ (docs/weights.md)"
	@echo "make info       what was found, what was not and what that turns off"
	@echo "make bench      speed: every operation, steps per second, the whole study"
	@echo "make bench-gpu  speed on a GPU beside PyTorch; make study-gpu: the whole study there"
	@echo "make bundle     a folder that runs on a GPU machine without the libraries (docs/gpu.md)"
	@echo "make soak       200 failures at random moments and runs to the end; then fuzzing, an hour"
	@echo "                for each reader, as many at once as there are cores; SECONDS=3600"
	@echo "make lint       clang-format, layers, clang-tidy, cppcheck"
	@echo "make format     clang-format in place"
	@echo "make sanitize   unit tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make fuzz       readers of files on changed inputs (libFuzzer); SECONDS=20 for each"
	@echo "make clean      remove what was built"
