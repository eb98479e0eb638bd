/* A driver that launches nothing and writes down what it was given. The types are those of CUDA's own header. */

#include <cuda.h>
#include <stdint.h>
#include <string.h>

#define EXPORTED __attribute__((visibility("default")))
enum { MOST_LAUNCHES = 1024, MOST_FUNCTIONS = 1024, MOST_PARAMETERS = 64 };

typedef struct {
    uint64_t function, stream;
    uint32_t grid[3], block[3], shared, dependent, attributes, count;
    uint64_t parameters[MOST_PARAMETERS];
} Launch;

static Launch launches[MOST_LAUNCHES];
static int64_t count;
static uint8_t sizes[MOST_FUNCTIONS][MOST_PARAMETERS];

/* The bytes of each parameter of a function; 0 behind the last one. */
EXPORTED uint8_t *sizes_of(int64_t function) { return sizes[function]; }

/* How many launches there were. */
EXPORTED int64_t launched(void) { return count; }

/* The memory of one of the last MOST_LAUNCHES, by its number. */
EXPORTED Launch *launch(int64_t number) { return launches + number % MOST_LAUNCHES; }

/* Memory for another one. */
EXPORTED Launch *next(void) { return launch(count++); }

EXPORTED CUresult launch_kernel(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    Launch *one = next();
    const uint8_t *size = sizes[(uintptr_t)function];
    memset(one, 0, sizeof *one);
    one->function = (uintptr_t)function;
    one->stream = (uintptr_t)config->hStream;
    memcpy(one->grid, &config->gridDimX, sizeof one->grid);
    memcpy(one->block, &config->blockDimX, sizeof one->block);
    one->shared = config->sharedMemBytes;
    one->attributes = config->numAttrs;
    for (unsigned i = 0; i < config->numAttrs; i++)
        if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            one->dependent = config->attrs[i].value.programmaticStreamSerializationAllowed;
    for (; size[one->count]; one->count++)
        memcpy(one->parameters + one->count, parameters[one->count], size[one->count]);
    return extra ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
