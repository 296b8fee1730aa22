// Compiled with -mavx2 -mf16c; called only where dispatch.cpp found both.
#include "cpu/sampling/kernels_impl.h"
