/* Several launches by one call: what program.py describes is handed to the driver, one kernel after the other.
 *
 * The driver's types are those of cuda.h, whose layout is part of CUDA's binary interface. They are declared here so
 * that this compiles where there is no CUDA; cuLaunchKernelEx comes as a pointer, so that it loads there. */

#include <stdint.h>

enum { MOST_PARAMETERS = 64, PROGRAMMATIC_STREAM_SERIALIZATION = 6 };

typedef struct { /* CUlaunchAttribute */
    int id;
    char padding[4];
    union {
        int allowed;
        char size[64];
    } value;
} Attribute;

typedef struct { /* CUlaunchConfig */
    uint32_t grid[3], block[3], shared;
    void *stream;
    Attribute *attributes;
    uint32_t count;
} Config;

typedef int (*LaunchKernelEx)(const Config *config, void *function, void **parameters, void **extra);

/* A constant, the first bytes of value; or, with a slot, the address that is value bytes behind a base. */
typedef struct {
    int64_t slot; /* -1: a constant */
    uint64_t value;
} Parameter;

typedef struct {
    void *function;
    uint32_t grid[3], threads, shared; /* bytes of dynamic shared memory */
    uint32_t dependent; /* whether it may start before the kernel in front of it has ended, for which it waits itself */
    uint32_t count;
    Parameter *parameters;
} Launch;

/* depend: whether those launches may start before others have ended that may. Returns 0; or the first result that is
 * not CUDA_SUCCESS, and 2**32 times the number of its launch, from 0. */
__attribute__((visibility("default"))) int64_t qloralab_launch(LaunchKernelEx run, const Launch *launches, int64_t count,
                                                               const uint64_t *bases, void *stream, int depend) {
    for (int64_t i = 0; i < count; i++) {
        const Launch *one = launches + i;
        uint64_t addresses[MOST_PARAMETERS];
        void *parameters[MOST_PARAMETERS];
        for (uint32_t j = 0; j < one->count; j++) {
            Parameter *parameter = one->parameters + j;
            parameters[j] = &parameter->value;
            if (parameter->slot >= 0) {
                addresses[j] = bases[parameter->slot] + parameter->value;
                parameters[j] = addresses + j;
            }
        }
        Attribute attribute = {.id = PROGRAMMATIC_STREAM_SERIALIZATION, .value.allowed = 1};
        Config config = {
            .grid = {one->grid[0], one->grid[1], one->grid[2]},
            .block = {one->threads, 1, 1},
            .shared = one->shared,
            .stream = stream,
            .attributes = &attribute,
            .count = one->dependent && depend,
        };
        int result = run(&config, one->function, parameters, 0);
        if (result) return i << 32 | (uint32_t)result;
    }
    return 0;
}
