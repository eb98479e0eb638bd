/* Runs functions of a shared library for another process, see test_arm.py. Usage: arm_driver LIBRARY. Numbers are
   words of 8 bytes, the float of 4.

       stdin   name [64]
               how many buffers, how many pointers, words [16], a float
               size of each buffer
               for each pointer: in which buffer (-1: in words), at which byte, to which buffer
               the contents of each buffer
       stdout  what the function returns
               the contents of each buffer

   One call serves any function: on 64-bit Arm the first eight integers and pointers are passed in registers of their
   own, floats in others, and the rest of the integers on the stack in words of 8 bytes.

   A buffer ends where a page begins that may not be touched, so a read or write too far ends this process. The bytes
   before a buffer are looked at after the call. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

enum { WORDS = 16, PAGE = 1 << 16, MARK = 0xA5 };

#define EIGHT int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t
typedef int64_t (*function)(EIGHT, EIGHT, float);

typedef struct {
    int64_t buffers, pointers, words[WORDS];
    float number;
} header;

typedef struct {
    int64_t in, at, to;
} pointer;

typedef struct {
    uint8_t *memory, *data;
    int64_t whole, size;
} buffer;

static int fail(const char *why)
{
    fprintf(stderr, "arm_driver: %s\n", why);
    exit(2);
}

static void get(void *to, int64_t size)
{
    if (size && fread(to, (size_t)size, 1, stdin) != 1)
        fail("the request ends early");
}

static buffer allocate(int64_t size)
{
    int64_t whole = (size + PAGE - 1) / PAGE * PAGE + PAGE;
    uint8_t *memory = mmap(NULL, (size_t)(whole + PAGE), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + whole, PAGE, PROT_NONE))
        fail("no memory");
    memset(memory, MARK, (size_t)whole);
    return (buffer){memory, memory + whole - size, whole, size};
}

static void serve(void *library, const char *name)
{
    function f = (function)dlsym(library, name);
    if (!f)
        fail(dlerror());
    header h;
    get(&h, sizeof h);
    int64_t *sizes = calloc((size_t)h.buffers + 1, sizeof *sizes);
    pointer *pointers = calloc((size_t)h.pointers + 1, sizeof *pointers);
    buffer *buffers = calloc((size_t)h.buffers + 1, sizeof *buffers);
    get(sizes, h.buffers * (int64_t)sizeof *sizes);
    get(pointers, h.pointers * (int64_t)sizeof *pointers);
    for (int64_t i = 0; i < h.buffers; i++) {
        buffers[i] = allocate(sizes[i]);
        get(buffers[i].data, sizes[i]);
    }
    for (int64_t i = 0; i < h.pointers; i++) {
        pointer p = pointers[i];
        memcpy((p.in < 0 ? (uint8_t *)h.words : buffers[p.in].data) + p.at, &buffers[p.to].data, 8);
    }
    const int64_t *w = h.words;
#define PASS(i) w[i], w[i + 1], w[i + 2], w[i + 3], w[i + 4], w[i + 5], w[i + 6], w[i + 7]
    int64_t result = f(PASS(0), PASS(8), h.number);
    fwrite(&result, sizeof result, 1, stdout);
    for (int64_t i = 0; i < h.buffers; i++) {
        buffer *b = &buffers[i];
        for (uint8_t *before = b->memory; before < b->data; before++)
            if (*before != MARK)
                fail("something was written before a buffer");
        fwrite(b->data, 1, (size_t)b->size, stdout);
        munmap(b->memory, (size_t)(b->whole + PAGE));
    }
    fflush(stdout);
    free(sizes);
    free(pointers);
    free(buffers);
}

int main(int argc, char **argv)
{
    void *library = argc == 2 ? dlopen(argv[1], RTLD_NOW) : NULL;
    if (!library)
        fail(argc == 2 ? dlerror() : "no library given");
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    char name[64];
    while (fread(name, sizeof name, 1, stdin) == 1)
        serve(library, name);
    return 0;
}
