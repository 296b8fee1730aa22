// Plain x86-64 (SSE2), aarch64 (NEON): the compiler lowers the vectors to what the target has.
#include "cpu/sampling/kernels_impl.h"
