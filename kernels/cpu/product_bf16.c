/* The products of a layer in bfloat16, where the processor has them. */
#include "tiles_bf16.h"

#if HAVE_AVX512_BF16

#define NAME(what) qloralab_adapted_bf16_##what
#include "product.h"

EXPORT int qloralab_has_bf16_product(void) { return 1; }

#else

EXPORT int qloralab_has_bf16_product(void) { return 0; }

#endif
