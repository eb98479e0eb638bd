/* The products of a layer in float32, from float32, bfloat16 or float16: everywhere. */
#include "tiles_f32.h"

#define NAME(what) qloralab_adapted_f32_##what
#include "product.h"
